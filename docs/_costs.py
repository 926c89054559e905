"""Write the table of costs in `docs/choosing.md` from what each transform asks of its rows.

python docs/_costs.py        # writes the lines between the two marks
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gradfilter as gf
from gradfilter import _tree
from gradfilter._state_rules import Observing
from gradfilter._types import Context, Transform, Tree
from gradfilter.grads._stack import GradStack
from gradfilter.testing._laws import make_params, make_rows, make_stack
from gradfilter.transforms._reducers import mean_weights

PAGE = Path(__file__).parent / "choosing.md"
BEGIN, END = "<!-- costs: begin -->", "<!-- costs: end -->"
FEW, MANY = 8, 64
LR = gf.schedules.constant(0.1)
QUESTIONS = {
    "gram": "Gram",
    "leaf_grams": "Gram of every leaf",
    "sq_norms": "norms",
    "dot": "`dot`",
    "combine": "`combine`",
    "combine_leaves": "`combine` of every leaf",
    "sum_squares": "squares",
    "reduce_columns": "columns in blocks",
    "stacked": "**all rows**",
}
PASSES = ("at", "at_rows", "along")


class AskedRows(GradStack):
    """Rows that count the questions they are asked, their parts' with them."""

    def __init__(self, inner: GradStack, asked: Counter[str]) -> None:
        self.inner, self.asked = inner, asked
        self.losses, self.buffers, self.aux = inner.losses, inner.buffers, inner.aux

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return self.inner.shapes

    @property
    def live(self) -> Tensor:
        return self.inner.live

    def _counted(self, name: str, *given: Any) -> Any:
        self.asked[name] += 1
        return getattr(self.inner, name)(*given)

    def _again(self, name: str, *given: Any) -> AskedRows:
        self.asked[name] += name in PASSES
        return AskedRows(getattr(self.inner, name)(*given), self.asked)

    def gram(self) -> Tensor:
        return self._counted("gram")

    def leaf_grams(self) -> Tree:
        return self._counted("leaf_grams")

    def combine(self, weights: Tensor) -> Tree:
        return self._counted("combine", weights)

    def combine_leaves(self, weights: Mapping[str, Tensor]) -> Tree:
        return self._counted("combine_leaves", weights)

    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        return self._counted("dot", tree)

    def sq_norms(self) -> Tensor:
        return self._counted("sq_norms")

    def sum_squares(self, weights: Tensor) -> Tree:
        return self._counted("sum_squares", weights)

    def reduce_columns(self, function: Callable[[Tensor], Tensor]) -> Tree:
        return self._counted("reduce_columns", function)

    def stacked(self) -> Tree:
        return self._counted("stacked")

    def scaled(self, factors: Tensor) -> GradStack:
        return self._again("scaled", factors)

    def columns(self, names: Collection[str]) -> GradStack:
        return self._again("columns", names)

    def first(self, count: int) -> GradStack:
        return self._again("first", count)

    def like(self, stack: GradStack) -> GradStack:
        return self._again("like", stack)

    def at(self, params: Mapping[str, Tensor]) -> GradStack:
        return self._again("at", params)

    def at_rows(self, params: Tree) -> GradStack:
        return self._again("at_rows", params)

    def along(self, factors: Tensor) -> GradStack:
        return self._again("along", factors)

    def _points(self, factors: Tensor) -> Tree:
        return self.inner._points(factors)

    def gram_is_cheap(self) -> bool:
        return self.inner.gram_is_cheap()

    def release(self) -> None:
        self.inner.release()


SHOWN: dict[str, Callable[[], Transform]] = {
    "finite_filter()": gf.finite_filter,
    "outlier_filter()": gf.outlier_filter,
    "trim_losses(0.2)": lambda: gf.trim_losses(0.2),
    "clip_per_row(1.0)": lambda: gf.clip_per_row(1.0),
    "clip_per_row(quantile(0.5))": lambda: gf.clip_per_row(gf.quantile(0.5)),
    'clip_per_row("smallest")': lambda: gf.clip_per_row("smallest"),
    "clip_per_row(1.0, per_leaf=True)": lambda: gf.clip_per_row(1.0, per_leaf=True),
    "normalize_rows()": gf.normalize_rows,
    "budget_clip()": gf.budget_clip,
    "budget_clip(power=0)": lambda: gf.budget_clip(power=0),
    "mean_rows()": gf.mean_rows,
    "agree_filter(0.97)": lambda: gf.agree_filter(0.97),
    'agree_filter(0.97, per="leaf")': lambda: gf.agree_filter(0.97, per="leaf"),
    "consensus_filter()": gf.consensus_filter,
    "reference_filter()": gf.reference_filter,
    'reference_filter("average")': lambda: gf.reference_filter("average"),
    "aggregate(weighting)": lambda: gf.aggregate(lambda gram: gram.diagonal().softmax(0)),
    "sign_agreement(0.6)": lambda: gf.sign_agreement(0.6),
    "trimmed_mean(1)": lambda: gf.trimmed_mean(1),
    "coordinate_median()": gf.coordinate_median,
    "geometric_median()": gf.geometric_median,
    "centered_clip(1.0)": lambda: gf.centered_clip(1.0),
    "watch()": gf.watch,
    "sam_perturb(0.05)": lambda: gf.sam_perturb(0.05),
    "sam_perturb(0.05, per_microbatch=True)": lambda: gf.sam_perturb(0.05, per_microbatch=True),
    "friendly_sam(0.05)": lambda: gf.friendly_sam(0.05),
    "look_sam(0.05)": lambda: gf.look_sam(0.05),
    "gsam_decompose(0.4)": lambda: gf.gsam_decompose(0.4),
    "agc_clip(0.01)": lambda: gf.agc_clip(0.01),
    "clip_by_global_norm(1.0)": lambda: gf.clip_by_global_norm(1.0),
    "spike_clip()": gf.spike_clip,
    "spike_skip()": gf.spike_skip,
    "sgd(lr, momentum=0.9)": lambda: gf.sgd(LR, momentum=0.9),
    "adam(lr)": lambda: gf.adam(LR),
    "adamw(lr)": lambda: gf.adamw(LR),
    "rmsprop(lr)": lambda: gf.rmsprop(LR),
    "per_example_adam(lr)": lambda: gf.per_example_adam(LR),
    "lion(lr)": lambda: gf.lion(LR),
    "muon(lr)": lambda: gf.muon(LR),
    "cautious(adamw(lr))": lambda: gf.cautious(gf.adamw(LR)),
    "schedule_free(sgd(lr))": lambda: gf.schedule_free(gf.sgd(LR)),
    "msam(sgd(lr, momentum=0.9), 0.3)": lambda: gf.msam(gf.sgd(LR, momentum=0.9), 0.3),
    "from_torch(torch.optim.NAdam)": lambda: gf.from_torch(torch.optim.NAdam, lr=0.1),
    "ema_params(0.99)": lambda: gf.ema_params(0.99),
}
"""One call of each transform but the combinators, whose cost is that of what is inside."""


def params_of(made: Transform) -> Tree:
    """Return parameters that a transform takes: Muon takes matrices only."""
    found = make_params()
    return found if made.name != "muon" else {n: p for n, p in found.items() if p.ndim == 2}


def asked_by(made: Transform, count: int) -> Counter[str]:
    """Return the questions of one step, in a place where the transform may stand."""
    params = params_of(made)
    rows = {n: leaf for n, leaf in make_rows(make_params(), rows=count).items() if n in params}
    state, asked = made.init(params), Counter[str]()
    stack = AskedRows(make_stack(params, rows), asked)
    weights = mean_weights(stack)
    tree = stack.inner.combine(weights)
    on_rows = any(kind.takes == "rows" for kind in made.kinds)
    context = Context(
        {"rows": stack, "weights": weights, "reference": tree, "clean_grads": tree}
        if not on_rows
        else {"reference": tree}
    )
    made.compute(stack if on_rows else tree, state, params, context)
    return asked


def shown_questions(asked: Counter[str]) -> str:
    """Return questions as text, for example ``norms, 2 combine``."""
    found = [
        f"{number if number > 1 else ''} {QUESTIONS[name]}".strip()
        for name, number in ((name, asked[name]) for name in QUESTIONS)
        if number
    ]
    return ", ".join(found)


def trees_in(state: Any, params: Mapping[str, Tensor]) -> int:
    """Return how many trees of the size of the parameters a state holds."""
    if not isinstance(state, dict):
        return 0
    if state.keys() == params.keys():
        return int(all(leaf.shape == params[name].shape for name, leaf in state.items()))
    return sum(trees_in(part, params) for part in state.values())


def line(call: str, make: Callable[[], Transform]) -> str:
    """Return one line of the table."""
    made = make()
    few, many = asked_by(made, FEW), asked_by(made, MANY)
    questions = shown_questions(few)
    if shown_questions(many) != questions:
        questions = f"{questions}; many rows: {shown_questions(many)}"
    passes = sum(few[name] for name in PASSES)
    params = params_of(made)
    state = made.init(params)
    trees = trees_in(state, params)
    memory = f"{trees} P" if trees else "numbers" * bool(_tree.leaves(state))
    takes_rows = any(kind.takes == "rows" for kind in made.kinds)
    parts = "yes" * (takes_rows and made.row_rules is not None)
    observes = "yes" * isinstance(made.rules, Observing)
    cells = (f"`{call}`", questions, str(passes or ""), memory, parts, observes)
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Return the whole table."""
    head = (
        "| transform | asks of the rows | further passes | state | rows in parts | observes |",
        "|---|---|---|---|---|---|",
    )
    return "\n".join([*head, *(line(call, make) for call, make in SHOWN.items())])


def with_table(page: str) -> str:
    """Return the page with the present table."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
