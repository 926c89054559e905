"""The types that a user's type checker finds: pyright in strict mode, on two scripts here."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import gradfilter as gf

HERE = Path(__file__).parent
SCRIPT, MISTAKES = HERE / "user_script.py", HERE / "user_mistakes.py"


PARENTS = ("torch", "lightning", "transformers")  # packages whose classes ours are made from


@pytest.fixture(scope="module")
def found():
    """Return the diagnostics of pyright, by file and line."""
    source = str(Path(gf.__file__).parents[1])
    options = ["--outputjson", "--project", str(HERE), "--pythonpath", sys.executable]
    run = subprocess.run(
        [sys.executable, "-m", "pyright", *options],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr
    said = defaultdict(lambda: defaultdict(list))
    for entry in json.loads(run.stdout)["generalDiagnostics"]:
        line = entry["range"]["start"]["line"]
        said[Path(entry["file"]).name][line].append(entry)
    return said


def comments(path, pattern):
    """The expectations that a script writes behind its lines."""
    lines = enumerate(path.read_text().splitlines())
    return {number: match[1] for number, line in lines if (match := re.search(pattern, line))}


def test_a_script_has_no_fault_in_strict_mode(found):
    entries = [entry for line in found[SCRIPT.name].values() for entry in line]
    assert [entry for entry in entries if entry["severity"] != "information"] == []


def test_the_types_are_those_that_the_script_expects(found):
    revealed = {
        line: re.search(r'is "(.*)"$', entry["message"])[1]
        for line, entries in found[SCRIPT.name].items()
        for entry in entries
    }
    expected = comments(SCRIPT, r"reveal_type\(.*\)  # (.*)$")
    assert len(expected) > 20
    assert revealed == expected


def test_mistakes_are_found(found):
    # The names of the rules are pyright's and change with it; the lines do not.
    expected = comments(MISTAKES, r"  # error: (.*)$")
    assert len(expected) > 5
    assert found[MISTAKES.name].keys() == expected.keys()


def test_the_script_runs(capsys):
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed, revealed = capsys.readouterr()
    assert len(re.findall(r"^\d \{.*'agree_filter/accepted': ", printed, re.MULTILINE)) == 3
    assert printed.count("'aux/accuracy': ") == 2
    assert len(revealed.splitlines()) > 20  # at run time reveal_type prints, too


@pytest.mark.slow
def test_every_public_symbol_has_a_known_type(tmp_path):
    """Pyright's own measure for packages with `py.typed`; it reads installed packages only."""
    installed = tmp_path / "site-packages"
    shutil.copytree(Path(gf.__file__).parent, installed / "gradfilter")
    for name in PARENTS:
        package = pytest.importorskip(name)
        (installed / name).symlink_to(Path(package.__file__).parent)
    options = ["--outputjson", "--pythonpath", sys.executable, "--ignoreexternal"]
    run = subprocess.run(
        [sys.executable, "-m", "pyright", *options, "--verifytypes", "gradfilter"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    symbols = json.loads(run.stdout)["typeCompleteness"]["symbols"]
    assert len(symbols) > 400
    assert [symbol["name"] for symbol in symbols if not symbol["isTypeKnown"]] == []
