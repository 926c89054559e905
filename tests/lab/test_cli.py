"""The command line before it does any work."""

import pytest

from _lab import process

HEAVY = {
    *("torch", "torchvision", "numpy", "pandas", "sklearn", "matplotlib", "optuna", "sqlalchemy"),
    *("rich", "jinja2"),
}
ANSWERS = {
    "--help": 0,
    "--version": 0,
    "trian": 2,
    "train --help": 0,
    "train --epoch 3": 2,
    "train --leraning-rate 3": 2,
    "train --epochs x": 2,
    "find-lr --help": 0,
    "find-lr --lwo 1": 2,
    "demo --help": 0,
    "demo --stps 3": 2,
    "stats --help": 0,
    "stats --metrc accuracy": 2,
    "sweep --help": 0,
    "sweep --gird seed=0": 2,
    "report --help": 0,
    "report --uot here": 2,
    "runs --help": 0,
    "runs --jsno": 2,
    "runs nowhere": 2,
}
"""Command lines that are answered at once, and their exit codes."""


@pytest.mark.parametrize("typed", ANSWERS)
def test_help_and_a_typo_import_nothing_heavy(typed):
    code = f"""
import runpy, sys
code = 0
try:
    runpy.run_module("gradfilter", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    code = stop.code or 0
print(code, *({HEAVY} & {{*sys.modules}}))
"""
    done = process(code, *typed.split())
    assert done.stdout.splitlines()[-1] == str(ANSWERS[typed]), (done.stdout, done.stderr)
