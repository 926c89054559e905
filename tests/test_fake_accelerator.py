"""Everything stays on its device and waits for no number: on an accelerator that has none.

The device is registered for a whole process, so the cases run in processes of their own, some
cases of an area in each, whose results their tests share. `tests/support/_accelerator_run.py` runs
single cases.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock  # torch needs it too

import _accelerator
import _accelerator_run as run

pytestmark = pytest.mark.skipif(
    _accelerator.missing() is not None, reason=str(_accelerator.missing())
)
SCRIPT = Path(run.__file__)
SOURCE = Path(__file__).parents[1] / "src"


def is_slow(area, name):
    """Whether the everyday run omits a case: the zoo, and a second graph of one transform."""
    again = area == "chains" and name.endswith(" graph") and not name.endswith("-0 graph")
    return area == "zoo" or again


def cases():
    for area in run.AREAS:
        for name in run.cases_of(area):
            marks = [pytest.mark.slow] * is_slow(area, name)
            yield pytest.param(area, name, id=f"{area}: {name}", marks=marks)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder that the workers of a parallel run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


PART = 60  # cases of a process, so that two workers have something to do at the same time


def error_of(area, name, folder):
    """Return the error of a case or None; its neighbours run with it, once for all workers."""
    slow = is_slow(area, name)
    names = [other for other in run.cases_of(area) if is_slow(area, other) == slow]
    part = names.index(name) // PART
    found = folder / f"accelerator-{area}-{slow}-{part}.json"
    with FileLock(f"{found}.lock"):
        if not found.exists():
            errors = run_cases(area, names[part * PART : (part + 1) * PART])
            found.write_text(json.dumps(errors))
    return json.loads(found.read_text())[name]


def run_cases(area, names):
    """Run cases in a process of their own; what ends the process is the error of its last cases."""
    places = [str(SCRIPT.parent), str(SOURCE), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), area, *names],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    errors = {line["case"]: line["error"] for line in lines}
    died = f"The process ended with {done.returncode} before this case:\n{done.stderr[-3000:]}"
    return {**dict.fromkeys(names, died), **errors}


@pytest.mark.parametrize(("area", "name"), [*cases()])
def test_on_an_accelerator_without_numbers(area, name, folder):
    error = error_of(area, name, folder)
    if error is not None:
        pytest.fail(error, pytrace=False)
