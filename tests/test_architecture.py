"""The import rules of the package, read from its source."""

import ast
from pathlib import Path

import pytest

import lightning_bcd

PACKAGE = Path(lightning_bcd.__file__).parent
FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
# A file imports lower levels only, its own only inside its folder. Pure torch up to 2, lightning from 3 on.
TABLE = [
    "linesearch blocks prox strategy communicator gram full_batch",
    "linalg scored_strategy probe prefix optim compiling checkpointing",
    "lifted report memory coordinator expansion distributed scheduler",
    "compatibility schedules tracking window distributed.strategy",
    "ranks lifted.evaluation",
    "lifted.module",
    "callback sweep lifted.growth",
    "module models datamodules graphs comparison",
    "plotting demo __init__",
    "cli",
]
LEVELS = {name: level for level, names in enumerate(TABLE) for name in names.split()}
DRAWS = {"tracking.py", "comparison.py", "demo.py"}  # may import plotting inside functions


def level_of(name):
    """Level of the longest known part of a dotted name; what is in no file is a name of `__init__`."""
    parts = name.split(".")
    known = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return LEVELS[next((part for part in known if part in LEVELS), "__init__")]


def imports(file, node=None, place="module"):
    """Yield (dotted name, "module" | "function" | "typing") for every import of a file."""
    for child in ast.iter_child_nodes(node or ast.parse((PACKAGE / file).read_text())):
        if isinstance(child, ast.Import):
            yield from ((alias.name, place) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{file}: relative import"
            yield from ((f"{child.module}.{alias.name}", place) for alias in child.names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(file, child, "function")
        else:
            typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from imports(file, child, "typing" if typing else place)


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_what_its_level_allows(file):
    here = file.removesuffix(".py").replace("/", ".")
    folder = here.rpartition(".")[0]
    assert here in LEVELS or folder in LEVELS, f"give {file} a level"
    level = level_of(here)
    for name, place in imports(file):
        message = f"{file} (level {level}) imports {name} ({place})"
        top, _, rest = name.partition(".")
        if top == "lightning_bcd":
            drawing = rest.startswith("plotting.") and file in DRAWS and place == "function"
            inside = bool(folder) and rest.startswith(f"{folder}.")
            assert drawing or inside or level_of(rest) < level, message
        if top in {"lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics"}:
            assert level >= 3, message
            assert top == "torchmetrics" or name.startswith("lightning.pytorch."), message
        if top == "matplotlib":
            assert file == "plotting.py" or place == "typing", message
        if top == "jsonargparse" or name.startswith("lightning.pytorch.cli"):
            assert file == "cli.py", message


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_short_and_named_after_what_it_holds(file):
    assert len((PACKAGE / file).read_text().splitlines()) <= 400
    assert Path(file).stem not in {"utils", "helpers", "common"}


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith("__init__.py")])
def test_init_files_hold_imports_and_names_only(file):
    for node in ast.parse((PACKAGE / file).read_text()).body[1:]:  # after the docstring
        names = [ast.unparse(target) for target in getattr(node, "targets", [])]
        assert isinstance(node, ast.Import | ast.ImportFrom) or names in (["__all__"], ["__version__"])


def test_every_public_name_exists():
    assert all(hasattr(lightning_bcd, name) for name in lightning_bcd.__all__)
