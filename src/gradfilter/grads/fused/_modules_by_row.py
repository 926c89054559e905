"""Run the modules that vmap refuses row by row, inside a pass over all rows.

vmap refuses routing by ``nonzero``, an ``autograd.Function`` of the old style, or a buffer that
every row writes, and a whole model would take the loop because of one small part. Instead the
smallest module around the refused operation runs row by row, under ordinary autograd and on the
row's own tensors. The rest runs over all rows at once. The rows of that module's parameters are
held.

The arguments and results of such a module must be tensors and plain values, in tuples, lists and
dicts. torch refuses a tensor of all rows that reaches the module in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradfilter import _tree
from gradfilter._types import Tree
from gradfilter.grads._buffer_watch import Unreplayable
from gradfilter.grads._normalized_loss import as_parameter
from gradfilter.grads.fused._host import Host

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""The types that a module may take and return in addition to tensors."""


class ByRow:
    """The modules of one loss that run row by row, learned from refused passes."""

    def __init__(self, others: ByRow | None = None) -> None:
        """Begin with no modules, or with those of another object."""
        self._modules: set[nn.Module] = set(others._modules if others else ())

    @override
    def __reduce__(self) -> Any:
        """Pickle without the modules."""
        return (ByRow, ())

    def update(self, others: ByRow) -> None:
        """Add the modules of another object."""
        self._modules |= others._modules

    def learn(self, refusal: BaseException, modules: Mapping[str, nn.Module]) -> bool:
        """Find the smallest module around the refused operation. Return False if there is none.

        If that module is most of the model, the whole model takes the loop.

        Args:
            refusal: The exception that was raised.
            modules: The modules of the model, by name.
        """
        around = _modules_around(refusal)
        if isinstance(refusal, Unreplayable) and not around:
            owner, model = modules.get(refusal.buffer.rpartition(".")[0]), modules[""]
            around = [owner, model] if owner in set(model.modules()) else []
        if not around or _is_torchs(around[0]):  # torch refuses these on purpose
            return False
        whole = around[-1]
        for module in around[:-1]:
            small = 2 * sum(1 for _ in module.modules()) <= sum(1 for _ in whole.modules())
            if (
                small
                and module not in self._modules
                and not _is_torchs(module)
                and _can_run_by_row(module)
            ):
                self._modules.update(m for m in whole.modules() if type(m) is type(module))
                return True
        return False

    @contextmanager
    def entered(self, host: Host) -> Iterator[RowByRowCalls]:
        """Run a pass over all rows with these modules row by row."""
        calls = RowByRowCalls(host)
        if not self._modules:
            yield calls
            return
        with ExitStack() as stack:
            for module in self._modules:
                stack.enter_context(_replaced(module, calls))
            yield calls


def _modules_around(error: BaseException) -> list[nn.Module]:
    """Return the modules whose methods are in an error's traceback, the innermost first."""
    found: dict[int, nn.Module] = {}
    step = error.__traceback__
    while step is not None:
        owner = step.tb_frame.f_locals.get("self")
        # Methods of torch's base class, such as `to`, do not show that the module was running.
        runs = step.tb_frame.f_code.co_name == "forward"
        if isinstance(owner, nn.Module) and (runs or not _is_torchs(owner)):
            found.pop(id(owner), None)
            found[id(owner)] = owner
        step = step.tb_next
    return list(reversed(found.values()))


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "torch"


def _can_run_by_row(module: nn.Module) -> bool:
    """Return whether ordinary autograd on the rows of its parameters gives their gradients."""
    return not any(
        getattr(m, "sparse", False)
        or getattr(m, "max_norm", None) is not None
        or isinstance(m, nn.SyncBatchNorm)
        for m in module.modules()
    )


@contextmanager
def _replaced(module: nn.Module, calls: RowByRowCalls) -> Iterator[None]:
    """Make the forward pass of a module run row by row."""
    before = module.__dict__.get("forward")
    module.forward = ForwardByRow(module, module.forward, calls)
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before


@dataclass(frozen=True, eq=False)
class ForwardByRow:
    """The forward pass of a module that runs row by row.

    Attributes:
        module: The module.
        forward: Its own forward pass.
        calls: The row-by-row calls of the present pass over all rows.
    """

    module: nn.Module
    forward: Callable[..., Any]
    calls: RowByRowCalls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run row by row, except inside a transform of the loss's own."""
        if not self.calls.host.level.is_innermost():
            return self.forward(*args, **kwargs)
        return self.calls.run(self, args, kwargs)


class RowByRowCalls:
    """The row-by-row calls of one pass, and the buffers that are passed from row to row.

    Attributes:
        buffers: The buffers that were written, with their values after the last row, by name.
        modules: The modules that ran row by row, one entry for each call.
    """

    def __init__(self, host: Host) -> None:
        """Take the host of one pass."""
        self.host = host
        self.buffers: Tree = {}
        self.modules: list[nn.Module] = []
        self._seen: set[str] = set()

    def run(self, call: ForwardByRow, args: Any, kwargs: Any) -> Any:
        """Run one call of a module row by row."""
        module, level = call.module, self.host.level
        self.host.adopt_checkpoint()  # before the level is left
        self.modules.append(module)
        values, rebuild = _tree.flatten((args, kwargs))
        _check_plain(module, values)
        shared = [v for v in values if isinstance(v, Tensor) and not level.batched(v)]
        versions = [v._version for v in shared]
        buffers = _Buffers(module, self.host)
        before = [(table, dict(table)) for table in _tables(module)]
        try:
            with level.on_all_rows():
                rows = [
                    level.lower(v).unbind() if level.batched(v) else [v] * level.rows
                    for v in values
                ]
                parameters = _Parameters(module, self.host)
                outputs = []
                for m in range(level.rows):
                    parameters.to_row(m)
                    buffers.to_next_row()
                    given = rebuild(row[m] for row in rows)
                    outputs.append(call.forward(*given[0], **given[1]))
                    _check_kept(module, [row[m] for row in rows], _tree.leaves(given))
                found = _stacked(module, outputs)
            written = buffers.finish()
        finally:
            for table, tensors in before:
                table.update(tensors)
        if any(v._version != version for v, version in zip(shared, versions, strict=True)):
            raise _by_row_error(module, "writes into a tensor that all rows share")
        # Row by row, one call would read what another call wrote for an earlier row.
        if (set(written) & self._seen) or (set(self.buffers) & buffers.names):
            raise _by_row_error(module, "writes a buffer that is used more than once in a pass")
        self._seen |= buffers.names
        self.buffers |= written
        return _tree.tree_map(lambda t: level.wrap(t) if isinstance(t, Tensor) else t, found)


def _tables(module: nn.Module) -> list[dict[str, Any]]:
    """Return the dicts in which a module and its submodules keep their tensors."""
    return [table for part in module.modules() for table in (part._parameters, part._buffers)]


class _Parameters:
    """The parameters of a module, each with a tensor for every row."""

    def __init__(self, module: nn.Module, host: Host) -> None:
        level = host.level
        unbound: dict[int, tuple[Tensor, ...]] = {}
        self._places: list[tuple[dict[str, Any], str, tuple[Tensor, ...]]] = []
        for table in _tables(module):
            for key, tensor in table.items():
                if level.batched(tensor):
                    # All rows at once: the gradient of one row would be as large as that of all.
                    rows = unbound.setdefault(id(tensor), level.lower(host.own(tensor)).unbind())
                    if isinstance(tensor, nn.Parameter):
                        rows = tuple(as_parameter(row) for row in rows)
                    self._places.append((table, key, rows))

    def to_row(self, m: int) -> None:
        """Set the module's parameters to the tensors of row m."""
        for table, key, rows in self._places:
            table[key] = rows[m]


class _Buffers:
    """The buffers of a module, passed from row to row: each row has copies of its own.

    Writes are detected by value, because the kernels of BatchNorm do not change the version.
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
        """Give the next row the buffers as the last row left them."""
        with torch._C.DisableTorchFunction():  # no use of the buffers by the loss
            for table, key in self._places:
                left = table[key]
                if left is None:
                    raise _by_row_error(self._module, "takes a buffer away")
                table[key] = left.detach().clone()

    def finish(self) -> Tree:
        """Return the buffers that were written, with their values after the last row, by name."""
        found: Tree = {}
        with torch._C.DisableTorchFunction():
            for (table, key), before, name in zip(
                self._places, self._before, self._names, strict=True
            ):
                now: Any = table[key]
                if now is not None and torch.equal(now, before):
                    continue
                if now is None or name is None or self._names.count(name) > 1:
                    raise _by_row_error(self._module, "writes a buffer that has several names")
                found[name] = now.detach()
        return found


def _check_plain(module: nn.Module, values: list[Any]) -> None:
    for value in values:
        if not isinstance(value, (Tensor, *PLAIN)):
            raise _by_row_error(module, f"is given or returns {type(value).__name__}")


def _check_kept(module: nn.Module, given: list[Any], found: list[Any]) -> None:
    """Refuse a module that changed the containers of its arguments, because those are copies."""
    if len(given) != len(found) or any(a is not b for a, b in zip(given, found, strict=True)):
        raise _by_row_error(module, "changes the containers it is given")


def _stacked(module: nn.Module, outputs: list[Any]) -> Any:
    """Stack the results of a module for every row, tensor by tensor."""
    flat = [_tree.flatten(output) for output in outputs]
    if len({len(values) for values, _ in flat}) > 1:
        raise _by_row_error(module, "returns more for some rows than for others")
    columns = list(zip(*(values for values, _ in flat), strict=True))
    found = []
    for column in columns:
        _check_plain(module, list(column))
        if all(isinstance(value, Tensor) for value in column):
            if len({value.shape for value in column}) > 1:
                raise _by_row_error(module, "returns tensors of several shapes")
            found.append(torch.stack(column))
        elif any(type(v) is not type(column[0]) or v != column[0] for v in column):
            raise _by_row_error(module, "returns Python values that differ from row to row")
        else:
            found.append(column[0])
    return flat[0][1](found)


def _by_row_error(module: nn.Module, why: str) -> RuntimeError:
    return RuntimeError(f"{type(module).__name__} cannot run row by row inside a pass: it {why}")
