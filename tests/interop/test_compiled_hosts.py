"""Hosts with ``compile=``: the same training to the bit, from one trace, or a clear refusal."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _formulas import formulas
from _models import Dropped, Normed, Tied, images, token_loss, tokens, vectors
from gradfilter import interop
from gradfilter.interop import Filtered

pytestmark = pytest.mark.usefixtures("float64")
M, STEPS = 4, 6


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Arc(nn.Module):
    """A criterion with a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, output, y):
        return F.cross_entropy(self.scale * output, y)


CHAINS = {
    "mean_rows": lambda: gf.mean_rows(),
    "agree_filter, which skips": lambda: gf.agree_filter(0.9),
    "sam, clip, agree": lambda: gf.chain(
        gf.sam_perturb(0.05), gf.clip_per_row(0.5), gf.agree_filter(1.2)
    ),
    "gsam, agc": lambda: gf.chain(
        gf.mean_rows(), gf.sam_perturb(0.05), gf.gsam_decompose(0.3), gf.agc_clip(0.01)
    ),
    "noise": lambda: gf.chain(gf.mean_rows(), noise()),
}


def noise():
    def update(grads, state, params, /, **extra):
        return {k: g + 0.01 * torch.randn_like(g) for k, g in grads.items()}, state, {}

    return gf.transform("noise", "tree -> tree", update)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def train(compile, *, model=Normed, criterion=F.cross_entropy, chain=gf.mean_rows,
          optimizer="sgd", batches=vectors, context=contextlib.nullcontext, **options):  # fmt: skip
    """Train some steps; return the host, its results, and torch's random state after them."""
    torch.manual_seed(3)
    net = model()
    if isinstance(criterion, type):
        criterion = criterion()
    parameters = [p for p in net.parameters() if p.requires_grad]
    if isinstance(criterion, nn.Module):
        parameters += criterion.parameters()
    host = Filtered(
        net, criterion, chain(), OPTIMIZERS[optimizer](parameters), M, compile=compile, **options
    )
    scheduler = torch.optim.lr_scheduler.StepLR(host.optimizer, 2)
    found = []
    for _ in range(STEPS):
        batch = batches()
        with context(), contextlib.nullcontext() if compile else formulas():
            found.append(host.step(*batch))
        scheduler.step()
    return host, found, torch.get_rng_state()


def same(a, b):
    """Compare two trainings, to the bit."""
    (host, found, numbers), (other, wanted, others) = a, b
    for part in ("model", "criterion"):
        if isinstance(getattr(host, part), nn.Module):
            mine, its = getattr(host, part).state_dict(), getattr(other, part).state_dict()
            assert [k for k, v in its.items() if not torch.equal(mine[k], v)] == []
    for mine, its in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.loss, its.loss, rtol=0, atol=0)
        torch.testing.assert_close(mine.info, its.info, rtol=0, atol=0)
        torch.testing.assert_close(mine.aux, its.aux, rtol=0, atol=0)
    torch.testing.assert_close(host.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert torch.equal(numbers, others)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_compiled_host_trains_to_the_bit_from_one_trace(chain, optimizer):
    compiled = train("graph", chain=CHAINS[chain], optimizer=optimizer)
    eager = train(False, chain=CHAINS[chain], optimizer=optimizer)
    same(compiled, eager)
    assert len(compiled[0]._graphs.entries) == 1
    kept = [bool(result.info["keep"]) for result in eager[1]]
    assert all(kept) or (chain.startswith("agree") and any(kept))


def with_aux(output, y):
    return F.cross_entropy(output, y), {"right": (output.argmax(1) == y).double().mean()}


OPTIONS = {
    "convolutions": {"model": Convolutions, "batches": images, "chain": CHAINS["gsam, agc"]},
    "tied weights": {"model": Tied, "criterion": token_loss, "batches": tokens},
    "criterion with a parameter": {"criterion": Arc},
    "aux": {"criterion": with_aux, "has_aux": True},
    "plan loop": {"plan": "loop"},
    "plan vmap": {"plan": "vmap"},
    "autocast": {"context": lambda: torch.autocast("cpu", torch.bfloat16)},
    "scaler": {"scaler": True},
    "scaler, aux and a second pass": {
        "scaler": True,
        "criterion": with_aux,
        "has_aux": True,
        "chain": CHAINS["gsam, agc"],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_a_host_can_do_it_can_do_compiled(options):
    def run(compile):
        more = dict(options)
        if more.pop("scaler", False):
            more["scaler"] = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        return train(compile, **more)

    compiled = run("graph")
    same(compiled, run(False))
    assert len(compiled[0]._graphs.entries) == 1


def test_hooks_on_parameters_and_a_smaller_last_batch():
    def run(compile):
        sizes = iter([12, 12, 8] * STEPS)

        def model():
            net = Dropped()
            next(net.parameters()).register_hook(lambda g: 2 * g)
            return net

        return train(compile, model=model, batches=lambda: vectors(next(sizes)))

    compiled = run("graph")
    same(compiled, run(False))
    assert len(compiled[0]._graphs.entries) == 2


@pytest.mark.slow
def test_a_checkpoint_of_a_compiled_host_goes_on_uncompiled_and_back():
    chain = CHAINS["sam, clip, agree"]
    host, _, numbers = train("graph", chain=chain)
    saved = copy.deepcopy((host.model.state_dict(), host.state_dict()))
    found = []
    for compile in (False, "graph"):
        other, *_ = train(compile, chain=chain)
        other.model.load_state_dict(saved[0])
        other.load_state_dict(copy.deepcopy(saved[1]))
        torch.set_rng_state(numbers)
        found.append([other.step(*vectors()).loss for _ in range(3)])
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_inductor_trains_the_same():
    chain = CHAINS["gsam, agc"]
    with torch._inductor.config.patch(fallback_random=True):
        compiled = train(True, chain=chain)
    eager = train(False, chain=chain)
    for key, value in eager[0].model.state_dict().items():
        torch.testing.assert_close(
            compiled[0].model.state_dict()[key], value, rtol=1e-11, atol=1e-11
        )


# --- Refusals ---


def test_what_cannot_be_compiled_is_refused():
    def make(model=None, chain=None, compile="graph"):
        net = Dropped() if model is None else model
        chain = gf.mean_rows() if chain is None else chain
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        return Filtered(net, F.cross_entropy, chain, optimizer, M, compile=compile)

    with pytest.raises(ValueError, match="no embedding with max_norm with compile="):
        make(nn.Sequential(nn.Embedding(7, 6, max_norm=1.0), nn.Linear(6, 3)))
    with pytest.raises(ValueError, match='Expected backend "inductor", "graph" or a function'):
        make(compile="cuda")
    compiled = Dropped()
    compiled.compile()
    with pytest.raises(ValueError, match=r"before torch\.compile with compile="):
        make(compiled)

    def reading(output, y):
        return F.cross_entropy(output, y) * (2.0 if output.sum().item() > 0 else 1.0)

    model = Dropped()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    host = Filtered(model, reading, gf.mean_rows(), optimizer, M, compile="graph")
    with pytest.raises(
        RuntimeError, match=r"reads the value of a tensor, in .*test_compiled_hosts"
    ):
        host.step(*vectors())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- Trainers ---

WORDS, LENGTH = 13, 6


def nothing_changed_between_batches(host):
    """Return whether each step could make another pass over all accumulated batches."""
    constants = [options[1] for _, options, _ in host._graphs.entries]
    return all(changed == [None, None] for own in constants for _, *changed in own)


def sentences(n=48):
    """Sentences of which the beginning has labels: the number of items differs by batch."""
    rows = []
    for _ in range(n):
        words = (torch.randint(WORDS, ()) + torch.arange(LENGTH)) % WORDS
        labels = words.clone()
        labels[torch.randint(2, LENGTH + 1, ()) :] = -100
        rows.append({"input_ids": words, "labels": labels})
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(("items", "batches"), [(True, 1), (False, 1), (True, 2)])
def test_trainer(tmp_path, items, batches):
    hf = pytest.importorskip("transformers")
    data = sentences()

    class Logging(interop.FilteredTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.log({"doubled": 2 * loss})
            return loss

    def run(compile):
        torch.manual_seed(1)
        config = hf.GPT2Config(
            vocab_size=WORDS, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2,
            bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM",
        )  # fmt: skip
        model = hf.GPT2LMHeadModel(config).to(torch.get_default_dtype())
        args = hf.TrainingArguments(
            str(tmp_path), max_steps=8 // batches, logging_steps=2, per_device_train_batch_size=8,
            gradient_accumulation_steps=batches,
            report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Logging(
            model, args, train_dataset=data, transforms=gf.agree_filter(1.5), microbatches=M,
            compile=compile,
        )  # fmt: skip
        trainer.model_accepts_loss_kwargs = items
        trainer.train()
        timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
        logs = [
            {k: v for k, v in log.items() if k not in timed} for log in trainer.state.log_history
        ]
        return trainer, model.state_dict(), logs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer, weights, logs = run("graph")
        _, expected, wanted = run(False)
    assert [k for k, v in expected.items() if not torch.equal(weights[k], v)] == []
    assert logs == wanted and "doubled" in logs[0]
    assert trainer._hosted._graphs._traces == 1
    assert nothing_changed_between_batches(trainer._hosted)
    assert len({float(log["doubled"]) for log in logs if "doubled" in log}) > 1


@pytest.mark.parametrize("accumulate", [1, 4])
def test_lightning(accumulate):
    """With 4 of 6 batches per epoch, the last step of an epoch has fewer batches."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Net(interop.FilteredModule):
        transforms = gf.agree_filter(1.2)
        microbatches = M

        def __init__(self, compile):
            super().__init__()
            self.net, self.compile_step = Normed(), compile

        def microbatch_loss(self, batch):
            x, y = batch
            output = self.net(x)
            self.log("right", (output.argmax(1) == y).double().mean())
            return F.cross_entropy(output, y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.last.parameters(), lr=0.1)

    x, y = vectors(48)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)

    def run(compile):
        torch.manual_seed(1)
        model = Net(compile)
        model.net.first.requires_grad_(False)
        model.net.norm.requires_grad_(False)
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            accumulate_grad_batches=accumulate,
        )  # fmt: skip
        trainer.fit(model, loader)
        return model, model.state_dict(), dict(trainer.callback_metrics)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, weights, metrics = run("graph")
        _, expected, wanted = run(False)
    assert [k for k, v in expected.items() if not torch.equal(weights[k], v)] == []
    assert metrics == wanted and "right" in metrics
    assert model._hosted._graphs._traces == (1 if accumulate == 1 else 2)
    assert nothing_changed_between_batches(model._hosted)


# --- Trainers with ragged batches, weights and groups of samples ---

COLUMNS = {"sample_weights": "weight", "groups": "user_id"}
MARKS = pytest.mark.parametrize("named", [(), ("sample_weights",), ("groups",), tuple(COLUMNS)])


def same_up_to_rounding(weights, expected, named):
    """Compare two trainings; without weights and groups they run the same kernels."""
    tolerance = 1e-12 if named else 0.0
    torch.testing.assert_close(weights, expected, rtol=tolerance, atol=tolerance)


def gpt2():
    hf = pytest.importorskip("transformers")
    config = hf.GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM",
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config).to(torch.get_default_dtype())


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@MARKS
def test_trainer_with_a_ragged_last_batch(tmp_path, named, accumulate):
    hf = pytest.importorskip("transformers")
    data = sentences(22)
    for i, sample in enumerate(data):
        sample |= {"weight": float(i % 4), "user_id": 100 + i % 3}

    def run(compile):
        torch.manual_seed(1)
        model = gpt2()
        args = hf.TrainingArguments(
            str(tmp_path), num_train_epochs=2, logging_steps=1, per_device_train_batch_size=8,
            gradient_accumulation_steps=accumulate, report_to=[], save_strategy="no",
            disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = interop.FilteredTrainer(
            model, args, train_dataset=data, transforms=gf.agree_filter(1.5), microbatches=M,
            compile=compile, uneven=True, **{name: COLUMNS[name] for name in named},
        )  # fmt: skip
        trainer.train()
        return trainer, model.state_dict()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer, weights = run("graph")
        _, expected = run(False)
    same_up_to_rounding(weights, expected, named)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == (6 if accumulate == 1 else 4)
    assert trainer._hosted._graphs._traces == 2  # a batch of 8, and one of 6


@pytest.mark.slow
def test_trainer_refuses_another_pass_over_accumulated_ragged_batches(tmp_path):
    hf = pytest.importorskip("transformers")
    args = hf.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=6, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = interop.FilteredTrainer(
        gpt2(), args, train_dataset=sentences(12), microbatches=M, compile="graph", uneven=True,
        transforms=gf.chain(gf.sam_perturb(0.05), gf.agree_filter(1.5)),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="rows of equal sizes for another pass"):
            trainer.train()


@pytest.mark.parametrize("accumulate", [1, 2])
@MARKS
def test_lightning_with_a_ragged_last_batch(named, accumulate):
    lightning = pytest.importorskip("lightning.pytorch")

    class Net(interop.FilteredModule):
        transforms, microbatches, uneven = gf.agree_filter(1.2), M, True

        def __init__(self, compile):
            super().__init__()
            self.net, self.compile_step = nn.Linear(6, 3), compile

        def microbatch_loss(self, batch):
            x, y, *_ = batch
            return F.cross_entropy(self.net(x), y, reduction="none")

        def sample_weights(self, batch):
            return batch[2] if "sample_weights" in named else None

        def sample_groups(self, batch):
            return batch[3] if "groups" in named else None

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    x, y = vectors(22)
    tensors = x, y, torch.arange(22.0) % 4, torch.arange(22) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors), batch_size=8)

    def run(compile):
        torch.manual_seed(1)
        model = Net(compile)
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            accumulate_grad_batches=accumulate,
        )  # fmt: skip
        trainer.fit(model, loader)
        return model, model.state_dict(), dict(trainer.callback_metrics)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, weights, metrics = run("graph")
        _, expected, wanted = run(False)
    same_up_to_rounding(weights, expected, named)
    torch.testing.assert_close(metrics, wanted, rtol=1e-12, atol=1e-12)
    assert model._hosted._graphs._traces == 2
