"""The page and the saved file in headless Chromium.

`pytest tests/viewer -m slow -k picture --viewer-picture docs/images/viewer.png` makes the picture of docs/viewer.md.
"""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from page4d.viewer import Page, ViewOptions, save_html

pytest.importorskip("viser", reason="viser is not installed")
pytestmark = pytest.mark.slow

VIEW = {"x": 0, "y": 0, "width": 660, "height": 600}  # left of the panel


def opened(browser, address: str):
    """A tab with the address, and the list of its errors."""
    tab, errors = browser.new_page(), []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(address + "?fixedDpr=1")  # else viser draws fewer pixels when it is slow
    tab.wait_for_selector("canvas")
    close = tab.locator(".mantine-Notification-closeButton")  # of the remark that there is no GPU
    close.first.click()
    return tab, errors


def pixels(tab, clip: dict | None = VIEW) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(tab.screenshot(clip=clip))).convert("RGB")).astype(int)


def settled(tab, until=lambda shot: True) -> np.ndarray:
    """A picture of the view that fulfils a condition, once it does not change any more. The page fades in, and draws when it likes."""
    before = pixels(tab)
    for _ in range(120):
        time.sleep(0.25)
        now = pixels(tab)
        if until(now) and (now == before).all():
            return now
        before = now
    pytest.fail("the page does not come to rest")


def red(shot: np.ndarray) -> np.ndarray:
    """(H, W): where the square is."""
    return (shot[..., 0] > 200) & (shot[..., 1] < 80)


def wait_for(condition) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("it does not happen")


def on_screen(page: Page, tab, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns and rows of the view where points (N, 3) of the world are, by the page's camera, and the pixels that a unit has there."""
    (client,) = page.server.get_clients().values()
    box = tab.locator("canvas").first.bounding_box()
    camera = client.camera
    ahead = camera.look_at - camera.position
    ahead = ahead / np.linalg.norm(ahead)
    right = np.cross(ahead, camera.up_direction)
    right = right / np.linalg.norm(right)
    local = (points - camera.position) @ np.stack([right, np.cross(ahead, right), ahead], 1)
    scale = box["height"] / 2 / np.tan(camera.fov / 2) / local[:, 2]
    return local[:, 0] * scale + box["x"] + box["width"] / 2, local[:, 1] * scale + box["y"] + box["height"] / 2, scale


def projected(page: Page, tab, i: int, grow: int) -> tuple[slice, slice]:
    """The rows and columns of the view where the square of a frame is. `grow`: by pixels and a point's radius."""
    x, y, scale = on_screen(page, tab, page.points.moving.pages[i].points)
    grow += int(np.sign(grow) * scale[0] * page.points.static.point_size)  # viser's size is the radius
    return slice(int(y.min()) - grow, int(y.max()) + 1 + grow), slice(int(x.min()) - grow, int(x.max()) + 1 + grow)


def test_the_slider_moves_what_moves_and_nothing_else(square, open_page, browser):
    page = open_page(*square)
    page.controls.cameras.value = False
    threading.Thread(target=page.follow, daemon=True).start()
    tab, errors = opened(browser, page.address)
    first = settled(tab, lambda shot: red(shot).any())
    assert (first < 240).any(-1).mean() > 0.2, "the canvas is blank"
    tab.get_by_role("slider").first.press("End")
    last = settled(tab, lambda shot: (red(shot) != red(first)).any())
    assert page.shown.frame == 4 and tab.get_by_role("slider").first.get_attribute("aria-valuenow") == "4"
    changed = abs(first - last).max(-1) > 16
    outside = np.ones_like(changed)
    for i, shot in ((0, first), (4, last)):
        inside = projected(page, tab, i, -4)
        assert red(shot)[inside].mean() > 0.99 and changed[inside].mean() > 0.99
        outside[projected(page, tab, i, 8)] = False
    assert outside.mean() > 0.5 and not changed[outside].any()
    assert not errors


def test_play_and_pause(square, open_page, browser):
    page = open_page(*square)
    threading.Thread(target=page.follow, daemon=True).start()
    tab, errors = opened(browser, page.address)
    tab.get_by_role("button", name="play").click()
    tab.wait_for_function("document.querySelector('[role=slider]').ariaValueNow >= 2")
    tab.get_by_role("button", name="pause").click()
    wait_for(lambda: not page.controls.playing)
    assert not errors


def test_a_click_on_a_frustum_looks_through_it(square, open_page, browser):
    page = open_page(*square)
    threading.Thread(target=page.follow, daemon=True).start()
    tab, errors = opened(browser, page.address)
    settled(tab)
    x, y, _ = on_screen(page, tab, np.array([[0.0, 0, 0.1]]))  # in front of the cameras, within their frusta
    tab.mouse.click(float(x[0]), float(y[0]))
    wait_for(lambda: not page.controls.cameras.value)
    wait_for(lambda: abs(next(iter(page.server.get_clients().values())).camera.position[2]) < 1e-6)
    settled(tab, lambda shot: red(shot).any())
    columns = projected(page, tab, page.shown.frame, 0)[1]
    width = columns.stop - columns.start  # between the centres of the outermost of 16 points
    assert width == pytest.approx(600 * 15 / 56, abs=3), "the picture does not fill the height of the window"
    assert not errors


def test_the_saved_file_plays_from_the_disk(square, open_page, browser, tmp_path):
    page = open_page(*square)
    page.controls.cameras.value = False
    path = save_html(page, tmp_path / "scene.html", fps=10)
    page.close()
    tab, errors = opened(browser, path.as_uri())
    shots = []
    for seconds in ("0", "0.45"):
        tab.locator("input").first.fill(seconds)
        shots.append(settled(tab, lambda shot: red(shot).any() and not (shots and (red(shot) == red(shots[0])).all())))
    assert (shots[0] < 240).any(-1).mean() > 0.2
    middles = [np.nonzero(red(shot))[1].mean() for shot in shots]
    assert middles[1] - middles[0] > 100  # to the right
    assert not errors


def test_picture_of_the_page(rendered, open_page, browser, tmp_path, request):
    """A rendered scene, seen from above the cameras."""
    page = open_page(*rendered, ViewOptions(confidence=0, port=18080))
    threading.Thread(target=page.follow, daemon=True).start()
    tab, errors = opened(browser, page.address)
    tab.set_viewport_size({"width": 1440, "height": 890})
    wait_for(page.server.get_clients)
    (client,) = page.server.get_clients().values()
    wait_for(lambda: client.camera.update_timestamp)
    with client.atomic():
        client.camera.position, client.camera.look_at = np.array([0.27, -0.42, -0.5]), np.array([0.31, 0.08, 0.6])
        client.camera.fov = 0.82
    page.controls.frame.value = 7
    wait_for(lambda: page.shown.frame == 7)
    shot = settled(tab)
    assert (shot < 240).any(-1).mean() > 0.3 and len(np.unique(shot.reshape(-1, 3), axis=0)) > 10_000
    target = Path(request.config.getoption("--viewer-picture") or tmp_path / "viewer.png")
    picture = Image.fromarray(pixels(tab, None).astype(np.uint8))
    palette = picture.quantize(256, Image.Quantize.MAXCOVERAGE)  # the whole range of colours; Pillow dithers only with a given palette
    picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(target, optimize=True)
    assert not errors
