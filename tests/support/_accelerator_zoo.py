"""All other models of the zoo on the fake accelerator: for the slow run."""

from functools import partial

from _accelerator_chains import Case
from _accelerator_overrides import FIRST, run
from _zoo import ZOO

CASES: dict[str, Case] = {
    name: partial(run, case) for name, case in ZOO.items() if name not in FIRST
}
