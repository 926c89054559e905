"""Attention: by `scaled_dot_product_attention`, by `nn.MultiheadAttention`, and written out."""

import torch
import torch.nn.functional as F
from torch import nn

from _zoo_case import Case, Net, inputs, parameter

T, D, H = 4, 8, 2  # tokens, width, heads


class Attention(nn.Module):
    """Self-attention with a given inner call."""

    def __init__(self, attend, kv_heads=H):
        super().__init__()
        self.attend, self.kv_heads = attend, kv_heads
        self.q, self.out = nn.Linear(D, D), nn.Linear(D, D)
        self.kv = nn.Linear(D, 2 * kv_heads * D // H)

    def forward(self, x):
        heads = lambda t, h: t.unflatten(-1, (h, D // H)).transpose(1, 2)
        k, v = self.kv(x).chunk(2, -1)
        h = self.attend(heads(self.q(x), H), heads(k, self.kv_heads), heads(v, self.kv_heads), x)
        return self.out(h.transpose(1, 2).flatten(2)) + x


def sdpa(kv_heads=H, **options):
    attend = lambda q, k, v, x: F.scaled_dot_product_attention(q, k, v, **options)
    return lambda: Attention(attend, kv_heads)


def masked(make):
    """Build attention with a mask made of the inputs, or the same for all samples."""

    def attend(q, k, v, x):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=make(x))

    return lambda: Attention(attend)


def by_hand():
    def attend(q, k, v, x):
        scores = (q @ k.transpose(-1, -2)).div(2).masked_fill(x.new_ones(T, T).triu(1) > 0, -1e9)
        return torch.einsum("nhqk,nhkd->nhqd", scores.softmax(-1), v)

    return Attention(attend)


def learnt_queries():
    """Build attention whose queries are a parameter without a batch axis."""

    def run(net, x):
        k, v = net.kv(x).chunk(2, -1)
        query = net.queries.expand(len(x), -1, -1)
        return F.scaled_dot_product_attention(query, k, v, scale=0.7)

    return Net(run, queries=parameter(1, 3, D), kv=nn.Linear(D, 2 * D))


def lower(x):
    return x.new_ones(T, T).tril().bool()


def biased(x):
    """Make a float mask (n, 1, T, T) that has a gradient."""
    return -(x[:, None, :, :T] ** 2)


def keys_present(x):
    """Make a mask (n, 1, 1, T) that omits keys whose first number is positive."""
    there = x[:, :, 0] <= 0
    return (there | (torch.arange(T, device=x.device) == 0))[:, None, None]


def self_attention(**options):
    first = options.get("batch_first", True)
    call = {k: options.pop(k) for k in ("need_weights", "average_attn_weights") if k in options}

    def run(net, x):
        x = net.embed(x)
        x = x if first else x.transpose(0, 1)
        output, weights = net.mha(x, x, x, **call)
        output = output if first else output.transpose(0, 1)
        return output if weights is None else torch.cat([output.flatten(1), weights.flatten(1)], 1)

    mha = nn.MultiheadAttention(D, H, **{"batch_first": True, **options})
    return lambda: Net(run, embed=nn.Linear(D, D), mha=mha)


def with_padding(merge):
    """Build nn.MultiheadAttention with a key padding mask and a causal mask."""

    def run(net, x):
        causal = x.new_ones(T, T, dtype=torch.bool).triu(1) if merge else None
        absent = ~keys_present(x)[:, 0, 0]
        return net.mha(x, x, x, key_padding_mask=absent, attn_mask=causal, need_weights=False)[0]

    return lambda: Net(run, mha=nn.MultiheadAttention(D, H, batch_first=True))


def cross():
    """Build attention whose keys and values have other widths and another length."""

    def run(net, x):
        keys, values = net.k(x[:, :3]), net.v(x[:, :3])
        return net.mha(x, keys, values, need_weights=False)[0]

    mha = nn.MultiheadAttention(D, H, kdim=5, vdim=6, batch_first=True)
    return Net(run, mha=mha, k=nn.Linear(D, 5), v=nn.Linear(D, 6))


def encoder(**options):
    def build():
        layer = nn.TransformerEncoderLayer(
            D, H, 12, dropout=0.0, **{"batch_first": True, **options}
        )
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    return build


def decoder():
    def run(net, x):
        causal = nn.Transformer.generate_square_subsequent_mask(T, x.device, x.dtype)
        return net.layer(x, net.memory(x[:, :3]), tgt_mask=causal, tgt_is_causal=True)

    layer = nn.TransformerDecoderLayer(D, H, 12, dropout=0.0, batch_first=True)
    return Net(run, layer=layer, memory=nn.Linear(D, D))


def late(make):
    """Delay building until the case is built, so that its random numbers are used."""
    return lambda: make()()


SDPA = {
    "plain": sdpa(),
    "causal": sdpa(is_causal=True),
    "scaled": sdpa(scale=0.3),
    "grouped-queries": sdpa(kv_heads=1, enable_gqa=True, is_causal=True),
    "bool-mask": masked(lower),
    "float-mask": masked(biased),
    "key-padding": masked(keys_present),
    "learnt-queries": learnt_queries,
}
MULTI_HEAD = {
    "self": lambda: self_attention(need_weights=False),
    "weights": lambda: self_attention(),
    "weights-per-head": lambda: self_attention(average_attn_weights=False),
    "sequence-first": lambda: self_attention(batch_first=False, need_weights=False),
    "no-bias": lambda: self_attention(bias=False, need_weights=False),
    "bias-kv": lambda: self_attention(add_bias_kv=True, need_weights=False),
    "zero-attention": lambda: self_attention(add_zero_attn=True),
    "key-padding": lambda: with_padding(False),
    "padding-and-causal": lambda: with_padding(True),
}

CASES = [
    *(
        Case(f"attention-{name}", build, inputs(T, D), rules="attention linear")
        for name, build in SDPA.items()
    ),
    Case("attention-by-hand", by_hand, inputs(T, D), rules="linear"),
    *(
        Case(f"multi-head-{name}", late(make), inputs(T, D), rules="multi_head_attention")
        for name, make in MULTI_HEAD.items()
    ),
    Case("multi-head-cross", cross, inputs(T, D), rules="multi_head_attention linear"),
    Case("encoder-post-norm", encoder(), inputs(T, D), rules="multi_head_attention layer_norm"),
    Case(
        "encoder-pre-norm",
        encoder(norm_first=True, activation="gelu"),
        inputs(T, D),
        rules="multi_head_attention layer_norm linear",
    ),
    Case("decoder", decoder, inputs(T, D), rules="multi_head_attention layer_norm linear"),
]
