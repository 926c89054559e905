"""Embeddings: padding, frequencies, bags, and weights tied to the output."""

import torch
from torch import nn

from _zoo_case import Case, Net, frozen, inputs, parameter, token_loss, tokens

VOCABULARY, LENGTH, PAD = 11, 6, 3


def embedded(**options):
    run = lambda net, ids: net.out(net.embed(ids).tanh())
    return lambda: Net(
        run, embed=nn.Embedding(VOCABULARY, 4, **options), out=nn.Linear(4, VOCABULARY)
    )


def tied(pad=None):
    """Build a model in which one matrix embeds the tokens and computes the output."""

    def run(net, ids):
        place = torch.arange(LENGTH, device=ids.device)
        return net.out(net.mix(net.embed(ids) + net.place(place)).tanh())

    net = Net(
        run,
        embed=nn.Embedding(VOCABULARY, 4, padding_idx=pad),
        place=nn.Embedding(LENGTH, 4),
        mix=nn.Linear(4, 4),
        out=nn.Linear(4, VOCABULARY, bias=False),
    )
    net.out.weight = net.embed.weight
    return net


def two_uses():
    """Build a padded embedding that is used twice, on ids of different shapes."""
    run = lambda net, ids: net.out(net.embed(ids) * net.embed(ids[:, :1]).tanh())
    return Net(
        run,
        embed=nn.Embedding(VOCABULARY, 4, padding_idx=PAD),
        out=nn.Linear(4, VOCABULARY),
    )


def one_id():
    """Build an embedding of one id per sample: (n,)."""
    run = lambda net, ids: net.out(net.embed(ids).tanh())
    return Net(run, embed=nn.Embedding(VOCABULARY, 4), out=nn.Linear(4, 3))


def bag(mode, **options):
    run = lambda net, ids: net.out(net.bag(ids).tanh())
    make = lambda: nn.EmbeddingBag(VOCABULARY, 4, mode=mode, **options)
    return lambda: Net(run, bag=make(), out=nn.Linear(4, 3))


def indexed():
    """Build a model that indexes rows of a parameter, some of them many times."""
    run = lambda net, ids: net.table[ids].tanh() @ net.table.t()
    return Net(run, table=parameter(VOCABULARY, 4))


def gathered():
    """Build a model of index_select, gather, and a product with unit vectors."""

    def run(net, ids):
        rows = torch.index_select(net.table, 0, ids.flatten()).unflatten(0, ids.shape)
        places = torch.arange(VOCABULARY, device=ids.device)
        one_hot = (ids[..., None] == places).to(rows.dtype) @ net.table
        ranked = torch.gather(rows, 1, ids[..., None].expand_as(rows) % LENGTH)
        return (rows + one_hot * ranked) @ net.table.t()

    return Net(run, table=parameter(VOCABULARY, 4))


def embedded_features():
    """Build a model that computes ids from the inputs: no tensor of the batch is an index."""
    run = lambda net, x: net.out(net.embed((x > 0).long()).flatten(1) * x.repeat(1, 2))
    return Net(run, embed=nn.Embedding(2, 2), out=nn.Linear(12, 4))


def one_hot():
    """Build a layer on tokens as unit vectors; torch's one_hot reads values on the host."""
    run = lambda net, ids: net.out(nn.functional.one_hot(ids, VOCABULARY).to(net.out.weight.dtype))
    return Net(run, out=nn.Linear(VOCABULARY, VOCABULARY))


def padded(n):
    """Make tokens with padding in every microbatch, also whole samples of padding."""
    ids, labels = tokens()(n)
    for row, count in enumerate(torch.arange(n) % (LENGTH + 1)):
        ids[row, LENGTH - count :] = PAD
    return ids, labels


def ids_of_bags(n):
    ids, _ = padded(n)
    ids[:, 0] = 1  # a bag of nothing but padding is no number
    return ids, torch.arange(n) % 5


def single_ids(n):
    return torch.randint(0, VOCABULARY, (n,)), torch.arange(n) % 5


def case(name, build, batch=padded, rules="embedding linear", **options):
    return Case(name, build, batch, token_loss, rules, **options)


CASES = [
    case("embedding", embedded()),
    case("embedding-padding", embedded(padding_idx=PAD)),
    case("embedding-negative-padding", embedded(padding_idx=PAD - VOCABULARY)),
    case("embedding-by-frequency", embedded(scale_grad_by_freq=True), rules="linear"),
    case(
        "embedding-by-frequency-padding",
        embedded(scale_grad_by_freq=True, padding_idx=PAD),
        rules="linear",
    ),
    case("embedding-frozen", lambda: frozen(embedded(padding_idx=PAD)(), "embed"), rules="linear"),
    case("embedding-used-twice", two_uses),
    case("tied-head", tied),
    case("tied-head-padding", lambda: tied(PAD)),
    case("table-indexed", indexed, rules=""),
    case("table-gathered", gathered, rules=""),
    case("one-hot", one_hot, rules="linear", may_refuse="one_hot"),
    Case("embedding-one-id", one_id, single_ids, rules="embedding linear"),
    *(
        Case(
            f"embedding-bag-{mode}",
            bag(mode, padding_idx=PAD),
            ids_of_bags,
            rules="embedding_bag linear",
        )
        for mode in ("sum", "mean", "max")
    ),
    Case("lookup-of-features", embedded_features, inputs(6), rules="linear"),
]
