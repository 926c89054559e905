"""Which function is run by which rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from gradfilter.grads._rules._attention import scaled_dot_product_attention
from gradfilter.grads._rules._batch_norm import batch_norm
from gradfilter.grads._rules._cells import CELLS
from gradfilter.grads._rules._conv import conv, conv_transpose
from gradfilter.grads._rules._cross_entropy import class_loss
from gradfilter.grads._rules._embedding import embedding, embedding_of
from gradfilter.grads._rules._embedding_bag import embedding_bag, embedding_bag_of
from gradfilter.grads._rules._group_norm import group_norm, instance_norm
from gradfilter.grads._rules._host import Rule
from gradfilter.grads._rules._layer_norm import layer_norm, rms_norm
from gradfilter.grads._rules._linear import linear
from gradfilter.grads._rules._memory_format import FORMATS
from gradfilter.grads._rules._multi_head_attention import multi_head_attention
from gradfilter.grads._rules._recurrent import recurrent
from gradfilter.grads._rules._spellings import below, spellings
from gradfilter.grads._rules._vmap_faults import FAULTS
from gradfilter.grads._rules._weight_norm import weight_norm

RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")

RULES: dict[Callable[..., Any], Rule] = {
    **{f: conv(d) for d in (1, 2, 3) for f in spellings(f"conv{d}d")},
    **{f: conv_transpose(d) for d in (1, 2, 3) for f in spellings(f"conv_transpose{d}d")},
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.embedding: embedding,
    **dict.fromkeys(spellings("embedding"), embedding_of),
    F.embedding_bag: embedding_bag,
    **dict.fromkeys(spellings("embedding_bag"), embedding_bag_of),
    **below("batch_norm", batch_norm),
    **below("layer_norm", layer_norm),
    **below("rms_norm", rms_norm),
    **below("group_norm", group_norm),
    **below("instance_norm", instance_norm),
    F.cross_entropy: class_loss(F.cross_entropy),
    F.nll_loss: class_loss(F.nll_loss),
    **below("_weight_norm", weight_norm),
    **below("linear", linear),
    **below("scaled_dot_product_attention", scaled_dot_product_attention),
    F.multi_head_attention_forward: multi_head_attention,
    **{f: recurrent(f) for name in RECURRENT for f in spellings(name)},
    **{f: rule for name, rule in CELLS.items() for f in spellings(name)},
    **FORMATS,
    **FAULTS,
}
"""Everything else runs under vmap as it is: exact, and slower."""
