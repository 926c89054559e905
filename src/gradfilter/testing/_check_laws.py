"""`check_laws`: try all laws on one transform, in every place where it may stand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from gradfilter._types import Kind, Transform
from gradfilter.testing import _laws
from gradfilter.testing import _laws as _machine_laws
from gradfilter.testing._laws import SHAPES, M, Problem, TreeProblem
from gradfilter.transforms._chain import chain
from gradfilter.transforms._reducers import mean_rows
from gradfilter.transforms._row_clipping import clip_per_row
from gradfilter.transforms._update_rules import sgd

Law = Callable[[Transform, Problem], None]

LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        _laws.mutates_nothing,
        _laws.is_reproducible,
        _laws.changes_something,
        _laws.ignores_unknown_keywords,
        _laws.skips_bit_by_bit,
        _laws.skips_where_rows_are_rejected,
        _laws.leaves_rejected_rows_out,
        _laws.keeps_dtypes_and_shapes,
        _laws.half_precision_follows_single,
        _laws.never_waits,
        _laws.state_round_trips,
        _laws.nesting_does_not_matter,
        _laws.publishes_what_it_says,
        _laws.names_leaves_that_do_not_match,
        _laws.donates_storage,
        _laws.works_on_parts_of_the_rows,
        _machine_laws.compiles_whole_and_once,
        _machine_laws.same_on_a_gpu,
    )
}


def check_laws(
    transform: Transform,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    rows: int = M,
    extra: Mapping[str, Any] | None = None,
    skip: Collection[str] = (),
) -> tuple[str, ...]:
    """Check a transform, or a chain, against the laws that every transform of this package obeys.

    The laws, by name: ``mutates_nothing``, ``is_reproducible``, ``changes_something``,
    ``ignores_unknown_keywords``, ``skips_bit_by_bit`` (``torch.where``, never a product with 0),
    ``skips_where_rows_are_rejected``, ``leaves_rejected_rows_out``, ``keeps_dtypes_and_shapes``
    (float32, float64, bfloat16), ``half_precision_follows_single``, ``never_waits`` (no
    ``.item()``, no ``if`` on a tensor), ``state_round_trips``, ``nesting_does_not_matter``,
    ``publishes_what_it_says``, ``names_leaves_that_do_not_match``, ``donates_storage``,
    ``works_on_parts_of_the_rows`` (of what has `joins` of `gradfilter.transform`),
    ``compiles_whole_and_once`` (``fullgraph=True``, backend ``aot_eager``) and, where there is a
    CUDA device, ``same_on_a_gpu``. They run one after another on small random parameters and rows.
    Most of the time goes to the compiler, whose caches are cleared.

    A transform is completed to a chain that ends in an update: ``mean_rows()`` after one that gives
    rows, and ``sgd`` if there is no update rule. Every kind is tried in two places: first in the
    chain, where it gets the caller's own tensors (for a tree also ``grad_fn``), and behind
    another transform: rows behind `clip_per_row`, a tree behind ``mean_rows()``, an update behind a
    chain from rows. A complete chain is tried without additions.

    Args:
        transform: A transform, or a chain if the transform needs others before it.
        shapes: The shapes of the parameters by name, if the transform needs certain ones; by
            default matrices, a convolution and a number.
        rows: The number M of rows.
        extra: Keywords that the transform needs in every step, such as the bool of a `gate`.
        skip: The laws to skip. ``changes_something`` does not apply to a transform that freezes;
            ``half_precision_follows_single`` may fail for one that makes hard decisions; a
            weighting that solves a problem on the host breaks ``never_waits`` and
            ``compiles_whole_and_once``.

    Returns:
        The names of the laws that hold, without the skipped ones.

    Raises:
        AssertionError: Laws are broken. The error names all of them, each with its cause.
        TypeError: Not a Transform.
        ValueError: The transform cannot stand alone, or ``skip`` has an unknown name.

    Examples:
        >>> import gradfilter as gf
        >>> from gradfilter.testing import check_laws
        >>> def halve(grads, state, params, **extra):
        ...     return {name: g / 2 for name, g in grads.items()}, state, {}
        >>> check_laws(gf.transform("halve", "tree -> tree", halve))[:3]
        ('mutates_nothing', 'is_reproducible', 'changes_something')
        >>> def hasty(grads, state, params, **extra):
        ...     scale = 1 / (1 + max(g.abs().max().item() for g in grads.values()))
        ...     return {name: scale * g for name, g in grads.items()}, state, {}
        >>> transform = gf.transform("hasty", "tree -> tree", hasty)
        >>> check_laws(transform, skip=["compiles_whole_and_once"])
        Traceback (most recent call last):
        AssertionError: hasty breaks 1 of 16 laws.
          never_waits: No step asks the host for the value of a tensor.
            In mean_rows -> hasty -> sgd and hasty -> sgd: ...
    """
    if not isinstance(transform, Transform):
        raise TypeError(
            f"check_laws: expected a transform, found {type(transform).__name__}. Call the "
            "factory: my_transform(), not my_transform."
        )
    unknown = sorted(set(skip) - set(LAWS))
    if unknown:
        raise ValueError(
            f"check_laws: expected laws among {sorted(LAWS)} in skip, found {unknown}."
        )
    asked = {name: law for name, law in LAWS.items() if name not in skip}
    if not torch.cuda.is_available():
        asked.pop("same_on_a_gpu", None)
    given = (SHAPES if shapes is None else shapes, rows, extra or {})
    problem, tree = Problem(*given), TreeProblem(*given)
    broken: dict[str, tuple[list[str], list[str]]] = {}  # by cause: the laws and the places
    first = None
    for update in completed(transform):
        on = problem if Kind.ROWS_TO_UPDATE in update.kinds else tree
        for name, law in asked.items():
            try:
                law(update, on)
            except Exception as error:  # any exception of a transform breaks the law
                first = first or error
                laws, places = broken.setdefault(_found(error), ([], []))
                where = " -> ".join(part.name for part in update.parts)
                laws += [] if name in laws else [name]
                places += [] if where in places else [where]
    if broken:
        names = {name for laws, _ in broken.values() for name in laws}
        lines = "".join(
            f"\n  {'all:' if 1 < len(asked) == len(laws) else _asked(laws)}"
            f"\n    In {' and '.join(places)}: {found}"
            for found, (laws, places) in broken.items()
        )
        raise AssertionError(
            f"{transform.name or 'the chain'} breaks {len(names)} of {len(asked)} laws.{lines}"
        ) from first
    return tuple(asked)


def completed(transform: Transform) -> list[Transform]:
    """Make chains that end in an update, one for every place of the transform.

    The places are the first in the chain, where it gets the caller's tensors, and behind others.
    """
    if transform.parts and Kind.ROWS_TO_UPDATE in transform.kinds:
        return [transform]  # complete already
    rule = sgd(0.1, momentum=0.9, weight_decay=0.01)
    before = {
        "rows": ((), (clip_per_row(20.0),)),
        "tree": ((mean_rows(),), ()),
        "update": ((mean_rows(), rule), (rule,)),
    }
    after = {"rows": (mean_rows(), rule), "tree": (rule,), "update": ()}
    chains: list[Transform] = []
    for kind in transform.kinds:
        for others in before[kind.takes]:
            whole = chain(*others, transform, *after[kind.gives])
            known = [(part.name for part in other.parts) for other in chains]
            names = [part.name for part in whole.parts]
            if all(names != [*other] for other in known):
                chains.append(whole)
    return chains


def _found(error: Exception) -> str:
    """Return the first lines of an error."""
    text = str(error).strip() or type(error).__name__
    if not isinstance(error, AssertionError):
        text = f"{type(error).__name__}: {text}"
    return "\n    ".join([line for line in text.splitlines() if line.strip()][:3])


def _asked(laws: list[str]) -> str:
    """Return the names of laws, and for a single law its text."""
    if len(laws) > 1:
        return f"{', '.join(laws)}:"
    return f"{laws[0]}: {(LAWS[laws[0]].__doc__ or '').strip()}"
