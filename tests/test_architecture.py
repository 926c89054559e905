"""The house as it is drawn: who may import whom, and what every public name carries."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import gradfilter as gf
from gradfilter import diagnostics, distributed, interop, testing

SOURCE = Path(gf.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# Imports point to the left only.
FLOORS = [
    *("core", "grads", "diagnostics", "transforms", "testing", "distributed", "interop", "lab")
]
PUBLIC = {
    name: thing
    for package in (gf, diagnostics, interop, distributed, testing)
    for name, thing in vars(package).items()
    if callable(thing) and not name.startswith("_")
}
# What users do not call by name is shown where it is made.
NOT_CALLED = {
    *("Transform", "GradStack", "TrainStep", "ema_of"),
    *("InputCurvature", "HessianTop", "HessianTrace", "OperatorNorm", "NoiseScale"),
}
# Imported when they are first asked for.
LAZY = {"_lightning.py": {"lightning"}, "_trainer.py": {"transformers"}}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(dotted):
    parts = dotted.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 and parts[1] in FLOORS else 0


def test_imports_point_one_way():
    for path in FILES:
        if path.name in ("__init__.py", "__main__.py"):
            continue
        own = floor(".".join(("gradfilter", *path.relative_to(SOURCE).parts)))
        for name in imports(path):
            if name.startswith("gradfilter"):
                assert floor(name) <= own, f"{path.name} imports {name}"


def test_the_core_needs_torch_and_einops_only():
    allowed = {"torch", "einops", "gradfilter", *sys.stdlib_module_names}
    for path in FILES:
        if "lab" not in path.relative_to(SOURCE).parts:
            found = {name.split(".")[0] for name in imports(path)}
            found -= LAZY.get(path.name, set())
            assert found <= allowed, f"{path.name} imports {found - allowed}"


def test_frameworks_are_imported_only_when_asked_for():
    loaded = "import sys, gradfilter.interop; print({'lightning', 'transformers'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_only_tree_touches_pytree():
    users = [p.name for p in FILES if any("pytree" in name for name in imports(p))]
    assert users == ["_tree.py"]


def test_modules_are_private_and_short():
    for path in FILES:
        assert path.name.startswith("_"), path
        assert len(path.read_text().splitlines()) <= 400, path


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring_with_an_example(name):
    documentation = inspect.getdoc(PUBLIC[name])
    assert documentation and len(documentation.splitlines()[0]) <= 100
    if name not in NOT_CALLED:
        assert ">>>" in documentation
