"""Imports inside page4d go down only, from floor to floor, and never round in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# from top to bottom; the names of one line share a floor, and do not import each other unless they are the same room
FLOORS = [
    {"cli", "__main__"},
    {"pipeline"},
    {"training", "evaluation", "viewer"},
    {"export", "long_video"},
    {"model"},
    {"data", "execution"},
    {"layers", "prediction"},
    {"config", "files", "system"},
    {"errors", "geometry"},
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted((ROOT / "page4d").rglob("*.py"))}


def room(module: str) -> str:
    """The first part below page4d. A `__main__` belongs to the command line, wherever it lies."""
    parts = module.split(".")
    return "__main__" if parts[-1] == "__main__" else parts[1] if len(parts) > 1 else "__init__"


def floor(module: str) -> int:
    """Its index in FLOORS. The package itself imports the model, so it lies above the rest."""
    return -1 if module == "page4d" else next(i for i, rooms in enumerate(FLOORS) if room(module) in rooms)


def imports(module: str, source: str | None = None, everywhere: bool = True) -> set[str]:
    """The modules of page4d that a module imports. `everywhere`: in functions and for type checkers as well."""
    path = MODULES[module]
    tree = ast.parse(path.read_text() if source is None else source)
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "page4d"}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            if target.split(".")[0] == "page4d":
                submodules = {f"{target}.{alias.name}" for alias in node.names if (target, alias.name) != ("page4d", "__version__")}
                found |= submodules and (submodules & MODULES.keys() or {target})
    return found


def test_every_module_has_a_floor():
    homeless = [module for module in MODULES if room(module) not in set().union(*FLOORS) | {"__init__"}]
    assert not homeless, f"{homeless}: name their room in FLOORS"


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) != "__init__"])
def test_imports_go_down(module):
    for target in imports(module):
        steps_up = floor(target) < floor(module) or (floor(target) == floor(module) and room(target) != room(module))
        assert not steps_up or {room(module), room(target)} <= FLOORS[0], f"{module} imports {target}, which is on a higher floor"


def test_a_step_up_is_seen():
    assert imports("page4d.layers.block", "from ..model import Page4D") == {"page4d.model"}
    assert imports("page4d.layers.block", "from .. import Page4D") == imports("page4d.layers.block", "import page4d") == {"page4d"}
    assert imports("page4d.cli.main", "from .. import __version__") == set()
    assert floor("page4d.model") < floor("page4d.layers.block")
    assert imports("page4d.model.page4d", "def f():\n    from ..cli.main import main") == {"page4d.cli.main"}


def test_no_module_imports_itself_in_a_circle():
    """At module level. A package's __init__ imports its modules, so it counts as a part of the package."""
    graph = {module: imports(module, everywhere=False) - {"page4d"} for module in MODULES if module != "page4d"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_the_model_and_its_checkpoint_reader_do_not_know_each_other_at_module_level():
    assert "page4d.model.checkpoint" not in imports("page4d.model.page4d", everywhere=False)
    assert not {"page4d.model.page4d", "page4d.model"} & imports("page4d.model.checkpoint")


def test_the_kernels_do_not_know_the_model():
    for path in (ROOT / "page4d_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.split(".")[0] == "page4d" for name in names), f"{path} imports page4d"
