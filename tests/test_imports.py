"""The house's rule: cluster -> tune_spaces -> training -> data_shards, and one place for each big library."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINE = ("cluster", "tune_spaces", "training", "data_shards")  # each may import those to its right
PLACES = {  # the files, or the packages, that may import a library
    "webdataset": ("data_shards/",),
    "deepspeed": ("training/engines/deepspeed.py",),
    "wandb": ("training/wandb_log.py",),
    "ray": ("cluster/",),
    "ray.tune": ("cluster/", "tune_spaces/"),
}


def wrong_imports(root: Path) -> Iterator[str]:
    for path in sorted(file for package in LINE for file in (root / package).rglob("*.py")):
        where = path.relative_to(root).as_posix()
        package = where.partition("/")[0]
        for line, module in imports(ast.parse(path.read_text(encoding="utf-8")), package):
            top = module.partition(".")[0]
            if top == "tests" or (top in LINE and LINE.index(top) < LINE.index(package)):
                yield f"{where}:{line} imports {module}, which is to its left"
            library = "ray.tune" if f"{module}.".startswith("ray.tune.") else top
            if not where.startswith(PLACES.get(library, ("",))):
                yield f"{where}:{line} imports {module}, whose place is {' and '.join(PLACES[library])}"


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, inside functions and by `import_module` too; a relative one stays inside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module or ''}" if node.level else node.module or ""
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
              and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__")):
            yield node.lineno, str(node.args[0].value)


def test_imports_point_one_way() -> None:
    assert not list(wrong_imports(ROOT))


@pytest.mark.parametrize(("file", "source"), [
    ("data_shards/errors.py", "import training.config"),
    ("training/schedule.py", "def f():\n    from cluster.session import ray_session"),
    ("training/schedule.py", "from tune_spaces import domains"),
    ("training/schedule.py", "import importlib\nimportlib.import_module('cluster.cli')"),
    ("cluster/cli.py", "from tests import conftest"),
    ("training/loop.py", "import webdataset as wds"),
    ("training/engines/torch.py", "def f():\n    import deepspeed.runtime"),
    ("training/loop.py", "from wandb import init"),
    ("training/loop.py", "from ray import train"),
    ("tune_spaces/planted.py", "import ray"),
    ("tune_spaces/planted.py", "from ray import train"),
])
def test_a_planted_wrong_import_is_found(tmp_path: Path, file: str, source: str) -> None:
    for package in LINE:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / file).write_text(source)
    assert [found for found in wrong_imports(tmp_path) if found.startswith(file)]


def test_tune_spaces_may_use_ray_tune(tmp_path: Path) -> None:
    (tmp_path / "tune_spaces").mkdir()
    source = "import ray.tune\nfrom ray import tune\nfrom ray.tune import search"
    (tmp_path / "tune_spaces" / "space.py").write_text(source)
    assert not list(wrong_imports(tmp_path))
