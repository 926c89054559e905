"""Language models: adapters, padding, packing, checkpoints and half precision.

The reference is written here: `loss.backward()` of the plain module, sequence by sequence, and then
the formula of clipping.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

import gradfilter as gf
from _allocations import Peak
from gradfilter import interop

hf = pytest.importorskip("transformers")

WORDS, LENGTH, M = 19, 8, 4
pytestmark = pytest.mark.filterwarnings("error:Fell back to plan:UserWarning")


def mostly_slow(cases, everyday):
    """Mark all cases slow but some."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)),
                     marks=[] if case in everyday else pytest.mark.slow)
        for case in cases
    ]  # fmt: skip


# --- Tiny models ---


def llama(attention="sdpa", **options):
    """Rotary positions, and two heads that share keys and values."""
    config = hf.LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
        attn_implementation=attention, **options,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).to(torch.get_default_dtype()).train()


def gpt2(attention="sdpa"):
    """Learned positions, layers of kind Conv1D, and a head that is the embedding."""
    config = hf.GPT2Config(
        vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=32, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation=attention,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config).to(torch.get_default_dtype()).train()


def bert(attention="sdpa"):
    config = hf.BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation=attention,
    )  # fmt: skip
    return hf.BertForMaskedLM(config).to(torch.get_default_dtype()).train()


def t5(attention="sdpa"):
    config = hf.T5Config(
        vocab_size=WORDS, d_model=16, d_kv=8, d_ff=12, num_layers=2, num_heads=2, dropout_rate=0.0,
        pad_token_id=0, decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config).to(torch.get_default_dtype()).train()


# --- Batches of eight sequences ---


def padded(n=2 * M):
    """Sequences with padding on the right; every one has a number of labels of its own."""
    ids = torch.randint(3, WORDS, (n, LENGTH))
    there = torch.arange(LENGTH) < 3 + torch.arange(n)[:, None] % (LENGTH - 2)
    labels = torch.where(there, ids, -100)
    return {
        "input_ids": torch.where(there, ids, 0),
        "attention_mask": there.long(),
        "labels": labels,
    }


def masked(n=2 * M):
    """The same for a masked model: some words are hidden, and only those have labels."""
    batch = padded(n)
    hidden = (torch.arange(LENGTH) % 3 == torch.arange(n)[:, None] % 3) & (
        batch["attention_mask"] == 1
    )
    return {
        "input_ids": torch.where(hidden, 1, batch["input_ids"]),
        "attention_mask": batch["attention_mask"],
        "labels": torch.where(hidden, batch["input_ids"], -100),
    }


SAMPLES = [[3, 2, 3], [6, 2], [8], [1, 4, 3], [4, 4], [2, 6], [5, 3], [2, 2, 2, 2]]
"""The lengths of the samples in each packed sequence."""


def packed(mask="none"):
    """Whole sequences of several samples, whose positions restart and which do not see others."""
    ids = torch.randint(3, WORDS, (len(SAMPLES), LENGTH))
    number = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in SAMPLES])
    positions = torch.tensor([[t for n in row for t in range(n)] for row in SAMPLES])
    batch = {
        "input_ids": ids,
        "position_ids": positions,
        # The first token of a sample is not predicted from the sample before it.
        "labels": torch.where(positions == 0, -100, ids),
    }
    if mask == "blocks":
        seen = (number[:, :, None] == number[:, None, :]) & torch.ones(LENGTH, LENGTH).tril().bool()
        least = torch.finfo(torch.get_default_dtype()).min
        batch["attention_mask"] = torch.where(seen, 0.0, least)[:, None]
    return batch


# --- The reference ---


def next_word(output, batch):
    """The mean over the labels, in the dtype of the logits: the models' own is in float32."""
    logits, labels = output.logits[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def same_word(output, batch):
    return F.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten())


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradient(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in trained(model).items()
    }
    model.zero_grad(set_to_none=True)
    return found


def backward_passes(model, batch, m, loss=next_word):
    """The rows, by an ordinary backward pass for each part of the batch."""
    size = len(batch["labels"]) // m
    rows = []
    for i in range(m):
        part = {name: value[i * size : (i + 1) * size] for name, value in batch.items()}
        rows.append(gradient(model, loss(model(**part), part)))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def clipped_mean(rows, bound):
    norms = sum(leaf.flatten(1).square().sum(1) for leaf in rows.values()).sqrt()
    shares = (bound / norms).clamp(max=1) / len(norms)
    assert 0 < (norms > bound).sum() < len(norms)  # some rows are clipped
    return {name: torch.einsum("m,m...->...", shares, leaf) for name, leaf in rows.items()}


def median_norm(rows):
    return float(sum(leaf.flatten(1).square().sum(1) for leaf in rows.values()).sqrt().median())


def check(model, batch, loss=next_word, *, microbatches=(M, 2 * M), tolerance=1e-10, want=None):
    """Compare rows, and clipping with its mean, with the reference; returns the last stack."""
    params, buffers = gf.extract(model)
    for m in microbatches:
        rows = want or backward_passes(model, batch, m, loss)
        assert params.keys() == rows.keys() and any(leaf.any() for leaf in rows.values())
        grads_of = gf.microbatch_grads(gf.model_loss(model, loss), m, plan="fused")
        bound = median_norm(rows)
        clip = gf.chain(gf.clip_per_row(bound), gf.mean_rows())
        stack = grads_of(params, batch, buffers=buffers)
        found = clip.update(stack, clip.init(params), params)[0]
        near = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(found, clipped_mean(rows, bound), **near)
        torch.testing.assert_close(stack.stacked(), rows, **near)
    return stack


MODELS = {
    "gpt2": (gpt2, padded, next_word, 1e-10),
    "llama": (llama, padded, next_word, 1e-6),  # its norms are float32
    "llama, tied": (lambda a: llama(a, tie_word_embeddings=True), padded, next_word, 1e-6),
    "bert": (bert, masked, same_word, 1e-10),
    "t5": (t5, padded, same_word, 1e-6),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("kind", "attention"),
    mostly_slow(
        [(kind, attention) for kind in MODELS for attention in ("sdpa", "eager")],
        [("gpt2", "sdpa"), ("bert", "eager"), ("llama, tied", "sdpa"), ("t5", "sdpa")],
    ),
)
def test_a_row_is_the_mean_over_its_own_tokens(kind, attention):
    make, data, loss, tolerance = MODELS[kind]
    check(make(attention), data(), loss, tolerance=tolerance)


# --- Packed sequences ---


def samples_alone(model, batch):
    """The rows of packed sequences from their samples, each alone and without any padding."""
    rows = []
    for ids, lengths in zip(batch["input_ids"], SAMPLES, strict=True):
        total, count = 0.0, 0
        for sample in ids.split(lengths):
            if len(sample) > 1:
                logits = model(input_ids=sample[None]).logits[0, :-1]
                total = total + F.cross_entropy(logits, sample[1:], reduction="sum")
                count += len(sample) - 1
        rows.append(gradient(model, total / count))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mask", ["blocks", "none"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_samples_are_those_samples_alone(kind, attention, mask):
    make, _, loss, tolerance = MODELS[kind]
    model, batch = make(attention), packed(mask)
    check(model, batch, loss, microbatches=(2 * M,), tolerance=tolerance,
          want=samples_alone(model, batch))  # fmt: skip
    check(model, batch, loss, microbatches=(M,), tolerance=tolerance)


# --- Adapters ---


def adapted(base, **options):
    """Add adapters of rank 2 that change the model: a fresh one adds 0."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_dropout=0.0, **options))
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(0.3 * torch.randn_like(p))
    return model.to(torch.get_default_dtype()).train()


LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
CONV1D = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}


def merged():
    model = adapted(llama(), **LINEAR).merge_and_unload()
    return model.requires_grad_(True)


def second():
    peft = pytest.importorskip("peft")
    model = adapted(llama(), **LINEAR)
    model.add_adapter("second", peft.LoraConfig(r=3, **LINEAR))
    model.set_adapter("second")
    return model.to(torch.get_default_dtype())


def multiplied():
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return peft.get_peft_model(llama(), peft.IA3Config(**options)).to(torch.float64).train()


SAVED = {**LINEAR, "modules_to_save": ["lm_head", "norm"]}
ADAPTERS = {
    "linear": lambda: adapted(llama(), **LINEAR),
    "linear, DoRA": lambda: adapted(llama(), **LINEAR, use_dora=True),
    "embedding": lambda: adapted(llama(), target_modules=["q_proj", "embed_tokens"]),
    "modules to save": lambda: adapted(llama(), **SAVED),
    "Conv1D": lambda: adapted(gpt2(), **CONV1D),
    "Conv1D, DoRA": lambda: adapted(gpt2(), **CONV1D, use_dora=True),
    "tied embedding": lambda: adapted(gpt2(), target_modules=["c_attn", "wte"]),
    "biases": lambda: adapted(gpt2(), **CONV1D, bias="all", use_rslora=True),
    "some tokens": lambda: adapted(
        llama(), target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5, 7]}
    ),
    "second adapter": second,
    "merged": merged,
    "IA3": multiplied,
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "kind",
    mostly_slow(
        ADAPTERS, ["linear", "linear, DoRA", "modules to save", "Conv1D", "tied embedding"]
    ),
)
def test_rows_of_adapters(kind):
    model = ADAPTERS[kind]()
    stack = check(model, padded(), tolerance=1e-6)
    assert {layer.leaf for layer in stack.layers} == trained(model).keys()
    # Only what the adapters themselves need runs by an override of a parameter.
    if kind == "linear":
        assert stack.overrides["linear"] == len(trained(model))  # and none of the frozen layers


def test_frozen_weights_have_no_rows_and_no_factors():
    """The bytes of new tensors are those of a plain pass, and far from a row of a frozen weight."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=WORDS, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    model = adapted(hf.LlamaForCausalLM(config), **LINEAR)
    batch = padded()
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad) * 4
    params, buffers = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, next_word), M, plan="fused")
    clip = gf.chain(gf.clip_per_row(0.1), gf.mean_rows())

    def rows():
        clip.update(grads_of(params, batch, buffers=buffers), clip.init(params), params)

    def plain():
        gradient(model, next_word(model(**batch), batch))

    peaks = []
    for run in (plain, rows):
        for _ in range(4):  # passes that look for a hidden state
            run()
        with Peak() as peak:
            run()
        peaks.append(peak.peak)
    assert peaks[1] < 1.5 * peaks[0] and peaks[1] < frozen


def test_nothing_to_train_is_one_clear_error():
    model = adapted(llama(), **LINEAR)
    model.merge_adapter()  # the adapters are in the frozen weights now, and unused
    params, buffers = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, next_word), M)
    with pytest.raises(ValueError, match="Expected a loss that depends on the parameters"):
        grads_of(params, padded(), buffers=buffers).stacked()


# --- Checkpoints and half precision ---


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["gpt2", "linear", "Conv1D, DoRA"])
def test_checkpoints_change_no_row(kind):
    model = (MODELS[kind][0] if kind in MODELS else ADAPTERS[kind])()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = padded()
    stack = check(model, batch, tolerance=1e-6, microbatches=(M,),
                  want=backward_passes(plain, batch, M))  # fmt: skip
    assert "activation checkpoints" in stack.explain()


@pytest.mark.parametrize("context", ["autocast", "parameters"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_bf16_is_within_the_rounding_of_a_plain_pass(kind, context):
    torch.manual_seed(0)
    model, batch = MODELS[kind][0](), padded()
    exact = backward_passes(model, batch, M)
    if context == "parameters":
        model = model.bfloat16()
    params, buffers = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, next_word), M, plan="fused")
    with torch.autocast("cpu", torch.bfloat16, enabled=context == "autocast"):
        plain = backward_passes(model, batch, M)
        rows = grads_of(params, batch, buffers=buffers).stacked()
    assert {leaf.dtype for leaf in rows.values()} == {p.dtype for p in params.values()}
    assert off(rows, exact) < 1.2 * off(plain, exact) + 1e-3 and off(plain, exact) < 0.1


def off(rows, exact):
    """The distance of all rows to the exact ones, relative to these."""
    apart = sum(
        (rows[name].double() - leaf.double()).square().sum() for name, leaf in exact.items()
    )
    return float((apart / sum(leaf.double().square().sum() for leaf in exact.values())).sqrt())


@pytest.mark.parametrize("context", ["autocast", "plain"])
def test_adapters_in_float32_on_a_base_in_bf16(context):
    torch.manual_seed(0)
    exact_model, batch = adapted(llama(), **LINEAR), padded()
    model = copy.deepcopy(exact_model)
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    exact = backward_passes(exact_model, batch, M)
    params, buffers = gf.extract(model)
    assert {p.dtype for p in params.values()} == {torch.float32}
    grads_of = gf.microbatch_grads(gf.model_loss(model, next_word), M, plan="fused")
    with torch.autocast("cpu", torch.bfloat16, enabled=context == "autocast"):
        plain = backward_passes(model, batch, M)
        rows = grads_of(params, batch, buffers=buffers).stacked()
    assert {leaf.dtype for leaf in rows.values()} == {torch.float32}
    assert off(rows, exact) < 1.2 * off(plain, exact) + 1e-3 and off(plain, exact) < 0.1


# --- FilteredTrainer ---

STEPS = 6


class Mean:
    """The mean over the labels of a row in float64, as `compute_loss_func`."""

    def __call__(self, outputs, labels, num_items_in_batch=None):
        return next_word(outputs, {"labels": labels})


def run(cls, model, data, folder, *, args=None, **options):
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": 2 * M, "logging_steps": 1,
        "max_grad_norm": 0.0, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant",
        "label_names": ["labels"],
    }  # fmt: skip
    arguments = hf.TrainingArguments(str(folder), **settings | (args or {}))
    seen = []

    def collate(rows):
        seen.append(hf.default_data_collator(rows))
        return dict(seen[-1])

    made = cls(model, arguments, train_dataset=data, data_collator=collate, **options)
    made.remove_callback(hf.PrinterCallback)
    made.train()
    return seen


def as_rows(batches):
    return [
        {name: value[i] for name, value in batch.items()}
        for batch in batches
        for i in range(len(batch["labels"]))
    ]


DATA = {"padded": padded, "packed": lambda: packed("blocks"), "positions": packed}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("data", "checkpoints"),
    mostly_slow(
        [(data, checkpoints) for data in DATA for checkpoints in (False, True)],
        [("padded", True), ("positions", False)],
    ),
)
def test_a_trainer_of_adapters_is_a_loop_over_rows(tmp_path, data, checkpoints):
    model = adapted(llama(), **LINEAR)
    plain = copy.deepcopy(model)
    rows = as_rows([DATA[data]() for _ in range(STEPS)])
    args = {"gradient_checkpointing": checkpoints}
    args |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpoints else {}
    bound = median_norm(backward_passes(plain, DATA[data](), M))
    batches = run(
        interop.FilteredTrainer, model, rows, tmp_path, args=args, compute_loss_func=Mean(),
        transforms=gf.chain(gf.clip_per_row(bound), gf.mean_rows()), microbatches=M,
    )  # fmt: skip
    optimizer = torch.optim.SGD(trained(plain).values(), lr=0.05)
    for batch in batches:
        found = backward_passes(plain, batch, M)
        norms = sum(leaf.flatten(1).square().sum(1) for leaf in found.values()).sqrt()
        shares = (bound / norms).clamp(max=1) / M
        for name, p in trained(plain).items():
            p.grad = torch.einsum("m,m...->...", shares, found[name])
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("smoothing", [0.2, pytest.param(0.0, marks=pytest.mark.slow)])
def test_the_mean_of_rows_of_adapters_is_the_training_of_a_trainer(tmp_path, smoothing):
    model = adapted(gpt2(), **CONV1D)
    plain = copy.deepcopy(model)
    rows = as_rows([padded() for _ in range(2 * STEPS)])
    args = {"label_smoothing_factor": smoothing, "gradient_accumulation_steps": 2}
    mean = {"transforms": gf.mean_rows(), "microbatches": 2 * M}
    run(interop.FilteredTrainer, model, rows, tmp_path, args=args, **mean)
    run(hf.Trainer, plain, rows, tmp_path, args=args)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-6)


def test_bf16_in_a_trainer_of_adapters_keeps_them_in_float32(tmp_path):
    torch.manual_seed(0)
    model = adapted(llama(), **LINEAR)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    run(interop.FilteredTrainer, model, as_rows([padded() for _ in range(STEPS)]), tmp_path,
        args={"bf16": True}, transforms=gf.consensus_filter(), microbatches=M)  # fmt: skip
    after = trained(model)
    assert {p.dtype for p in after.values()} == {torch.float32}
    assert all(p.isfinite().all() and not torch.equal(p, before[n]) for n, p in after.items())
