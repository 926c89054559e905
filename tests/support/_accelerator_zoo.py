"""What the slow run adds: all other models of the zoo, graphs of models, eager training steps."""

from functools import partial

from _accelerator_chains import EAGER, Case
from _accelerator_overrides import FIRST, GRAPHS, run
from _zoo import ZOO

CASES: dict[str, Case] = {
    **EAGER,
    **GRAPHS,
    **{name: partial(run, case) for name, case in ZOO.items() if name not in FIRST},
}
