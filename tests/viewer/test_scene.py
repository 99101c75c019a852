"""What the page has in its scene and what its controls change, without a browser."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from page4d.errors import InputError
from page4d.viewer import ViewOptions, check_html, cloud, save_html, serving, trails

viser = pytest.importorskip("viser", reason="viser is not installed")


def visible_pages(book) -> list[int]:
    return [i for i, node in book.pages.items() if node.visible]


def record(page) -> list:
    """The messages that are sent from now on."""
    sent: list = []
    queue = page.server._websock_server.queue_message
    page.server._websock_server.queue_message = lambda message: (sent.append(message), queue(message))
    return sent


def test_static_points_of_all_frames_and_moving_points_of_each(square, open_page):
    page = open_page(*square)
    static, moving = page.points.static, page.points.moving.pages
    assert len(static.points) == 5 * (56 * 84 - 256) and np.allclose(static.points[:, 2], 2) and static.colors[:, 0].max() == 0
    assert sorted(moving) == [0, 1, 2, 3, 4] and visible_pages(page.points.moving) == [0]
    for i, node in moving.items():
        assert len(node.points) == 256 and np.allclose(node.points[:, 2], 1.5) and (node.colors[:, 0] == 255).all()
        focal = 42 / np.tan(1.128 / 2)
        left = (4 + 10 * i - 42) * 1.5 / focal + 0.001 * i  # the first pixel of the square, from the camera's place
        assert node.points[:, 0].min() == pytest.approx(left, abs=1e-4)


def test_the_slider_shows_another_moment_and_sends_no_points(square, open_page):
    page = open_page(*square)
    sent = record(page)
    page.controls.frame.value = 3
    page.refresh()
    assert visible_pages(page.points.moving) == [3] and page.points.static.visible
    kinds = {type(message).__name__ for message in sent}
    assert "PointCloudMessage" not in kinds and "SetSceneNodeVisibilityMessage" in kinds
    sent.clear()
    page.refresh()
    assert not sent  # nothing has changed


def test_the_frustum_of_the_current_frame_is_highlighted(square, open_page):
    page = open_page(*square)
    page.controls.frame.value = 2
    page.refresh()
    bright = [i for i, node in page.cameras.frusta.items() if tuple(node.color) == (255, 90, 0)]
    assert bright == [2] and len(page.cameras.frusta) == 5
    node = page.cameras.frusta[4]
    assert node.position == pytest.approx([0.004, 0, 0]) and node.fov == pytest.approx(0.8) and node.aspect == pytest.approx(1.5, abs=0.01)


def test_switches(tracked, open_page):
    page = open_page(*tracked)
    nodes = {
        "static": page.points.static,
        "moving": page.points.moving.parent,
        "tracks": page.tracks.parent,
        "cameras": page.cameras.parent,
    }
    for name, node in nodes.items():
        getattr(page.controls, name).value = False
        page.refresh()
        assert not node.visible and all(other.visible for other in nodes.values() if other is not node)
        getattr(page.controls, name).value = True
        page.refresh()
        assert node.visible


def test_confidence_motion_and_size(square, open_page):
    prediction, frames = square
    conf = torch.linspace(1, 2, 56)[None, None, :, None].expand(1, 5, 56, 84)
    page = open_page(replace(prediction, depth_conf=conf.contiguous()), frames)
    assert len(page.points.static.points) == 5 * (28 * 84 - 8 * 16)  # the lower half; it has 8 rows of the square
    page.controls.static.value = False
    page.refresh()
    page.controls.percentile.value = 0
    page.controls.threshold.value = 0.95
    page.refresh()
    assert len(page.points.static.points) == 5 * 56 * 84 and not page.points.moving.pages
    assert not page.points.static.visible  # as before
    page.controls.threshold.value = 0.5
    page.refresh()
    before = page.points.static.point_size
    page.controls.size.value *= 2
    page.refresh()
    nodes = [page.points.static, *page.points.moving.pages.values()]
    assert len(nodes) == 6 and all(node.point_size == pytest.approx(2 * before) for node in nodes)


def test_without_a_mask_nothing_moves_and_has_no_switches(square, open_page):
    prediction, frames = square
    page = open_page(replace(prediction, mask=None), frames)
    assert page.controls.moving is None and page.controls.threshold is None and page.tracks is None
    assert len(page.points.static.points) == 5 * 56 * 84 and not page.points.moving.pages
    page.controls.frame.value = 4
    page.refresh()
    assert page.points.static.visible


def test_one_frame_has_no_time(square, open_page, tmp_path):
    prediction, frames = square
    page = open_page(prediction.frame(0), frames.frame(0))
    assert page.controls.frame is None and len(page.points.moving.pages) == 1
    page.refresh()
    assert save_html(page, tmp_path / "a.html", 10).stat().st_size > 500_000


def test_trails_join_what_neighbouring_frames_see(tracked, open_page):
    page = open_page(*tracked)
    assert sorted(page.tracks.pages) == [1, 2, 3, 4]
    assert [len(page.tracks.pages[i].points) for i in (1, 2, 3, 4)] == [2, 4, 5, 6]  # the wall's point is lost in frame 3
    focal = 42 / np.tan(1.128 / 2)
    tip = page.tracks.pages[4].points.reshape(-1, 3)[:, 0].max()
    assert tip == pytest.approx(max((12 + 40 - 42) * 1.5 / focal + 0.004, (70 - 42) * 2 / focal + 0.002), abs=1e-4)
    page.controls.frame.value = 4
    page.refresh()
    assert visible_pages(page.tracks) == [4]


def test_too_many_tracks_are_thinned_evenly(tracked, open_page, monkeypatch):
    monkeypatch.setattr(trails, "MAX_TRACKS", 1)
    page = open_page(*tracked)
    assert [len(page.tracks.pages[i].points) for i in (1, 2, 3, 4)] == [1, 2, 3, 4]


def test_points_are_capped_the_same_way_every_time(square, open_page, monkeypatch):
    assert len(open_page(*square, ViewOptions(points=1000, port=18080)).points.static.points) == 1000
    one, two = (cloud.load_cloud(*square).split(0, 0.5, 1000) for _ in range(2))
    assert len(one[0].xyz) == 1000 and np.array_equal(one[0].xyz, two[0].xyz)
    assert [len(part.xyz) for part in one[1]] == [256] * 5  # what moves is not thinned
    monkeypatch.setattr(cloud, "MAX_POINTS", 500)
    assert [len(part.xyz) for part in cloud.load_cloud(*square).split(0, -1, 1000)[1]] == [100] * 5


def test_looks(square, open_page):
    """The first look and the view through a camera."""
    page = open_page(*square)
    first = page.server.initial_camera
    assert first.position == pytest.approx([0, -6 * 0.06 * 2, -16 * 0.06 * 2]) and first.look_at == pytest.approx([0, 0, 2])
    assert first.up == pytest.approx([0, -1, 0]) and first.fov == pytest.approx(0.8)
    client = FakeClient(aspect=3.0)
    page.look_through(client, 2)
    assert page.controls.frame.value == 2 and not page.controls.cameras.value
    assert client.camera.position == pytest.approx([0.002, 0, 0]) and client.camera.look_at == pytest.approx([0.002, 0, 2])
    assert client.camera.fov == pytest.approx(0.8)
    client.camera.aspect = 0.75  # a narrow window sees the whole picture too
    page.look_through(client)
    assert np.tan(client.camera.fov / 2) * 0.75 == pytest.approx(np.tan(1.128 / 2), rel=1e-3)


class FakeClient:
    """What `look_through` uses of viser's client."""

    def __init__(self, aspect: float) -> None:
        self.camera = type("Camera", (), {"aspect": aspect})()

    def atomic(self):
        import contextlib

        return contextlib.nullcontext()


def test_playing_goes_round(square, open_page):
    page = open_page(*square)
    page.controls.frame.value = 3
    page.controls.toggle()
    assert page.controls.playing and page.controls.play.label == "pause"
    page.controls.advance()
    page.controls.advance()
    assert page.controls.frame.value == 0
    page.controls.toggle()
    assert not page.controls.playing and page.controls.play.label == "play"


def test_frames_without_a_finite_camera_or_depth_are_left_out(square, open_page):
    prediction, frames = square
    pose, depth = prediction.pose_enc.clone(), prediction.depth.clone()
    pose[0, 1, 7:], depth[0, 2] = 0, torch.nan
    page = open_page(replace(prediction, pose_enc=pose, depth=depth), frames)
    assert sorted(page.cameras.frusta) == [0, 2, 3, 4] and sorted(page.points.moving.pages) == [0, 3, 4]
    for i in (1, 2, 4):
        page.controls.frame.value = i
        page.refresh()
    page.look_through(FakeClient(1.0), 1)
    assert page.controls.cameras.value and page.controls.frame.value == 4  # nothing happened
    nowhere = replace(prediction, pose_enc=torch.zeros_like(pose))
    with pytest.raises(InputError, match="no frame has a finite camera"):
        open_page(nowhere, frames)
    empty = open_page(replace(prediction, depth=torch.full_like(depth, torch.nan)), frames)
    assert len(empty.points.static.points) == 0


def test_the_saved_file_holds_everything(square, open_page, tmp_path):
    page = open_page(*square)
    path = save_html(page, tmp_path / "scene.html", 10)
    text = path.read_text(encoding="utf-8")
    assert text.lstrip().lower().startswith("<!doctype html>") and "__VISER_EMBED_DATA__" in text
    assert [entry.name for entry in tmp_path.iterdir()] == ["scene.html"]


def test_a_port_in_use_is_passed_over(square, open_page):
    one, two = open_page(*square), open_page(*square)
    assert two.server.get_port() > one.server.get_port() >= 18080 and two.address == f"http://127.0.0.1:{two.server.get_port()}"


def test_mistakes_are_one_line(tmp_path):
    for wrong in (
        {"moving": 2},
        {"confidence": -1},
        {"fps": 0},
        {"fps": float("nan")},
        {"port": 0},
        {"points": 0},
        {"moving": float("nan")},
    ):
        with pytest.raises(InputError):
            ViewOptions(**wrong)
    for host in ("1.2.3.4", "no such host", "a" * 300):
        with pytest.raises(InputError, match="give another --host"):
            serving.free_port(host, 18080)
    with pytest.raises(InputError, match=r"must end in \.html"):
        check_html(tmp_path / "scene.glb")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_html(tmp_path / "folder.html")


def test_a_browser_opens_only_where_there_is_a_screen(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    assert not serving.has_browser()
    monkeypatch.setenv("DISPLAY", ":0")
    assert serving.has_browser()
    monkeypatch.setattr("sys.platform", "darwin")
    assert serving.has_browser()
    monkeypatch.setenv("SSH_CONNECTION", "1.2.3.4 1 1.2.3.5 22")
    assert not serving.has_browser()
