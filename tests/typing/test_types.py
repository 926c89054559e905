"""The types that a user's type checker finds: pyright in strict mode, on two scripts here."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import gradfilter as gf

HERE = Path(__file__).parent
SCRIPT, MISTAKES = HERE / "user_script.py", HERE / "user_mistakes.py"


@pytest.fixture(scope="module")
def found():
    """What pyright says, by file and line."""
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
