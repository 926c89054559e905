"""Everything stays on its device and waits for no number: on an accelerator that has none.

The device is registered for a whole process, so every area of cases runs in one of its own, whose
results all tests of the area share. `tests/support/_accelerator_run.py` runs single cases.
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


def cases():
    for area in run.AREAS:
        for name in run.cases_of(area):
            marks = [pytest.mark.slow] if area == "zoo" else []
            yield pytest.param(area, name, id=f"{area}: {name}", marks=marks)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder that the workers of a parallel run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def errors_of(area, folder):
    """Run the cases of an area, once for all workers, and return the error of each or None."""
    found = folder / f"accelerator-{area}.json"
    with FileLock(f"{found}.lock"):
        if not found.exists():
            found.write_text(json.dumps(run_area(area)))
    return json.loads(found.read_text())


def run_area(area):
    """Run an area in a process of its own; what ends the process is the error of its last cases."""
    places = [str(SCRIPT.parent), str(SOURCE), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), area],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    errors = {line["case"]: line["error"] for line in lines}
    died = f"The process ended with {done.returncode} before this case:\n{done.stderr[-3000:]}"
    return {**dict.fromkeys(run.cases_of(area), died), **errors}


@pytest.mark.parametrize(("area", "name"), [*cases()])
def test_on_an_accelerator_without_numbers(area, name, folder):
    error = errors_of(area, folder)[name]
    if error is not None:
        pytest.fail(error, pytrace=False)
