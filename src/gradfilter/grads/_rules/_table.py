"""Which function is run by which rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import _VF

from gradfilter.grads._rules._attention import scaled_dot_product_attention
from gradfilter.grads._rules._batch_norm import batch_norm
from gradfilter.grads._rules._conv import conv, conv_transpose
from gradfilter.grads._rules._cross_entropy import class_loss
from gradfilter.grads._rules._embedding import embedding
from gradfilter.grads._rules._group_norm import group_norm, instance_norm
from gradfilter.grads._rules._host import Rule
from gradfilter.grads._rules._layer_norm import layer_norm, rms_norm
from gradfilter.grads._rules._linear import linear
from gradfilter.grads._rules._multi_head_attention import multi_head_attention
from gradfilter.grads._rules._recurrent import recurrent
from gradfilter.grads._rules._weight_norm import weight_norm

RULES: dict[Callable[..., Any], Rule] = {
    F.linear: linear,
    F.conv1d: conv(1),
    F.conv2d: conv(2),
    F.conv3d: conv(3),
    F.conv_transpose1d: conv_transpose(1),
    F.conv_transpose2d: conv_transpose(2),
    F.conv_transpose3d: conv_transpose(3),
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.embedding: embedding,
    F.cross_entropy: class_loss(F.cross_entropy),
    F.nll_loss: class_loss(F.nll_loss),
    torch._weight_norm: weight_norm,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention,
    **{kernel: recurrent(kernel) for kernel in (_VF.lstm, _VF.gru, _VF.rnn_tanh, _VF.rnn_relu)},
}
"""Everything else runs under vmap as it is: exact, and slower."""
