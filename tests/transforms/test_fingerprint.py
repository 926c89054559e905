"""The description of a chain by which processes compare theirs."""

from dataclasses import dataclass, field, replace

import gradfilter as gf
from gradfilter.transforms._fingerprint import described


@dataclass(frozen=True, eq=False)
class Settings:
    rank: int
    parts: list = field(default_factory=list)
    unset: int = field(init=False)


def own(settings):
    def update(grads, state, params):
        return (settings and grads), state, {}

    return gf.transform("own", "tree -> tree", update)


def test_arguments_of_the_librarys_transforms_are_written_out():
    first, second = (replace(gf.sgd(lr, momentum=0.9), name="mine") for lr in (0.1, 0.2))
    assert described(first) != described(second)
    assert described(first) == described(replace(gf.sgd(0.1, momentum=0.9), name="mine"))


def test_objects_of_others_are_described_by_their_type():
    assert described(own(Settings(0))) == described(own(Settings(1)))
    assert "Settings" in described(own(Settings(0)))


def test_an_object_that_contains_itself_has_a_short_description():
    settings = Settings(0)
    settings.parts.extend([settings] * 16)
    assert len(described(own(settings))) < 1000
