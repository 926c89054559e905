"""Random stacks and trees, and named assertions, for comparisons with naive code."""

import torch

# Leaves of several ranks, so that a reduction over the wrong axis cannot go unnoticed.
SHAPES = {"fc.weight": (2, 3), "fc.bias": (4,), "scale": (), "conv.weight": (2, 1, 2)}
WIDTH = sum(torch.Size(shape).numel() for shape in SHAPES.values())

BAD = ("nan", "inf", "-inf", "all nan")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    """Return standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def unflat(matrix, shapes=SHAPES):
    """Convert rows (..., P) to leaves (..., *shape)."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    parts = matrix.split(sizes, dim=-1)
    return {
        name: part.reshape((*matrix.shape[:-1], *shape))
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def flat(tree, batch_dims=0):
    """Convert leaves (..., *shape) to rows (..., P)."""
    return torch.cat([leaf.reshape(*leaf.shape[:batch_dims], -1) for leaf in tree.values()], -1)


def normal_tree(seed=0, shapes=SHAPES):
    return unflat(normal(sum(torch.Size(s).numel() for s in shapes.values()), seed=seed), shapes)


def zeros(shapes=SHAPES):
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}


def random_matrix(seed, rows, kinds=("plain",)):
    """Make flat rows (M, P) of very different sizes around one common direction.

    Args:
        seed: The seed of all numbers.
        rows: M.
        kinds: The distribution of each row: "plain", "zero", "tiny" (norm below 1e-8), or one of
            BAD.
    """
    g = generator(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)
    matrix = draw(WIDTH) + draw(rows, WIDTH) * (1 + draw(()).abs())
    matrix = matrix * 10 ** draw(rows, 1)
    for i in range(rows):
        kind = kinds[torch.randint(len(kinds), (), generator=g)]
        at = torch.randint(WIDTH, (), generator=g)
        if kind == "zero":
            matrix[i] = 0
        elif kind == "tiny":
            matrix[i] *= 1e-9 / matrix[i].norm()
        elif kind == "all nan":
            matrix[i] = torch.nan
        elif kind != "plain":
            matrix[i, at] = float(kind)
    return matrix


def run(link, rows, params=None, **extra):
    """Run one update of a transform from its first state; return gradients and published values."""
    params = zeros() if params is None else params
    grads, _, out = link.update(rows, link.init(params), params, **extra)
    return grads, out


def assert_close(actual, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


def assert_same(actual, expected):
    """Assert that trees are bit-equal, with NaN equal to NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
