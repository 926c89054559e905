"""The zoo: small models of every kind for plan "fused", and models of other libraries."""

import pytest

import _zoo_attention
import _zoo_convs
import _zoo_embeddings
import _zoo_language
import _zoo_linear
import _zoo_losses
import _zoo_norms
import _zoo_recurrent
import _zoo_sharing
import _zoo_vision

FAMILIES = [
    _zoo_linear,
    _zoo_convs,
    _zoo_norms,
    _zoo_attention,
    _zoo_recurrent,
    _zoo_embeddings,
    _zoo_sharing,
    _zoo_losses,
    _zoo_language,
    _zoo_vision,
]
ZOO = {case.name: case for family in FAMILIES for case in family.CASES}

assert len(ZOO) == sum(len(family.CASES) for family in FAMILIES), "two cases of one name"

every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if case.slow else [])
        for name, case in ZOO.items()
    ],
)
