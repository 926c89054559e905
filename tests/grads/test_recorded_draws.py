"""Draws of a trace: recorded in order, repeated from any position, or refused."""

import pytest
import torch

from gradfilter.grads._call_context import (
    random_state,
    random_state_restored,
    recording,
    same_random_state,
    set_random_state,
    undo_draws,
)
from gradfilter.grads._recorded_draws import RecordedDraws

CPU = torch.device("cpu")

REPEATABLE = {
    "rand": lambda: torch.rand(3),
    "randn_like": lambda: torch.randn_like(torch.ones(3)),
    "randint": lambda: torch.randint(100, (3,)),
    "randperm": lambda: torch.randperm(20),
    "normal": lambda: torch.normal(0.0, 1.0, (3,)),
    "bernoulli_": lambda: torch.empty(30).bernoulli_(0.5),
    "uniform_": lambda: torch.empty(3).uniform_(),
    "exponential_": lambda: torch.empty(3).exponential_(),
    "random_": lambda: torch.empty(3).random_(),
    "dropout": lambda: torch.nn.functional.dropout(torch.ones(30), 0.5),
}


@pytest.mark.parametrize("name", REPEATABLE)
def test_a_second_pass_gets_the_numbers_of_the_first(name):
    numbers = RecordedDraws()
    with recording(numbers), numbers.recorded():
        start = random_state(CPU)
        first, other = REPEATABLE[name](), torch.rand(2)
        first.mul_(1)  # a later write must not change what is repeated
        kept = first.clone()
        first.zero_()
        after = random_state(CPU)
        with random_state_restored(CPU):
            set_random_state(start, CPU)
            assert torch.equal(REPEATABLE[name](), kept)
            assert torch.equal(torch.rand(2), other)
        assert same_random_state(random_state(CPU), after)
        assert not same_random_state(start, after)
        new = torch.rand(2)
    assert not torch.equal(new, other)
    assert len(numbers.draws) == 3 and numbers.forgotten == [False] * 3


def test_a_mask_is_repeated_with_other_values():
    numbers = RecordedDraws()
    x = torch.ones(200)
    with recording(numbers), numbers.recorded():
        start = random_state(CPU)
        first, mask = torch.native_dropout(x, 0.25, True)
        set_random_state(start, CPU)
        second, again = torch.native_dropout(3 * x, 0.25, True)
    assert torch.equal(mask, again) and 0 < int(mask.sum()) < 200
    torch.testing.assert_close(second, 3 * first)


def test_draws_that_depend_on_values_are_not_repeated():
    numbers = RecordedDraws()
    with recording(numbers), numbers.recorded():
        start = random_state(CPU)
        torch.bernoulli(torch.full((3,), 0.5))
        set_random_state(start, CPU)
        with pytest.raises(RuntimeError, match="bernoulli mixes random numbers with values"):
            torch.bernoulli(torch.full((3,), 0.1))


def test_another_draw_in_a_repeated_pass_is_refused():
    numbers = RecordedDraws()
    with recording(numbers), numbers.recorded():
        start = random_state(CPU)
        torch.rand(3)
        set_random_state(start, CPU)
        with pytest.raises(RuntimeError, match=r"other random numbers \(randn\) than .* \(rand\)"):
            torch.randn(3)


def test_draws_of_a_pass_that_was_given_up_are_forgotten():
    numbers = RecordedDraws()
    with recording(numbers), numbers.recorded():
        torch.rand(1)
        start = random_state(CPU)
        torch.rand(2)
        torch.rand(3)
        undo_draws(start, CPU)
        other = torch.randn(4)
        set_random_state(start, CPU)
        assert torch.equal(torch.randn(4), other)
    assert numbers.forgotten == [False, True, True, False]
    assert numbers.position == len(numbers.draws) == 2


def test_layers_that_are_off_draw_nothing():
    numbers = RecordedDraws()
    with recording(numbers), numbers.recorded():
        torch.native_dropout(torch.ones(3), 0.5, False)
        torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 4)] * 3)
    assert numbers.draws == []
