"""Where the page is served, and whether a browser can be opened."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

from ..errors import InputError
from ..export.extras import need

TRIED = 100  # ports


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what viser prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def start_server(host: str, port: int) -> Any:
    """viser's server at the first free port from `port` on. InputError if viser is missing, or if it cannot listen there."""
    viser = need("viser", "the viewer and its files")
    free = free_port(host, port)
    with quiet():
        server = viser.ViserServer(host, free, label="page4d", verbose=False)
    server.gui.configure_theme(control_width="medium", show_logo=False, show_share_button=False)  # sharing would send the scene elsewhere
    return server


def free_port(host: str, port: int) -> int:
    """The first port from `port` on that nobody listens at. InputError if there is none, or if the address is not of this machine."""
    for candidate in range(port, min(port + TRIED, 65536)):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            with socket.socket(family, kind, protocol) as probe:
                if os.name == "posix":  # as servers do there: a connection that has just ended does not block the port
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return candidate
        except (OSError, UnicodeError) as error:
            if getattr(error, "errno", None) not in (errno.EADDRINUSE, errno.EACCES):
                raise InputError(f"cannot serve at the address {host!r} ({error}): give another --host, such as 127.0.0.1") from error
    raise InputError(f"no port from {port} to {min(port + TRIED, 65536) - 1} is free: give another --port")


def page_address(host: str, port: int) -> str:
    """What to type into a browser on this machine. A server at 0.0.0.0 is also reached at the other addresses of the machine."""
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '', '::') else f'[{host}]' if ':' in host else host}:{port}"


def has_browser() -> bool:
    """Whether there is a screen that a browser could open on."""
    if sys.platform in ("win32", "darwin"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
