"""The scene as one HTML file that needs no Python."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..files import AtomicFiles, check_writable
from .page import Page


def check_html(path: Path) -> None:
    """InputError unless the path ends in .html and can be written."""
    if path.suffix.lower() != ".html":
        raise InputError(f"the scene is saved as one HTML file, so {str(path)!r} must end in .html")
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder: give the name of a file")
    check_writable(path.parent)


def save_html(page: Page, path: Path, fps: float) -> Path:
    """Write the scene of a page, with its frames one after the other as an animation that repeats. Returns the path.

    The file holds viser's client and all data. It has a bar to play and to go to any time, but not the panel of the page.

    Args:
        page: what its controls say is saved. Its frame is the last one afterwards.
        fps: frames per second of the animation.
    """
    count = page.controls.count
    if count > 1:
        page.controls.frame.value = 0
    page.refresh()
    recording = page.server.get_scene_serializer()
    for i in range(count if count > 1 else 0):
        page.controls.frame.value = i
        page.refresh()
        recording.insert_sleep(1 / fps)
    html = recording.as_html()
    with AtomicFiles() as files:
        files.add(path).write_text(html, encoding="utf-8")
    return path
