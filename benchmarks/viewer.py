"""How long `page4d view` takes for 60 frames of 336 x 518, and how fast it plays: `python -m benchmarks.viewer`.

The clip is made up: a smooth surface and a disc that moves before it. With playwright and Chromium, the page is opened as well. There WebGL
is drawn by the processor, which competes with the rest.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from page4d.cli.view import FIELDS, THREADS
from page4d.export.folder import load_folder
from page4d.prediction import Prediction
from page4d.viewer import Page, ViewOptions, save_html

S, H, W = 60, 336, 518
FLAGS = ["--no-sandbox", "--disable-gpu", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-background-networking"]
COUNT = """() => { window.shown = 0; new MutationObserver(() => window.shown++).observe(
    document.querySelector('[role=slider]'), {attributes: true, attributeFilter: ['aria-valuenow']}) }"""
PLAYED = 6.0  # seconds
MIDDLE: Any = {"x": 200, "y": 200, "width": 300, "height": 200}  # of the scene, in pixels of the screen


def clip() -> Prediction:
    """Depth with a little noise, pictures of 8 bits, a camera that moves to the right, a disc that crosses the picture."""
    generator = torch.Generator().manual_seed(0)

    def smooth(*channels: int) -> torch.Tensor:
        return interpolate(torch.rand(1, *channels, 6, 9, generator=generator), (H, W), mode="bicubic")[0]

    y, x = torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij")
    disc = torch.stack([(x - place) ** 2 + y**2 < 0.06 for place in torch.linspace(-0.6, 0.6, S)])
    texture = 0.8 * smooth(3).clamp(0, 1) + 0.2 * torch.rand(3, H, W, generator=generator)
    images = torch.where(disc[:, None], torch.tensor([0.9, 0.3, 0.1])[:, None, None], texture)
    depth = torch.where(disc, 1.5, 2 + smooth(1) + 0.3 * y) + 0.002 * torch.rand(S, H, W, generator=generator)
    pose = torch.tensor([0, 0, 0, 0, 0, 0, 1, 0.8, 1.1]).repeat(S, 1)
    pose[:, 0] = torch.linspace(0, -0.5, S)
    return Prediction(
        images=(255 * images).round()[None] / 255,
        mask=0.4 - 0.8 * interpolate(disc[:, None].float(), (H // 14, W // 14), mode="area")[None, :, 0],
        pose_enc=pose[None],
        depth=depth[None, ..., None],
        depth_conf=1 + smooth(S).abs()[None] + 0.01 * torch.rand(1, S, H, W, generator=generator),
    )


def in_browser(page: Page) -> None:
    """Print when the page has drawn its points, and how many frames per second reach it and are drawn."""
    from playwright.sync_api import sync_playwright

    threading.Thread(target=page.follow, daemon=True).start()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        tab = browser.new_page(viewport={"width": 1000, "height": 600})
        received: list[int] = []  # bytes
        tab.on("websocket", lambda socket: socket.on("framereceived", lambda data: received.append(len(data))))
        start = time.perf_counter()
        tab.goto(page.address)
        tab.get_by_role("button", name="play").wait_for()
        print(f"page with controls    {time.perf_counter() - start:6.2f} s after it is asked for")
        while np.asarray(Image.open(io.BytesIO(tab.screenshot(clip=MIDDLE)))).min() > 250:  # white
            time.sleep(0.05)
        print(f"points are drawn      {time.perf_counter() - start:6.2f} s")
        time.sleep(2)  # it fades in
        tab.evaluate(COUNT)
        tab.get_by_role("button", name="play").click()
        for what in ("all points", "moving points"):
            page.controls.static.value = what == "all points"
            tab.wait_for_timeout(2000)
            sent, before, start = len(received), tab.evaluate("shown"), time.perf_counter()
            tab.wait_for_timeout(PLAYED * 1000)
            drawn, seconds = tab.evaluate("shown") - before, time.perf_counter() - start
            print(f"playing, {what:<13}{(len(received) - sent) / seconds:6.2f} frames/s reach the browser, {drawn / seconds:.2f} are drawn")
        browser.close()


def main() -> None:
    torch.set_num_threads(THREADS)
    print(f"{S} frames of {H} x {W}, {len(os.sched_getaffinity(0))} cores")
    with tempfile.TemporaryDirectory() as folder:
        path = clip().save(Path(folder) / "predictions.npz")
        start = time.perf_counter()
        prediction, frames = load_folder(path, FIELDS)
        read = time.perf_counter()
        with Page(prediction, frames, ViewOptions()) as page:
            built = time.perf_counter()
            points = [len(node.points) for node in page.points.moving.pages.values()]
            print(f"read                  {read - start:6.2f} s, {path.stat().st_size / 1e6:.0f} MB")
            print(f"scene built           {built - read:6.2f} s, {len(page.points.static.points)} static and {sum(points)} moving points")
            start = time.perf_counter()
            for _ in range(S):
                page.controls.advance()
                page.refresh()
            print(f"a step in time        {(time.perf_counter() - start) / S * 1e3:6.1f} ms in Python")
            start = time.perf_counter()
            saved = save_html(page, Path(folder) / "scene.html", 10)
            print(f"saved                 {time.perf_counter() - start:6.2f} s, {saved.stat().st_size / 1e6:.0f} MB")
            page.controls.frame.value = 0
            if shutil.which("chromium"):
                in_browser(page)


if __name__ == "__main__":
    main()
