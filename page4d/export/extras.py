"""Packages that only some formats need. They are imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import InputError

EXTRAS = {"trimesh": "export", "OpenEXR": "export", "rerun": "rerun", "viser": "viewer"}  # import name -> extra of page4d


def need(package: str, purpose: str) -> Any:
    """The module `package`. InputError of one line that names the extra if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        problem = (
            "is not installed" if isinstance(error, ModuleNotFoundError) and error.name == package else f"cannot be imported ({error})"
        )
        raise InputError(f"{purpose} need the package {package!r}, which {problem}: pip install 'page4d[{EXTRAS[package]}]'") from error
