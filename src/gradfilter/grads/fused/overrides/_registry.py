"""The table of operation overrides: which function is replaced by which override."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from gradfilter.grads.fused._host import Override
from gradfilter.grads.fused.overrides._attention import (
    multi_head_attention,
    scaled_dot_product_attention,
)
from gradfilter.grads.fused.overrides._convolution import FORMATS, conv, conv_transpose
from gradfilter.grads.fused.overrides._cross_entropy import class_loss
from gradfilter.grads.fused.overrides._embedding import embedding, embedding_of
from gradfilter.grads.fused.overrides._embedding_bag import embedding_bag, embedding_bag_of
from gradfilter.grads.fused.overrides._linear import linear, weight_norm
from gradfilter.grads.fused.overrides._losses import LOSSES
from gradfilter.grads.fused.overrides._matrix_products import PRODUCTS
from gradfilter.grads.fused.overrides._norms import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)
from gradfilter.grads.fused.overrides._recurrent import CELLS, recurrent
from gradfilter.grads.fused.overrides._row_by_row import ROW_BY_ROW
from gradfilter.grads.fused.overrides._spellings import override_spellings, spellings
from gradfilter.grads.fused.overrides._vmap_faults import FAULTS

RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")

OVERRIDES: dict[Callable[..., Any], Override] = {
    **{f: conv(d) for d in (1, 2, 3) for f in spellings(f"conv{d}d")},
    **{f: conv_transpose(d) for d in (1, 2, 3) for f in spellings(f"conv_transpose{d}d")},
    **ROW_BY_ROW,
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.embedding: embedding,
    **dict.fromkeys(spellings("embedding"), embedding_of),
    F.embedding_bag: embedding_bag,
    **{f: embedding_bag_of(ROW_BY_ROW[f]) for f in spellings("embedding_bag")},
    **override_spellings("batch_norm", batch_norm),
    **override_spellings("layer_norm", layer_norm),
    **override_spellings("rms_norm", rms_norm),
    **override_spellings("group_norm", group_norm),
    **override_spellings("instance_norm", instance_norm),
    F.cross_entropy: class_loss(F.cross_entropy),
    F.nll_loss: class_loss(F.nll_loss),
    **override_spellings("_weight_norm", weight_norm),
    **override_spellings("linear", linear),
    **override_spellings("scaled_dot_product_attention", scaled_dot_product_attention),
    F.multi_head_attention_forward: multi_head_attention,
    **{f: recurrent(f) for name in RECURRENT for f in spellings(name)},
    **{f: override for name, override in CELLS.items() for f in spellings(name)},
    **PRODUCTS,
    **LOSSES,
    **FORMATS,
    **FAULTS,
}
"""The override of each function. All other functions run under vmap: exact, but slower."""

TAKES_MOVES = {
    *(f for d in (1, 2, 3) for f in spellings(f"conv{d}d")),
    *(f for d in (1, 2, 3) for f in spellings(f"conv_transpose{d}d")),
    *spellings("embedding"),
    *spellings("linear"),
    *(f for name in CELLS for f in spellings(name)),
}
TAKES_MOVES |= {F.linear, F.embedding, F.multi_head_attention_forward}
"""Functions whose overrides add `Weight.move`; other functions get the values of all rows."""

NORMS = {F.batch_norm, F.layer_norm, F.rms_norm, F.group_norm, F.instance_norm}
NORMS |= {f for norm in tuple(NORMS) for f in spellings(norm.__name__)}

TAKES_SHARDS = TAKES_MOVES | NORMS | PRODUCTS.keys()
"""Functions whose overrides gather a sharded parameter; of `NORMS`, the input is gathered before.

Other functions get the whole parameter as values of all rows, so that autograd may hold it.
"""
