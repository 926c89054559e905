"""The reference: ordinary backward passes over a plain loss or module, one per microbatch."""

import copy

import torch


def plain_rows(loss, params, batch, m):
    """Return the gradient of ``loss(params, batch)`` for every microbatch as a row. (M, P)."""
    parts = [t.chunk(m) for t in batch]
    rows = []
    for k in range(m):
        leaves = [p.detach().clone().requires_grad_() for p in params.values()]
        value = loss(dict(zip(params, leaves, strict=True)), tuple(part[k] for part in parts))
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        rows.append(_flat(grads, leaves))
    return torch.stack(rows)


def module_rows(model, criterion, batch, m):
    """Run ordinary passes of a module in order; whatever it keeps goes from row to row.

    Returns:
        The losses (M,), and the gradients of every parameter (M, *shape) by name.
    """
    params = dict(model.named_parameters())
    losses, rows = [], []
    for x, y in zip(*(t.chunk(m) for t in batch), strict=True):
        value = criterion(model(x), y)
        leaves = list(params.values())
        rows.append(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True))
        losses.append(value.detach())
    stacked = map(torch.stack, zip(*rows, strict=True))
    return torch.stack(losses), dict(zip(params, stacked, strict=True))


def plain_sam_rows(model, criterion, batch, m, rho):
    """Perturb each row along itself, as SAM: g(w + rho g / |g|). (M, P)."""
    parts = [t.chunk(m) for t in batch]
    rows, carried = [], copy.deepcopy(model)
    for k in range(m):
        x, y = (part[k] for part in parts)
        own = copy.deepcopy(carried)  # running statistics as the rows before left them
        params = list(own.parameters())
        before = [b.clone() for b in own.buffers()]
        first = torch.autograd.grad(criterion(own(x), y), params)
        with torch.no_grad():
            scale = rho / torch.cat([g.flatten() for g in first]).norm()
            for p, g in zip(params, first, strict=True):
                p.add_(scale * g)
            for b, old in zip(own.buffers(), before, strict=True):
                b.copy_(old)
            carried(x)
        rows.append(_flat(torch.autograd.grad(criterion(own(x), y), params), params))
    return torch.stack(rows)


def side_by_side(stacked, names):
    """Join the leaves (M, ...) of a stack to one matrix (M, P)."""
    return torch.cat([stacked[name].flatten(1) for name in names], 1)


def off(got, want):
    """Return the norm of the difference, relative to the expected norm."""
    return float((got - want).norm() / want.norm())


def _flat(grads, leaves):
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for g, p in zip(grads, leaves, strict=True)
        ]
    )
