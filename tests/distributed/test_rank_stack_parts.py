"""Transforms of some leaves, or of some steps, on the rows of two ranks."""

import pytest
import torch

import gradfilter as gf
from _world import mine
from gradfilter.distributed import across_ranks

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **(tolerance or TIGHT))


BRANCHES = {
    "a": gf.chain(gf.agree_filter(1.9), gf.sgd(0.1, momentum=0.9)),
    "b": gf.chain(gf.consensus_filter(), gf.agc_clip(0.1), gf.adamw(0.1)),
}
LINKS = {
    "partition": lambda first: gf.chain(*first, gf.partition(BRANCHES, lambda name: name)),
    "across in branches": lambda first: gf.partition(
        {name: gf.chain(*first, branch) for name, branch in BRANCHES.items()}, lambda name: name
    ),
    "masked": lambda first: gf.chain(
        *first, gf.masked(gf.agree_filter(1.9), lambda name: name == "a"), gf.sgd(0.1)
    ),
    "gate": lambda first: gf.chain(
        *first, gf.gate(gf.clip_per_row(0.5), "on"), gf.gate(gf.agree_filter(1.9), "on"), gf.sgd(1)
    ),
}


def in_parts(name, m):
    g = torch.Generator().manual_seed(1)
    full = {n: 1 + torch.randn(2 * m, 4, 3, generator=g) for n in BRANCHES}
    updates = LINKS[name]([across_ranks()]), LINKS[name]([])
    values = [{n: torch.zeros(4, 3) for n in BRANCHES} for _ in updates]
    states = [update.init(values[0]) for update in updates]
    rows = mine(full)
    for on in (True, False, True):
        for k, given in enumerate((rows, full)):
            values[k], states[k], _ = updates[k](
                values[k], states[k], given, on=torch.tensor(on), donate=True
            )
        close(values[0], values[1])
        close(*(list(gf.state_dict(state).values()) for state in states))
    close(rows, mine(full), rtol=0, atol=0)


@pytest.mark.parametrize("name", LINKS)
def test_links_for_some_leaves_or_steps(two, name):
    two.run(in_parts, name, 1)
    two.run(in_parts, name, 2)
