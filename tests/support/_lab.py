"""Helpers for tests of the command line."""

import contextlib
import io
import json
import os
import subprocess
import sys

from gradfilter.lab._cli import main

CLOCKS = ("seconds", "samples_per_second", "peak_memory")


def command(*args):
    """Run a command line in this process; return exit code, stdout and stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def refused(*args):
    """Return the one line on stderr after a bad value."""
    code, out, err = command(*args)
    assert (code, out) == (2, ""), (code, out, err)
    assert err == err.rstrip() + "\n" and err.count("\n") == 1, err
    return err


def metrics(folder):
    """Read the lines of metrics.jsonl; refuse NaN and Infinity, which are not JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def numbers(line):
    """Return the entries that do not depend on clocks."""
    return {key: value for key, value in line.items() if key not in CLOCKS}


def config(folder):
    return json.loads((folder / "config.json").read_text())


def only_run(folder):
    """Return the one run directory below a folder."""
    (found,) = folder.rglob("metrics.jsonl")
    return found.parent


def process(code, *args, **options):
    """Start a Python process with one thread that runs ``code``."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
        **options,
    )
