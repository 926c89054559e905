"""A release: sdist and wheel are built, are complete, and can be installed."""

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import gradfilter as gf

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, **options):
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel made from it, as for a release."""
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_the_packages_are_as_an_index_wants_them(built):
    assert run("-m", "twine", "check", "--strict", *built).count("PASSED") == 2


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(built):
    source = ROOT / "src"
    files = {
        path.relative_to(source).as_posix()
        for path in (source / "gradfilter").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(built[1]) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == files


def test_the_sdist_has_what_its_own_tests_need(built):
    with tarfile.open(built[0]) as sdist:
        packed = {name.split("/", 1)[1] for name in sdist.getnames()}
    tracked = ["tests", "benchmarks", "docs", "examples", "notebooks"]
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in tracked
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".md", ".ipynb", ".json", ".svg", ".png")
        and not {"__pycache__", ".ipynb_checkpoints"} & {*path.parts}
    }
    assert wanted <= packed
    wanted = {"README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "pyproject.toml"}
    assert wanted | {"conftest.py"} <= packed


def test_the_version_comes_from_one_place(built):
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Version"] == gf.__version__
    elsewhere = [
        path.relative_to(ROOT).as_posix()
        for path in (*ROOT.glob("*.*"), *(ROOT / "src").rglob("*.py"))
        if path.is_file()
        and re.search(rf"version[_\W]+{re.escape(gf.__version__)}\b", path.read_text())
    ]
    assert elsewhere == ["src/gradfilter/__init__.py"]


def test_the_oldest_torch_of_ci_is_the_lower_bound_of_the_project():
    constraints = dict(
        line.split("==")
        for line in (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
        if "==" in line
    )
    extras = PROJECT["optional-dependencies"]
    assert f"torch>={constraints['torch'].removesuffix('.*')}" in PROJECT["dependencies"]
    for extra in ("lab", "interop", "bench"):
        assert f"torchvision>={constraints['torchvision'].removesuffix('.*')}" in extras[extra]


def test_the_gate_tests_the_oldest_torch_too():
    gate = (ROOT / ".ci" / "run").read_text()
    (install,) = re.findall(r"PIP_CONSTRAINT=.ci/oldest.txt pip install .*", gate)
    tests = re.findall(r"(?:tests|src/gradfilter)/\S+", gate.split(install)[1])
    assert all((ROOT / test).exists() for test in tests)
    tested = {test.split("/")[1] for test in tests if test.startswith("tests/")}
    assert tested == {"grads", "interop", "distributed", "transforms"}
    assert "tests/transforms/test_conformance.py" in tests


def test_github_runs_the_gate_on_linux_and_macos_with_the_oldest_and_the_newest_torch():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["gate"]
    matrix = job["strategy"]["matrix"]
    assert matrix["os"] == ["ubuntu-latest", "macos-latest"]
    constraint = {entry["torch"]: entry["constraint"] for entry in matrix["include"]}
    assert constraint == {"oldest": ".ci/oldest.txt", "newest": ""}
    assert job["steps"][-1] == {"run": ".ci/run"}
    oldest = next(e["python"] for e in matrix["include"] if e["torch"] == "oldest")
    assert PROJECT["requires-python"] == f">={oldest}"


def test_what_the_gate_leaves_out_runs_every_night_under_both_torches():
    nightly = (ROOT / ".ci" / "nightly").read_text()
    newest, oldest = nightly.split("PIP_CONSTRAINT=.ci/oldest.txt")
    assert "pytest -n auto -m slow\n" in newest
    assert 'pytest -n auto -m "slow or not slow"\n' in oldest
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())
    assert workflow["jobs"]["nightly"]["steps"][-1] == {"run": ".ci/nightly"}


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=["sdist", "wheel"])
def test_what_is_built_installs_and_runs_the_demo(which, built, tmp_path):
    target = tmp_path / "installed"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run("-m", "pip", "install", *options, "--target", target, built[which])
    # The folder comes first on the path, before the checkout that the tests import.
    environment = {**os.environ, "PYTHONPATH": str(target)}
    where = run(
        "-c", "import gradfilter; print(gradfilter.__file__)", cwd=tmp_path, env=environment
    )
    assert where.startswith(str(target))
    demo = ("-m", "gradfilter", "demo", "--steps", "20", "--out", "demo")
    assert "consensus" in run(*demo, cwd=tmp_path, env=environment)
    assert list((tmp_path / "demo").rglob("*.png"))
