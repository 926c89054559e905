"""Layers of random modules: vectors, sequences, images and tokens in, one of the first three out.

Every forward pass is a function found by name, so that a module made of them can be pickled.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

WIDTH, LENGTH, CHANNELS, SIDE, VOCABULARY = 6, 4, 3, 5, 7
SHAPES = {
    "vector": (WIDTH,),
    "sequence": (LENGTH, WIDTH),
    "image": (CHANNELS, SIDE, SIDE),
    "tokens": (LENGTH,),
}


@dataclass(frozen=True)
class LayerKind:
    """One kind of layer.

    Args:
        make: Makes the module.
        takes: The kind of its input.
        gives: The kind of its output.
        refuse: Plans that may refuse it: "never", "fused" (and "vmap"), or "all".
        random: When it draws from torch's default generator, so that plans differ in the
            numbers: "training", "always", or "" for never.
        smooth: Its answer in low precision is near that in float64.
    """

    make: Callable[[], nn.Module]
    takes: str = "vector"
    gives: str = "vector"
    refuse: str = "never"
    random: str = ""
    smooth: bool = True


FORWARDS: dict[str, Callable[..., torch.Tensor]] = {}
LAYERS: dict[str, LayerKind] = {}


class Layer(nn.Module):
    """Modules and parameters by name, and a forward pass found by the layer's own name."""

    def __init__(self, kind: str, **parts):
        super().__init__()
        self.kind = kind
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return FORWARDS[self.kind](self, x)

    def extra_repr(self):
        return self.kind


def layer(name, takes="vector", gives=None, **options):
    """Register a layer whose parts are made by the decorated function or class."""

    def register(make):
        LAYERS[name] = LayerKind(make, takes, gives or takes, **options)
        return make

    return register


def written(name, parts, takes="vector", gives=None, **options):
    """Register a layer whose forward pass is the decorated function of (layer, input)."""

    def register(run):
        FORWARDS[name] = run
        LAYERS[name] = LayerKind(lambda: Layer(name, **parts()), takes, gives or takes, **options)
        return run

    return register


def parameter(*shape):
    return nn.Parameter(0.5 * torch.randn(shape))


# Vectors.

layer("linear")(lambda: nn.Linear(WIDTH, WIDTH))
layer("linear without bias")(lambda: nn.Linear(WIDTH, WIDTH, bias=False))
layer("layer norm")(lambda: nn.LayerNorm(WIDTH))
layer("layer norm without affine")(lambda: nn.LayerNorm(WIDTH, elementwise_affine=False))
layer("rms norm")(lambda: nn.RMSNorm(WIDTH))
layer("rms norm with eps")(lambda: nn.RMSNorm(WIDTH, eps=1e-3))
layer("group norm of vectors")(lambda: nn.GroupNorm(2, WIDTH))
layer("batch norm")(lambda: nn.BatchNorm1d(WIDTH))
layer("batch norm in eval")(lambda: nn.BatchNorm1d(WIDTH).eval())
layer("batch norm, cumulative")(lambda: nn.BatchNorm1d(WIDTH, momentum=None))
layer("batch norm, momentum 0.7")(lambda: nn.BatchNorm1d(WIDTH, momentum=0.7))
layer("batch norm without affine")(lambda: nn.BatchNorm1d(WIDTH, affine=False))
layer("batch norm without statistics")(lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False))
layer("prelu")(lambda: nn.PReLU(WIDTH))
layer("bottleneck")(
    lambda: nn.Sequential(nn.Linear(WIDTH, 3), nn.ReLU(inplace=True), nn.Linear(3, WIDTH))
)
layer("weight norm")(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)))
layer("orthogonal", smooth=False)(
    lambda: nn.utils.parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH), orthogonal_map="cayley")
)
layer("spectral norm", refuse="fused", smooth=False)(
    lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
)
layer("old weight norm", refuse="fused")(lambda: _old_weight_norm())
layer("bilinear of itself")(lambda: Layer("bilinear of itself", a=nn.Bilinear(WIDTH, WIDTH, WIDTH)))
layer("dropout", random="training")(lambda: nn.Dropout(0.3))
layer("alpha dropout", random="training")(lambda: nn.AlphaDropout(0.3))
layer("dropout in eval")(lambda: nn.Dropout(0.3).eval())
FORWARDS["bilinear of itself"] = lambda self, x: self.a(x, x.tanh())


def _old_weight_norm():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))


class OwnMomentum(nn.BatchNorm1d):
    """BatchNorm whose momentum falls with the number of batches in its counter."""

    def forward(self, x):
        if self.training:
            self.momentum = 0.5 / (1 + int(self.num_batches_tracked))
        return super().forward(x)


class Renormalised(nn.BatchNorm1d):
    """BatchNorm that multiplies its counter into its output."""

    def forward(self, x):
        return super().forward(x) * (1 + 0.1 * self.num_batches_tracked)


layer("batch norm, momentum from its counter", refuse="fused")(lambda: OwnMomentum(WIDTH))
layer("batch norm times its counter", refuse="all")(lambda: Renormalised(WIDTH))


for name in ("layer norm", "rms norm", "group norm of vectors", "batch norm"):
    # Numbers near eps: in low precision, an eps of the wrong dtype is seen here only.
    layer(f"{name}, small numbers")(
        lambda name=name: Layer("of small numbers", norm=LAYERS[name].make())
    )
FORWARDS["of small numbers"] = lambda self, x: self.norm(0.03 * x)


@written("bare matmul", lambda: {"w": parameter(WIDTH, WIDTH)})
def _matmul(self, x):
    return x @ self.w


@written("addmm", lambda: {"w": parameter(WIDTH, WIDTH), "b": parameter(WIDTH)})
def _addmm(self, x):
    return torch.addmm(self.b, x, self.w.T)


@written("einsum", lambda: {"w": parameter(2, WIDTH, WIDTH)})
def _einsum(self, x):
    return torch.einsum("bi,hij->bj", x, self.w)


@written("low rank", lambda: {"base": nn.Linear(6, 6), "a": parameter(6, 2), "b": parameter(2, 6)})
def _low_rank(self, x):
    return self.base(x) + x @ self.a @ self.b


@written("scale and shift", lambda: {"scale": parameter(), "shift": parameter(WIDTH)})
def _scale(self, x):
    return x * (1 + self.scale) + self.shift


@written("residual", lambda: {"a": nn.Linear(6, 6), "norm": nn.LayerNorm(6)})
def _residual(self, x):
    return x + self.a(self.norm(x)).relu()


@written("reused linear", lambda: {"a": nn.Linear(6, 6)})
def _reused(self, x):
    return self.a(self.a(x).tanh())


@written("transposed weight", lambda: {"a": nn.Linear(6, 6)})
def _transposed(self, x):
    return F.linear(self.a(x).sigmoid(), self.a.weight.T)


@written("gate", lambda: {"a": nn.Linear(6, 12)})
def _gate(self, x):
    return F.glu(self.a(x), -1)


@written("standardised weight", lambda: {"a": nn.Linear(6, 6)})
def _standardised(self, x):
    w = self.a.weight
    return F.linear(x, (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 0.1), self.a.bias)


@written("norm of a weight", lambda: {"a": nn.Linear(6, 6), "g": parameter(6)})
def _unit(self, x):
    return F.linear(x, F.normalize(self.a.weight, dim=1)) * self.g


@written("frozen linear", lambda: {"a": nn.Linear(6, 6).requires_grad_(False), "b": parameter(6)})
def _frozen(self, x):
    return self.a(x) + self.b


@written("frozen bias", lambda: {"a": nn.Linear(6, 6)})
def _frozen_bias(self, x):
    return self.a(x)


def _freeze_bias():
    made = Layer("frozen bias", a=nn.Linear(6, 6))
    made.a.bias.requires_grad_(False)
    return made


LAYERS["frozen bias"] = LayerKind(_freeze_bias)


@written("unused parameters", lambda: {"a": nn.Linear(6, 6), "spare": nn.Linear(2, 2)})
def _unused(self, x):
    return self.a(x)


@written("tied linears", lambda: {})
def _tied(self, x):
    return self.b(self.a(x).tanh())


def _tie():
    made = Layer("tied linears", a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    made.b.weight = made.a.weight
    return made


LAYERS["tied linears"] = LayerKind(_tie)


@written("one module under two names", lambda: {})
def _two_names(self, x):
    return self.second(self.first(x).tanh())


def _under_two_names():
    shared = nn.Linear(6, 6)
    return Layer("one module under two names", first=shared, second=shared)


LAYERS["one module under two names"] = LayerKind(_under_two_names)


@written("parameter list", lambda: {"ws": nn.ParameterList([parameter(6, 6), parameter(6)])})
def _list(self, x):
    return x @ self.ws[0] * self.ws[1]


@written("module dict", lambda: {"d": nn.ModuleDict({"x": nn.Linear(6, 6), "y": nn.Tanh()})})
def _dict(self, x):
    return self.d["y"](self.d["x"](x))


@written("get_parameter", lambda: {"a": nn.Linear(6, 6)})
def _get_parameter(self, x):
    return F.linear(x, self.get_parameter("a.weight"), dict(self.named_parameters())["a.bias"])


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * torch.sigmoid(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * (s + x * s * (1 - s))


class OldSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    backward = Swish.backward


@written("autograd function", lambda: {"a": nn.Linear(6, 6)}, refuse="fused")
def _function(self, x):
    return Swish.apply(self.a(x))


@written("autograd function of the old form", lambda: {"a": nn.Linear(6, 6)}, refuse="fused")
def _old_function(self, x):
    return OldSwish.apply(self.a(x))


class Clipped(torch.autograd.Function):
    """The identity, whose backward pass is not linear."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.05, 0.05)


class ClippedByVmap(Clipped):
    """The identity with a backward pass that is not linear, with a rule for vmap."""

    generate_vmap_rule = True


@written("function for vmap that clips its gradient", lambda: {"a": nn.Linear(6, 6)})
def _clipped_by_vmap(self, x):
    return ClippedByVmap.apply(self.a(x))


@written("function that clips its gradient", lambda: {"a": nn.Linear(6, 6)}, refuse="fused")
def _clipped(self, x):
    return Clipped.apply(self.a(x))


@written("checkpointed", lambda: {"a": nn.Linear(6, 6)}, refuse="vmap")
def _checkpointed(self, x):
    return torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=False).tanh()


@written("reentrant checkpoint", lambda: {"a": nn.Linear(6, 6)}, refuse="all")
def _reentrant(self, x):
    return torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=True).tanh()


@written("gaussian noise", lambda: {"a": nn.Linear(6, 6)}, random="always")
def _gaussian(self, x):
    return self.a(x + 0.1 * torch.randn_like(x))


@written("fresh noise", lambda: {"a": nn.Linear(6, 6)}, random="always")
def _fresh(self, x):
    return self.a(x) + 0.1 * torch.randn(x.shape[-1], dtype=x.dtype)


@written("sorted and cut", lambda: {"a": nn.Linear(6, 6)}, smooth=False)
def _sorted(self, x):
    values, _ = self.a(x).sort(-1)
    return torch.cat([values.topk(3, -1).values, values[..., :3]], -1)


@written("masked", lambda: {"a": nn.Linear(6, 6)}, smooth=False)
def _masked(self, x):
    h = self.a(x)
    return torch.where(h > 0, h, 0.1 * h).masked_fill(x > 1.5, 0.5)


@written("list of outputs", lambda: {"a": nn.Linear(6, 6)})
def _stacked(self, x):
    parts = self.a(x).chunk(3, -1)
    return torch.stack([p.square() for p in parts[:2]] + [parts[2]], 1).flatten(1)


@written("written by index", lambda: {"a": nn.Linear(6, 6)}, refuse="fused")
def _by_index(self, x):
    h = torch.zeros_like(x)
    h[:, ::2] = self.a(x)[:, ::2]
    h[:, 1] = x[:, 1]
    return h


@written("new zeros written", lambda: {"a": nn.Linear(6, 6)}, refuse="fused")
def _new_zeros(self, x):
    h = torch.zeros(x.shape, dtype=x.dtype)
    h += self.a(x)
    return h


@written("doubled in place", lambda: {"a": nn.Linear(6, 6)})
def _doubled(self, x):
    return self.a(x).mul_(2).add_(x).tanh_()


# Sequences.

seq = {"takes": "sequence"}
layer("linear on sequences", **seq)(lambda: nn.Linear(WIDTH, WIDTH))
layer("layer norm on sequences", **seq)(lambda: nn.LayerNorm(WIDTH))
layer("layer norm over two axes", **seq)(lambda: nn.LayerNorm((LENGTH, WIDTH)))
layer("rms norm on sequences", **seq)(lambda: nn.RMSNorm(WIDTH))
layer("batch norm on sequences", **seq)(lambda: nn.BatchNorm1d(LENGTH))
layer("instance norm on sequences", **seq)(lambda: nn.InstanceNorm1d(LENGTH, affine=True))
layer("instance norm with statistics", refuse="fused", **seq)(
    lambda: nn.InstanceNorm1d(LENGTH, affine=True, track_running_stats=True)
)
layer("instance norm in eval", refuse="fused", **seq)(
    lambda: nn.InstanceNorm1d(LENGTH, affine=True, track_running_stats=True).eval()
)
layer("conv1d", **seq)(lambda: nn.Conv1d(LENGTH, LENGTH, 3, padding=1))
layer("transformer layer", **seq)(
    lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)
)
layer("transformer layer in eval", **seq)(
    lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, norm_first=True).eval()
)
layer("transformer layer with dropout", random="training", **seq)(
    lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.2, batch_first=True)
)
for cell in ("LSTM", "GRU", "RNN"):
    layer(f"{cell} layer", refuse="vmap", **seq)(
        lambda cell=cell: Layer("recurrent", a=getattr(nn, cell)(WIDTH, WIDTH, batch_first=True))
    )
layer("bidirectional LSTM", refuse="vmap", **seq)(
    lambda: Layer("recurrent", a=nn.LSTM(WIDTH, 3, 2, batch_first=True, bidirectional=True))
)
layer("projected LSTM", refuse="vmap", **seq)(
    lambda: Layer("recurrent", a=nn.LSTM(WIDTH, 8, batch_first=True, proj_size=WIDTH))
)
layer("LSTM with dropout", random="training", refuse="vmap", **seq)(
    lambda: Layer("recurrent", a=nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, dropout=0.3))
)
FORWARDS["recurrent"] = lambda self, x: self.a(x)[0]


@written("LSTM cell", lambda: {"a": nn.LSTMCell(6, 6)}, refuse="fused", **seq)
def _cell(self, x):
    state = None
    for t in range(x.shape[1]):
        state = self.a(x[:, t], state)
    return x + state[0][:, None]


@written("GRU cell", lambda: {"a": nn.GRUCell(6, 6)}, **seq)
def _gru_cell(self, x):
    h = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        h = self.a(x[:, t], h)
    return x * h[:, None]


@written("attention", lambda: {"a": nn.MultiheadAttention(6, 2, batch_first=True)}, **seq)
def _attention(self, x):
    return self.a(x, x, x)[0]


@written(
    "weightless attention", lambda: {"a": nn.MultiheadAttention(6, 2, batch_first=True)}, **seq
)
def _weightless(self, x):
    return self.a(x, x, x, need_weights=False)[0]


@written("causal attention", lambda: {"qkv": nn.Linear(6, 18), "out": nn.Linear(6, 6)}, **seq)
def _causal(self, x):
    q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
    h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return self.out(h.transpose(1, 2).flatten(2))


@written("masked attention", lambda: {"qkv": nn.Linear(6, 18)}, **seq)
def _masked_attention(self, x):
    q, k, v = self.qkv(x).chunk(3, -1)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@written("attention with dropout", lambda: {"qkv": nn.Linear(6, 18)}, random="always", **seq)
def _dropped_attention(self, x):
    return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), dropout_p=0.3)


@written("attention by bmm", lambda: {"q": nn.Linear(6, 6), "k": nn.Linear(6, 6)}, **seq)
def _by_bmm(self, x):
    return torch.bmm(torch.bmm(self.q(x), self.k(x).transpose(1, 2)).softmax(-1), x)


@written("positions", lambda: {"p": parameter(LENGTH, WIDTH)}, **seq)
def _positions(self, x):
    return x + self.p


@written("position embedding", lambda: {"p": nn.Embedding(LENGTH, WIDTH)}, **seq)
def _position_embedding(self, x):
    return x + self.p(torch.arange(x.shape[1]))


@written("last step", lambda: {"a": nn.Linear(6, 6)}, gives="vector", **seq)
def _last(self, x):
    return self.a(x[:, -1] - x[:, 0])


# Images.

img = {"takes": "image"}
layer("conv", **img)(lambda: nn.Conv2d(3, 3, 3, padding=1))
layer("conv without bias, circular", **img)(
    lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular", bias=False)
)
layer("dilated conv", **img)(lambda: nn.Conv2d(3, 3, 3, padding=2, dilation=2))
layer("depthwise conv", **img)(lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3))
layer("pointwise conv", **img)(lambda: nn.Conv2d(3, 3, 1))
layer("transposed conv", **img)(lambda: nn.ConvTranspose2d(3, 3, 3, padding=1))
layer("batch norm of images", **img)(lambda: nn.BatchNorm2d(3))
layer("batch norm of images in eval", **img)(lambda: nn.BatchNorm2d(3).eval())
layer("group norm", **img)(lambda: nn.GroupNorm(3, 3))
layer("instance norm", **img)(lambda: nn.InstanceNorm2d(3, affine=True))
layer("instance norm of images with statistics", refuse="fused", **img)(
    lambda: nn.InstanceNorm2d(3, track_running_stats=True, affine=True)
)
layer("local response norm", **img)(lambda: nn.LocalResponseNorm(2))
layer("pooling", smooth=False, **img)(lambda: nn.MaxPool2d(3, 1, 1))
layer("average pooling", **img)(lambda: nn.AvgPool2d(3, 1, 1))
layer("dropout of channels", random="training", **img)(lambda: nn.Dropout2d(0.3))
layer("upsampled", **img)(
    lambda: nn.Sequential(nn.Conv2d(3, 3, 2, 2), nn.Upsample((SIDE, SIDE), mode="bilinear"))
)
layer("conv, norm, relu in place", **img)(
    lambda: nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
    )
)
layer("channels last", refuse="vmap", **img)(
    lambda: Layer("channels last", a=nn.Conv2d(3, 3, 3, padding=1), b=nn.BatchNorm2d(3))
)
FORWARDS["channels last"] = lambda self, x: self.b(
    self.a(x.contiguous(memory_format=torch.channels_last))
)


@written("flattened image", lambda: {"a": nn.Linear(75, 6)}, gives="vector", **img)
def _flat(self, x):
    return self.a(x.flatten(1))


# Tokens.

tok = {"takes": "tokens", "gives": "sequence"}
layer("embedding", **tok)(lambda: nn.Embedding(VOCABULARY, WIDTH))
layer("embedding with padding", **tok)(lambda: nn.Embedding(VOCABULARY, WIDTH, padding_idx=0))
layer("embedding scaled by frequency", refuse="fused", **tok)(
    lambda: nn.Embedding(VOCABULARY, WIDTH, scale_grad_by_freq=True)
)
layer("renormed embedding", refuse="all", **tok)(
    lambda: nn.Embedding(VOCABULARY, WIDTH, max_norm=1.0)
)
layer("embedding below its max_norm", refuse="fused", **tok)(
    lambda: nn.Embedding(VOCABULARY, WIDTH, max_norm=100.0)
)
layer("sparse embedding", refuse="fused", **tok)(
    lambda: nn.Embedding(VOCABULARY, WIDTH, sparse=True)
)
layer("embedding bag", takes="tokens", gives="vector", refuse="fused")(
    lambda: nn.EmbeddingBag(VOCABULARY, WIDTH, mode="mean")
)
layer("embedding bag with padding", takes="tokens", gives="vector", refuse="fused")(
    lambda: nn.EmbeddingBag(VOCABULARY, WIDTH, mode="sum", padding_idx=0)
)
layer("sparse embedding bag", takes="tokens", gives="vector", refuse="fused")(
    lambda: nn.EmbeddingBag(VOCABULARY, WIDTH, mode="sum", sparse=True)
)
layer("scripted embedding with padding", refuse="fused", **tok)(
    lambda: torch.jit.script(nn.Embedding(VOCABULARY, WIDTH, padding_idx=0))
)


@written("torch.embedding with padding", lambda: {"w": parameter(7, 6)}, refuse="fused", **tok)
def _torch_embedding(self, x):
    return torch.embedding(self.w, x, 0)


@written("aten embedding with padding", lambda: {"w": parameter(7, 6)}, refuse="fused", **tok)
def _aten_embedding(self, x):
    return torch.ops.aten.embedding(self.w, x, 0)


@written("embedding by index", lambda: {"w": parameter(7, 6)}, **tok)
def _by_indexing(self, x):
    return self.w[x]


@written("one-hot matmul", lambda: {"w": parameter(7, 6)}, refuse="vmap", **tok)
def _one_hot(self, x):
    return F.one_hot(x, 7).to(self.w.dtype) @ self.w


# Between kinds, without parameters.


class Between(nn.Module):
    """A conversion between kinds of activations, in which every entry has another weight."""

    def __init__(self, takes, gives):
        super().__init__()
        self.takes, self.gives = takes, gives

    def forward(self, x):
        if self.takes == "sequence":
            weights = torch.cos(torch.arange(LENGTH, dtype=x.dtype))
            x = (x * weights[:, None]).sum(1)
        elif self.takes == "image":
            weights = torch.cos(torch.arange(SIDE * SIDE, dtype=x.dtype)).view(SIDE, SIDE)
            x = torch.cat([x.mean((2, 3)), (x * weights).mean((2, 3))], 1)
        if self.gives == "sequence":
            return x[:, None] * (1 + 0.3 * torch.arange(LENGTH, dtype=x.dtype))[:, None]
        if self.gives == "image":
            grid = torch.sin(torch.arange(SIDE * SIDE, dtype=x.dtype)).view(SIDE, SIDE)
            return x[:, :3, None, None] + x[:, 3:, None, None] * grid
        return x

    def extra_repr(self):
        return f"{self.takes} -> {self.gives}"
