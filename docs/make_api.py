"""Write docs/api.md from the docstrings: `python docs/make_api.py`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import page4d
import page4d.pipeline
import page4d_kernels

HEAD = """# API

The public names of `page4d`, `page4d.pipeline` and `page4d_kernels`, from their docstrings. `python docs/make_api.py` writes this page.
"""


def signature(name: str, thing: Any) -> str:
    """As it is called: without quotes around annotations, and without the class that a class method gets."""
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(thing)))
    return f"{name}{text}".replace("torch.Tensor", "Tensor").replace("(cls, ", "(")


def block(text: str | None, language: str = "text") -> str:
    return f"\n```{language}\n{inspect.cleandoc(text)}\n```\n" if text else ""


def fields(cls: type) -> str:
    """The fields of a dataclass as its source has them, with types, defaults and comments."""
    if not dataclasses.is_dataclass(cls):
        return ""
    source = textwrap.dedent(inspect.getsource(cls))
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    lines = source.splitlines()
    kept = [line for node in definition.body if isinstance(node, ast.AnnAssign) for line in lines[node.lineno - 1 : node.end_lineno]]
    return block("\n".join(kept), "python")


def members(cls: type) -> str:
    """Public methods and properties that are defined in the class itself."""
    defaults = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    found = []
    for name, member in vars(cls).items():
        if name.startswith("_") or name in defaults:
            continue
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if isinstance(member, property):
            found.append(f"\n#### `{cls.__name__}.{name}`\n" + block(member.__doc__))
        elif inspect.isfunction(function):
            found.append(f"\n#### `{signature(f'{cls.__name__}.{name}', function)}`\n" + block(function.__doc__))
    return "".join(found)


def entry(name: str, thing: Any) -> str:
    if inspect.isclass(thing):
        return f"\n### class `{name}`\n" + block(thing.__doc__) + fields(thing) + members(thing)
    if callable(thing):
        return f"\n### `{signature(name, thing)}`\n" + block(thing.__doc__)
    return f"\n### `{name}`\n" + (f"\nOne of: {', '.join(thing)}\n" if isinstance(thing, dict) else "")


def page(modules: tuple[ModuleType, ...] = (page4d, page4d.pipeline, page4d_kernels)) -> str:
    parts = [HEAD]
    for module in modules:
        parts.append(f"\n## {module.__name__}\n\n{inspect.cleandoc(module.__doc__ or '')}\n")
        parts += [entry(name, getattr(module, name)) for name in sorted(module.__all__) if not name.startswith("__")]
    return "".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "api.md").write_text(page())
