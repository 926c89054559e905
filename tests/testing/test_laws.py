"""Every law, broken once by a transform of every kind: each breach is found."""

from dataclasses import dataclass, replace

import pytest
import torch

import gradfilter as gf
from gradfilter.testing import check_laws
from gradfilter.testing._check_laws import LAWS, completed
from gradfilter.testing._laws import Problem, TreeProblem

COMPILE = "compiles_whole_and_once"


def on_trees(function):
    """An update of one tree from a function of its leaves."""
    return lambda grads: {name: function(g) for name, g in grads.items()}


def mean(rows):
    return rows.combine(rows.live / rows.live.sum().clamp(min=1))


# What a lawful transform of each kind does to its gradients; the functions keep step by linearity.
KINDS = {
    "rows -> rows": lambda rows, change: gf.DenseStack(
        {n: change(g) for n, g in rows.scaled(0.5 * rows.live.double()).stacked().items()},
        losses=rows.losses,
        scale=rows.live.double(),
    ),
    "rows -> tree": lambda rows, change: on_trees(change)(mean(rows)),
    "tree -> tree": lambda grads, change: on_trees(change)(grads),
    "tree -> update": lambda grads, change: on_trees(lambda g: -0.1 * change(g))(grads),
    "rows -> update": lambda rows, change: on_trees(lambda g: -0.1 * change(g))(mean(rows)),
    "update -> update": lambda updates, change: on_trees(lambda u: 0.5 * change(u))(updates),
}


@dataclass
class Breach:
    """The difference of a transform from a lawful one.

    Attributes:
        change: Done to every leaf.
        before: Done to (gradients, state, parameters) first.
        more: The next state, from this one and the parameters.
        out: What is published, announced or not.
        init: The first state.
    """

    change: object = staticmethod(lambda g: g)
    before: object = staticmethod(lambda grads, state, params: None)
    more: object = staticmethod(lambda state, params: state)
    out: object = staticmethod(dict)
    init: object = staticmethod(lambda params: {})
    strict: bool = False

    def of(self, kind):
        def update(grads, state, params, /, **extra):
            self.before(grads, state, params)
            return KINDS[kind](grads, self.change), self.more(state, params), self.out()

        def knows_all_keywords(
            grads, state, params, /, *, keep=None, rows=None, weights=None, grad_fn=None
        ):
            return update(grads, state, params)

        return gf.link("mine", kind, knows_all_keywords if self.strict else update, init=self.init)


def a_sum(params):
    return {"sum": torch.full((), 7.0)}


def write_state(grads, state, params):
    state["sum"] += 1


def write_params(grads, state, params):
    for p in params.values():
        p.mul_(0.5)


def write_grads(grads, state, params):
    for g in (grads.stacked() if isinstance(grads, gf.GradStack) else grads).values():
        g.mul_(0.5)


def calls(g):
    calls.count = getattr(calls, "count", 0) + 1  # a new graph whenever it is another number
    return g * calls.count


def by_the_shortest(rows, state, params, /, **extra):
    norms = rows.sq_norms().sqrt()
    return rows.scaled(norms / norms.min()), state, {}


def without_live(kind):
    """A removed row has norm 0."""

    def update(rows, state, params, /, **extra):
        scaled = by_the_shortest(rows, state, params)[0]
        if kind == "rows -> rows":
            return scaled, state, {}
        sign = 1.0 if kind == "rows -> tree" else -0.1
        total = scaled.combine(torch.ones(len(rows)))
        return {name: sign * g for name, g in total.items()}, state, {}

    return gf.link("mine", kind, update)


def by_the_mean(kind):
    """What it says of itself, that it acts row by row, is not so."""

    def update(rows, state, params, /, **extra):
        norms = rows.sq_norms().sqrt()
        scaled = rows.scaled(norms / norms[norms.isfinite()].mean())
        return (scaled if kind == "rows -> rows" else mean(scaled)), state, {}

    divisor = None if kind == "rows -> rows" else lambda rows: rows.live.sum().double()
    return gf.link("mine", kind, update, joins={}, divisor=divisor)


ROWS = [kind for kind in KINDS if kind.startswith("rows")]


def repeated(params):
    """Numbers that share memory, into which nothing can be written."""
    return {name: torch.ones_like(p.sum()).expand(p.shape) for name, p in params.items()}


GROWS = Breach(
    more=lambda state, params: {"seen": torch.cat([state["seen"], torch.zeros(1)])},
    init=lambda params: {"seen": torch.zeros(1)},
)
BREACHES = {
    "mutates_nothing": {
        "state": Breach(before=write_state, init=a_sum),
        "parameters": Breach(before=write_params),
        "gradients": Breach(before=write_grads),
    },
    "is_reproducible": Breach(change=lambda g: g + torch.randn_like(g)),
    "changes_something": Breach(change=lambda g: torch.full_like(g, -0.0)),
    "ignores_unknown_keywords": Breach(strict=True),
    "skips_bit_by_bit": Breach(before=write_state, init=a_sum),
    "skips_where_rows_are_rejected": Breach(before=write_state, init=a_sum),
    "keeps_dtypes_and_shapes": GROWS,
    "half_precision_follows_single": Breach(change=lambda g: (g + 2048) - 2048),
    "never_waits": Breach(change=lambda g: g / (1 + g.abs().max().item())),
    "state_round_trips": GROWS,
    "publishes_what_it_says": Breach(out=lambda: {"size": torch.ones(())}),
    "donates_storage": Breach(more=lambda state, params: repeated(params), init=repeated),
    COMPILE: Breach(change=calls),
}
# What is done to an update, or to a tree that rows are reduced to, is not the caller's business.
NOT_OF_THE_CALLER = {("gradients", "update -> update")}


def cases():
    for law, breach in BREACHES.items():
        ways = breach if isinstance(breach, dict) else {"": breach}
        for way, how in ways.items():
            for kind in KINDS:
                if (way, kind) not in NOT_OF_THE_CALLER:
                    yield pytest.param(law, how.of(kind), id=f"{law}-{way}-{kind}")
    for kind in ROWS:
        yield pytest.param("leaves_rejected_rows_out", without_live(kind), id=f"rejected-{kind}")
    for kind in ("rows -> rows", "rows -> tree"):
        yield pytest.param("works_on_parts_of_the_rows", by_the_mean(kind), id=f"parts-{kind}")


def only(law):
    return [name for name in LAWS if name != law]


@pytest.mark.parametrize(("law", "broken"), list(cases()))
def test_a_breach_of_every_kind_is_found(law, broken):
    with pytest.raises(AssertionError, match=rf"mine breaks 1 of 1 laws\.\n  {law}: "):
        check_laws(broken, skip=only(law))


@pytest.mark.parametrize("kind", KINDS)
def test_a_lawful_transform_of_every_kind_holds(kind):
    held = check_laws(Breach().of(kind), skip=[COMPILE])
    assert set(held) == set(LAWS) - {COMPILE, "same_on_a_gpu"} or torch.cuda.is_available()


def around(chain, function):
    """A chain with another update, which a chain around it does not know."""
    changed = replace(chain, compute=lambda *args: function(chain.compute, *args))
    return changed.with_parts(chain.parts)


def twice(compute, *args):
    updates, state, out = compute(*args)
    return {name: 2 * u for name, u in updates.items()}, state, out


def forgives(compute, grads, state, params, context):
    if isinstance(grads, dict):
        grads = {n: grads.get(n, torch.zeros_like(p)) for n, p in params.items()}
    return compute(grads, state, params, context)


TREES = gf.chain(gf.agc_clip(), gf.sgd(0.1))
CHAINS_OF_ROWS = gf.chain(gf.mean_rows(), gf.sgd(0.1))


@pytest.mark.parametrize(
    ("chain", "problem"),
    [(TREES, TreeProblem()), (CHAINS_OF_ROWS, Problem())],
    ids=["tree", "rows"],
)
def test_a_chain_that_is_another_one_when_it_is_nested_is_found(chain, problem):
    with pytest.raises(AssertionError, match="are a chain of their own"):
        LAWS["nesting_does_not_matter"](around(chain, twice), problem)


def test_a_tree_that_lacks_a_leaf_is_found():
    with pytest.raises(AssertionError, match=r"rows with (missing|extra) .* were taken"):
        LAWS["names_leaves_that_do_not_match"](around(TREES, forgives), TreeProblem())


def test_every_law_that_needs_no_gpu_is_broken():
    chains = {"nesting_does_not_matter", "names_leaves_that_do_not_match"}
    of_rows = {"leaves_rejected_rows_out", "works_on_parts_of_the_rows"}
    assert BREACHES.keys() | chains | of_rows | {"same_on_a_gpu"} == LAWS.keys()


FACTORIES = [
    *(gf.agc_clip(0.01), gf.clip_by_global_norm(0.5), gf.finite_filter(), gf.sam_perturb(0.05)),
    *(gf.sgd(0.1, momentum=0.9), gf.adam(0.1), gf.adamw(0.1), gf.rmsprop(0.1)),
    *(gf.ema_params(0.9), gf.scheduled(gf.agc_clip, clipping=gf.schedules.linear(0.1, 10))),
    gf.gate(gf.agc_clip(0.01), "late"),
    gf.masked(gf.agc_clip(0.01), lambda name: name.startswith("head")),
    gf.partition({"all": gf.adam(0.1)}, lambda name: "all"),
    gf.chain(gf.sgd(0.1), gf.freeze(lambda name: name.startswith("head"))),
]


@pytest.mark.parametrize("link", FACTORIES, ids=lambda link: link.name or "chain")
@pytest.mark.parametrize("law", [name for name in LAWS if name not in (COMPILE, "same_on_a_gpu")])
def test_what_takes_a_tree_obeys_on_the_callers_own(law, link):
    problem = TreeProblem(extra={"late": torch.tensor(True)})
    trees = [chain for chain in completed(link) if "rows -> update" not in chain.kinds]
    assert trees
    for chain in trees:
        LAWS[law](chain, problem)
    assert not isinstance(Problem(), TreeProblem)
