"""Run the modules that vmap refuses row by row, inside a pass over all rows.

Routing by ``nonzero``, an ``autograd.Function`` of the old style, a buffer that every row writes:
vmap refuses these, and a whole model would take the loop because of one small part. The smallest
module around the refused operation runs row by row, under ordinary autograd and on the row's own
tensors; the rest runs over all rows at once. The rows of its parameters are held.

What such a module is given and returns must be visible: tensors and plain values in tuples, lists
and dicts. A tensor of all rows that reaches it in another way is refused by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradfilter import _tree
from gradfilter._types import Tree
from gradfilter.grads._buffer_watch import Unreplayable
from gradfilter.grads._normalized_loss import as_parameter
from gradfilter.grads.fused._host import Host
from gradfilter.grads.fused._lift import Level

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""What a module may be given and return in addition to tensors."""


class ByRow:
    """The modules of one loss that run row by row, as refused passes have shown."""

    def __init__(self, others: ByRow | None = None) -> None:
        """With none, or those of others."""
        self._modules: set[nn.Module] = set(others._modules if others else ())

    def __reduce__(self) -> Any:
        """What was learned stays here."""
        return (ByRow, ())

    def update(self, others: ByRow) -> None:
        """Take what others have learned."""
        self._modules |= others._modules

    def learn(self, refusal: BaseException, modules: Mapping[str, nn.Module]) -> bool:
        """Find the smallest module around what was refused; false where there is none to be had.

        A part that is most of the model is left to the loop.

        Args:
            refusal: What was raised.
            modules: Those of the model, by name.
        """
        around = _modules_around(refusal)
        if isinstance(refusal, Unreplayable) and not around:
            owner = modules.get(refusal.buffer.rpartition(".")[0])
            around = [owner, modules[""]] if owner is not None else []
        if not around or _is_torchs(around[0]):  # whose refusals are meant
            return False
        whole = around[-1]
        for module in around[:-1]:
            small = 2 * sum(1 for _ in module.modules()) <= sum(1 for _ in whole.modules())
            if small and module not in self._modules and not _is_torchs(module) and _may(module):
                self._modules.update(m for m in whole.modules() if type(m) is type(module))
                return True
        return False

    @contextmanager
    def entered(self, host: Host) -> Iterator[HandedOn]:
        """Run a pass over all rows with these modules row by row."""
        handed = HandedOn(host)
        with ExitStack() as stack:
            for module in self._modules:
                stack.enter_context(_replaced(module, handed))
            yield handed


def _modules_around(error: BaseException) -> list[nn.Module]:
    """The modules whose methods an error came through, the innermost first."""
    found: dict[int, nn.Module] = {}
    step = error.__traceback__
    while step is not None:
        owner = step.tb_frame.f_locals.get("self")
        # Of torch's modules methods such as `to` are tools, which say nothing of the module.
        runs = step.tb_frame.f_code.co_name == "forward"
        if isinstance(owner, nn.Module) and (runs or not _is_torchs(owner)):
            found.pop(id(owner), None)
            found[id(owner)] = owner
        step = step.tb_next
    return list(reversed(found.values()))


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "torch"


def _may(module: nn.Module) -> bool:
    """Whether ordinary autograd on the rows of its parameters gives their gradients."""
    return not any(
        getattr(m, "sparse", False)
        or getattr(m, "max_norm", None) is not None
        or isinstance(m, nn.SyncBatchNorm)
        for m in module.modules()
    )


@contextmanager
def _replaced(module: nn.Module, handed: HandedOn) -> Iterator[None]:
    """Give a module a forward pass that goes row by row."""
    forward, before = module.forward, module.__dict__.get("forward")

    def by_row(*args: Any, **kwargs: Any) -> Any:
        if not handed.host.level.is_innermost():
            return forward(*args, **kwargs)
        return handed.run(module, forward, args, kwargs)

    module.forward = by_row
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before


class HandedOn:
    """The calls row by row of one pass, and the buffers that they hand from row to row.

    Attributes:
        buffers: Those that were written, as the last row leaves them, by name.
        modules: What ran row by row, a module for each call.
    """

    def __init__(self, host: Host) -> None:
        """Of one pass."""
        self.host = host
        self.buffers: Tree = {}
        self.modules: list[nn.Module] = []
        self._seen: set[str] = set()

    def run(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One call."""
        level = self.host.level
        self.modules.append(module)
        values, rebuild = _tree.flatten((args, kwargs))
        _check_plain(module, values)
        shared = [v for v in values if isinstance(v, Tensor) and not level.batched(v)]
        versions = [v._version for v in shared]
        buffers = _Buffers(module, self.host)

        def every_row() -> Any:
            rows = [
                level.lower(v).unbind() if level.batched(v) else [v] * level.rows for v in values
            ]
            outputs = []
            for m, to_row in enumerate(_rows_of_parameters(module, level)):
                to_row()
                buffers.to_next_row()
                given = rebuild(row[m] for row in rows)
                outputs.append(forward(*given[0], **given[1]))
                _check_kept(module, [row[m] for row in rows], _tree.leaves(given))
            return _stacked(module, outputs)

        before = [(table, dict(table)) for table in _tables(module)]
        try:
            found = level.on_all_rows(every_row)
            written = buffers.finish()
        finally:
            for table, tensors in before:
                table.update(tensors)
        if any(v._version != version for v, version in zip(shared, versions, strict=True)):
            raise _cannot(module, "writes into a tensor that all rows share")
        # Row after row, what one call writes would meet what another call reads.
        if (set(written) & self._seen) or (set(self.buffers) & buffers.names):
            raise _cannot(module, "writes a buffer that is used more than once in a pass")
        self._seen |= buffers.names
        self.buffers |= written
        return _tree.tree_map(lambda t: level.wrap(t) if isinstance(t, Tensor) else t, found)


def _tables(module: nn.Module) -> list[dict[str, Any]]:
    """Where a module and its submodules keep their tensors."""
    return [table for part in module.modules() for table in (part._parameters, part._buffers)]


def _rows_of_parameters(module: nn.Module, level: Level) -> Iterator[Callable[[], None]]:
    """For every row, a function that puts the row's own tensors in their places."""
    unbound: dict[int, tuple[Tensor, ...]] = {}
    places = []
    for table in _tables(module):
        for key, tensor in table.items():
            if level.batched(tensor):
                # All at once: the gradient of a single row would be as large as that of all.
                rows = unbound.setdefault(id(tensor), level.lower(tensor).unbind())
                if isinstance(tensor, nn.Parameter):
                    rows = tuple(as_parameter(row) for row in rows)
                places.append((table, key, rows))
    for m in range(level.rows):

        def to_row(m: int = m) -> None:
            for table, key, rows in places:
                table[key] = rows[m]

        yield to_row


class _Buffers:
    """The buffers of a module, handed from row to row: each row has copies of its own.

    Whether they were written is seen by their values: kernels of BatchNorm write without a trace.
    """

    def __init__(self, module: nn.Module, host: Host) -> None:
        watch = host.running.watch
        self._module = module
        self._places = [
            (part._buffers, key)
            for part in module.modules()
            for key, tensor in part._buffers.items()
            if tensor is not None and not host.level.batched(tensor)
        ]
        self._before: list[Any] = [table[key] for table, key in self._places]
        self._names = [watch.name(tensor) for tensor in self._before]
        self.names = {str(name) for name in self._names}

    def to_next_row(self) -> None:
        """Give the next row what the last one left."""
        with torch._C.DisableTorchFunction():  # no use of the buffers by the loss
            for table, key in self._places:
                left = table[key]
                if left is None:
                    raise _cannot(self._module, "takes a buffer away")
                table[key] = left.detach().clone()

    def finish(self) -> Tree:
        """What the last row left of the buffers that were written, by name."""
        found: Tree = {}
        with torch._C.DisableTorchFunction():
            for (table, key), before, name in zip(
                self._places, self._before, self._names, strict=True
            ):
                now: Any = table[key]
                if now is not None and torch.equal(now, before):
                    continue
                if now is None or name is None or self._names.count(name) > 1:
                    raise _cannot(self._module, "writes a buffer that has several names")
                found[name] = now.detach()
        return found


def _check_plain(module: nn.Module, values: list[Any]) -> None:
    for value in values:
        if not isinstance(value, (Tensor, *PLAIN)):
            raise _cannot(module, f"is given or returns {type(value).__name__}")


def _check_kept(module: nn.Module, given: list[Any], found: list[Any]) -> None:
    """Refuse containers that were changed: those were copies."""
    if len(given) != len(found) or any(a is not b for a, b in zip(given, found, strict=True)):
        raise _cannot(module, "changes the containers it is given")


def _stacked(module: nn.Module, outputs: list[Any]) -> Any:
    """What a module returned for every row, with all rows in every tensor."""
    flat = [_tree.flatten(output) for output in outputs]
    if len({len(values) for values, _ in flat}) > 1:
        raise _cannot(module, "returns more for some rows than for others")
    columns = list(zip(*(values for values, _ in flat), strict=True))
    found = []
    for column in columns:
        _check_plain(module, list(column))
        if all(isinstance(value, Tensor) for value in column):
            if len({value.shape for value in column}) > 1:
                raise _cannot(module, "returns tensors of several shapes")
            found.append(torch.stack(column))
        elif any(type(v) is not type(column[0]) or v != column[0] for v in column):
            raise _cannot(module, "returns Python values that differ from row to row")
        else:
            found.append(column[0])
    return flat[0][1](found)


def _cannot(module: nn.Module, why: str) -> RuntimeError:
    return RuntimeError(f"{type(module).__name__} cannot run row by row inside a pass: it {why}")
