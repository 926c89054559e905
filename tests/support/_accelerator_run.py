"""Run cases on the fake accelerator, in a process of its own; print one line of JSON for each.

python tests/support/_accelerator_run.py chains
python tests/support/_accelerator_run.py plans "lstm fused"      (one case, with its traceback)
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

from _accelerator import Accelerator, register

AREAS = ("chains", "plans", "overrides", "hosts", "mutations", "zoo")
LINES = 6  # of a traceback


def cases_of(area):
    """Return the cases of an area by name."""
    return importlib.import_module(f"_accelerator_{area}").CASES


def found(case, accelerator):
    """Run a case, and return the text of its error or None."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a plan that falls back would hide what it could not do
        warnings.filterwarnings("ignore", "There is a performance drop")
        # Where storage is compared, fake tensors have none: they look as if they shared it.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        try:
            with accelerator:
                case(accelerator)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [f for f in frames if "torch" not in Path(f.filename).parts][-LINES:]
            places = "".join(f"\n  {f.filename}:{f.lineno}: {f.line}" for f in reversed(own))
            return f"{type(error).__name__}: {error}{places}"
    return None


def main(area, *names):
    """Run the cases of an area, or those named."""
    register()
    accelerator = Accelerator()
    cases = cases_of(area)
    for name in names or cases:
        start = time.process_time()
        line = {"case": name, "error": found(cases[name], accelerator)}
        print(json.dumps({**line, "seconds": time.process_time() - start}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
