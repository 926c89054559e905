"""What a transform declares so that rows may come in parts, and how published values are joined.

A transform acts row by row if its result for some of the rows is what it makes of these rows among
all others. Then the rows of a large batch need not be in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Join = Literal["rows", "mean", "sum", "any", "shares", "same"]
"""How the values that a transform published for each part of the rows become that of all rows.

"rows": one number per row, concatenated. "mean": the mean over all rows. "sum": a sum over all
rows. "any": true if true in some part. "shares": the weights of a reducer, concatenated in
proportion to the divisors of the parts. "same": equal in every part, such as a hyperparameter.
"""


@dataclass(frozen=True)
class RowRules:
    """The rules of a transform that acts row by row; for one gradient, that it ignores rows.

    The transform draws no random numbers, because a part would draw others than all rows together.
    Its new state does not depend on the rows, unless it has ``observe``.

    Attributes:
        joins: How to join each published value.
        reads: The names that it reads from the context: keywords of the caller, and values of
            earlier transforms that are joined as "rows" or "same". None for all of them.
        divisor: For a reducer that gives Σ w_m g_m / d with w_m of its own row alone: the number d
            of a stack, which is the sum of the d of its parts, 0 if no row takes part. () A
            function of the stack; or the name of a value that the reducer publishes, for weights
            of more than the row, such as a keyword. None for a plain sum.
        observe: Returns the new state from the state before the step and the published values of
            all rows. The gradients of a step must not depend on it.
    """

    joins: Mapping[str, Join]
    reads: frozenset[str] | None = frozenset()
    divisor: Callable[[Any], Tensor] | str | None = None
    observe: Callable[[Any, Mapping[str, Any]], Any] | None = None

    def seen(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the values that the transform reads."""
        return {name: v for name, v in values.items() if self.reads is None or name in self.reads}

    def for_later(self, out: Mapping[str, Any]) -> dict[str, Any]:
        """Return the published values of a part that a later transform of this part may read."""
        return {name: v for name, v in out.items() if self.joins[name] in ("rows", "same")}

    def divisor_of(self, rows: Any, out: Mapping[str, Any]) -> Tensor | None:
        """Return the divisor of a part, given its rows and what the reducer published. ()."""
        divisor = self.divisor
        if isinstance(divisor, str):
            published: Tensor = out[divisor]
            return published
        return None if divisor is None else divisor(rows)

    def joined(self, outs: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
        """Join the published values of all parts but shares.

        Args:
            outs: The published values of each part.
            sizes: The number of rows of each part.
        """
        joins = {"rows": _cat, "mean": _mean, "sum": _sum, "any": _any, "same": _last}
        return {
            name: joins[self.joins[name]]([out[name] for out in outs], sizes)
            for name in outs[-1]
            if self.joins[name] != "shares"
        }


IGNORES_ROWS = RowRules({})
"""The rules of a transform of one gradient that does not use the rows behind it."""


def check_joins(name: str, joins: Mapping[str, Any], publishes: frozenset[str]) -> None:
    """Refuse unknown joins, and published values that are not joined.

    Raises:
        ValueError: A name is missing or extra, or a join is unknown.
    """
    unknown = sorted({str(join) for join in joins.values()} - set(get_args(Join)))
    if unknown:
        raise ValueError(f"{name}: expected joins among {get_args(Join)}, found {unknown}.")
    if set(joins) != publishes:
        raise ValueError(
            f"{name}: expected one join for each published value {sorted(publishes)}, found joins "
            f"of {sorted(joins)}. A value without a join would be lost where rows come in parts."
        )


def joined_rules(parts: Mapping[str, RowRules | None], keeps: int) -> RowRules | None:
    """Return the rules of transforms that follow each other as one; None if one has no rules.

    Args:
        parts: The rules by the name that begins the names of published values; "" for none.
        keeps: The number of transforms that publish ``keep``. With several, an AND of them in each
            part says less than one for all rows.
    """
    known = [(name, rules) for name, rules in parts.items() if rules is not None]
    if len(known) < len(parts) or keeps > 1:
        return None
    if any(rules.divisor or rules.observe for _, rules in known):
        return None
    joins: dict[str, Join] = {
        key if key == "keep" or not name else f"{name}/{key}": join
        for name, rules in known
        for key, join in rules.joins.items()
    }
    return RowRules(joins, reads_of(rules for _, rules in known))


def reads_of(rules: Any) -> frozenset[str] | None:
    """Return the names that several transforms read; None if one of them reads all."""
    found: frozenset[str] = frozenset()
    for part in rules:
        if part.reads is None:
            return None
        found |= part.reads
    return found


def _cat(values: list[Tensor], sizes: Sequence[int]) -> Tensor:
    return torch.cat(values)


def _mean(values: list[Tensor], sizes: Sequence[int]) -> Tensor:
    total = sum(sizes)
    shares = [value * (size / total) for value, size in zip(values, sizes, strict=True)]
    return torch.stack(shares).sum(0)


def _sum(values: list[Tensor], sizes: Sequence[int]) -> Tensor:
    return torch.stack(values).sum(0)


def _any(values: list[Tensor], sizes: Sequence[int]) -> Tensor:
    return torch.stack(values).any()


def _last(values: list[Tensor], sizes: Sequence[int]) -> Tensor:
    return values[-1]
