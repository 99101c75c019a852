"""Write docs/api.md from the docstrings: `python docs/make_api.py`."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import page4d
import page4d_kernels

HEAD = """# API

The public names of `page4d` and `page4d_kernels`, from their docstrings. `python docs/make_api.py` writes this page.
"""


def signature(name: str, thing: Any) -> str:
    return f"{name}{inspect.signature(thing)}".replace("torch.Tensor", "Tensor").replace("'", "")


def block(text: str | None) -> str:
    return f"\n```text\n{inspect.cleandoc(text)}\n```\n" if text else ""


def members(cls: type) -> str:
    """Public methods and properties that are defined in the class itself."""
    found = []
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if isinstance(member, property):
            found.append(f"\n#### `{cls.__name__}.{name}`\n" + block(member.__doc__))
        elif inspect.isfunction(function):
            found.append(f"\n#### `{signature(f'{cls.__name__}.{name}', function)}`\n" + block(function.__doc__))
    return "".join(found)


def entry(name: str, thing: Any) -> str:
    if inspect.isclass(thing):
        fields = ", ".join(field.name for field in dataclasses.fields(thing)) if dataclasses.is_dataclass(thing) else ""
        return f"\n### class `{name}`\n" + block(thing.__doc__) + (f"\nFields: {fields}\n" if fields else "") + members(thing)
    if callable(thing):
        return f"\n### `{signature(name, thing)}`\n" + block(thing.__doc__)
    return f"\n### `{name}`\n" + (f"\nOne of: {', '.join(thing)}\n" if isinstance(thing, dict) else "")


def page(modules: tuple[ModuleType, ...] = (page4d, page4d_kernels)) -> str:
    parts = [HEAD]
    for module in modules:
        parts.append(f"\n## {module.__name__}\n\n{inspect.cleandoc(module.__doc__ or '')}\n")
        parts += [entry(name, getattr(module, name)) for name in sorted(module.__all__) if not name.startswith("__")]
    return "".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "api.md").write_text(page())
