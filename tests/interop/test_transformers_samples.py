"""`FilteredTrainer` with ragged batches, weights and groups of samples.

The reference is an ordinary training of the plain module: ``loss.backward()`` for each row, whose
samples run one by one.
"""

import copy
import math
from collections import UserDict
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from gradfilter import interop

hf = pytest.importorskip("transformers")
FilteredTrainer = interop.FilteredTrainer

SIZE, M, WORDS, LENGTH, LIMIT = 8, 4, 13, 6, 0.3
NAMES = {"sample_weights": "weight", "groups": "user_id"}
BOTH = pytest.mark.parametrize("named", [("sample_weights",), ("groups",), tuple(NAMES)])


def language_model():
    """A model of which all but the loss is in the default dtype."""
    config = hf.GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2,
        loss_type="ForCausalLM", bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    model = hf.GPT2LMHeadModel(config).to(torch.get_default_dtype())
    model.loss_type = "ForCausalLM"  # Trainer counts the labels behind the first
    return model


def classifier():
    config = hf.BertConfig(
        vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return hf.BertForSequenceClassification(config).to(torch.get_default_dtype())


class Counted(nn.Module):
    """A model whose forward method takes no number of items."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.table(input_ids))
        found = {"logits": logits}
        if labels is not None:
            found["loss"] = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return found


def token_loss(outputs, labels, num_items_in_batch=None):
    """The model's own loss, without its float32."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


def marked(samples, seed=0):
    """Give samples weights, some of them 0, and users with large numbers."""
    generator = torch.Generator().manual_seed(seed)
    for sample in samples:
        weight = torch.rand((), generator=generator).item() + 0.1
        removed = torch.rand((), generator=generator).item() < 0.3
        sample["weight"] = 0.0 if removed else weight
        sample["user_id"] = 10**6 + int(torch.randint(3, (), generator=generator))
    return samples


def sentences(n):
    """Sentences of which the beginning has labels; that of some is empty."""
    rows = []
    for i in range(n):
        words = torch.randint(WORDS, (LENGTH,))
        labels = words.clone()
        labels[1 if i % 7 == 3 else torch.randint(2, LENGTH + 1, ()) :] = -100
        rows.append({"input_ids": words, "labels": labels})
    return marked(rows)


def labelled(n):
    words = torch.randint(WORDS, (n, LENGTH))
    return marked([{"input_ids": w, "labels": int(w[0] > WORDS // 2)} for w in words])


class Recorded:
    """A collator that remembers its batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append(hf.default_data_collator(rows))
        return dict(self.batches[-1])


def sgd(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


@pytest.fixture
def trainer(tmp_path):
    def make(model, data, chain=None, *, cls=FilteredTrainer, named=(), m=M, args=None, **options):
        settings = {
            "num_train_epochs": 2, "per_device_train_batch_size": SIZE, "logging_steps": 1,
            "max_grad_norm": 0.0, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
            "use_cpu": True,
        }  # fmt: skip
        if issubclass(cls, FilteredTrainer):
            options |= {"transforms": chain or gf.mean_rows(), "microbatches": m}
            options |= {name: NAMES[name] for name in named}
        arguments = hf.TrainingArguments(str(tmp_path), **settings | (args or {}))
        made = cls(model, arguments, train_dataset=data, **options)
        made.remove_callback(hf.PrinterCallback)
        return made

    return make


# --- The reference ---


def of_tokens(model, batch, n):
    """Return the sum of the losses of a sample's items, and their number."""
    logits = model(input_ids=batch["input_ids"][n : n + 1]).logits[0, :-1]
    labels = batch["labels"][n, 1:]
    return F.cross_entropy(logits, labels, reduction="sum"), int((labels != -100).sum())


def of_class(model, batch, n):
    logits = model(input_ids=batch["input_ids"][n : n + 1]).logits
    return F.cross_entropy(logits, batch["labels"][n : n + 1]), 1


def members(batch, m, groups):
    """Return the samples of each row."""
    size = len(batch["labels"])
    if groups:
        users = batch["user_id"].tolist()
        return [[n for n in range(size) if users[n] == user] for user in sorted(set(users))]
    m = size if m is None else m
    each, longer = divmod(size, m)
    cuts = [0]
    for row in range(m):
        cuts.append(cuts[-1] + each + (row < longer))
    return [list(range(a, b)) for a, b in pairwise(cuts)]


def losses_of_rows(model, batches, m, named, loss, normalised):
    """Return the losses of the rows that take part in a step."""
    rows = []
    for batch in batches:
        weights = batch["weight"].tolist() if "sample_weights" in named else [1.0] * 99
        for row in members(batch, m, "groups" in named):
            parts = [(weights[n], *loss(model, batch, n)) for n in row if weights[n] > 0]
            parts = [part for part in parts if part[2] > 0]
            if not parts and named:
                continue  # empty
            rows.append((sum(w * t for w, t, _ in parts), sum(w * c for w, _, c in parts)))
    if normalised and "groups" not in named:  # by the items of the step
        mean = sum(items for _, items in rows) / len(rows)
        return [total / mean for total, _ in rows]
    return [total / items for total, items in rows]


def detached(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


def by_hand(model, epochs, accumulate, m, named, loss, normalised=True, limit=math.inf):
    """Train the plain module; return the mean loss of every step."""
    optimizer, scheduler = sgd(model)
    params, found = list(model.parameters()), []
    model.train()
    for batches in epochs:
        for start in range(0, len(batches), accumulate):
            step = batches[start : start + accumulate]
            losses = losses_of_rows(model, step, m, named, loss, normalised)
            total = [torch.zeros_like(p) for p in params]
            for value in losses:
                optimizer.zero_grad()
                if isinstance(value, torch.Tensor):
                    value.backward()
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
                norm = torch.cat([g.flatten() for g in grads]).norm().item()
                for whole, g in zip(total, grads, strict=True):
                    whole += g * min(1.0, limit / max(norm, 1e-30)) / len(losses)
            for p, whole in zip(params, total, strict=True):
                p.grad = whole
            optimizer.step()
            scheduler.step()
            found.append(sum(map(float, map(detached, losses))) / len(losses))
    return found


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=tolerance, atol=tolerance)


def column(trained, name):
    return [row[name] for row in trained.state.log_history if name in row]


KINDS = {
    "tokens": (language_model, sentences, of_tokens, {"compute_loss_func": token_loss}, True),
    "classes": (classifier, labelled, of_class, {}, False),
}
CHAINS = {"mean": (gf.mean_rows, math.inf), "clip": (lambda: gf.chain(
    gf.clip_per_row(LIMIT), gf.mean_rows()), LIMIT)}  # fmt: skip


# --- Ragged batches ---


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("kind", KINDS)
def test_epochs_with_a_ragged_last_batch(trainer, kind, chain, accumulate):
    make, data, loss, options, normalised = KINDS[kind]
    (transforms, limit), model, collator = CHAINS[chain], make(), Recorded()
    plain = copy.deepcopy(model)
    trained = trainer(
        model, data(2 * SIZE + 6), transforms(), uneven=True, data_collator=collator,
        args={"gradient_accumulation_steps": accumulate}, optimizers=sgd(model), **options,
    )  # fmt: skip
    trained.train()
    sizes = [len(batch["labels"]) for batch in collator.batches]
    assert sizes == [8, 8, 6, 8, 8, 6]
    epochs = collator.batches[:3], collator.batches[3:]
    losses = by_hand(plain, epochs, accumulate, M, (), loss, normalised, limit)
    close(model, plain)
    assert column(trained, "loss") == pytest.approx(losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_ragged_batches_are_the_training_of_a_trainer(trainer, smoothing):
    model, data = language_model(), sentences(2 * SIZE + 6)
    plain = copy.deepcopy(model)
    args = {"gradient_accumulation_steps": 2, "label_smoothing_factor": smoothing}
    trainer(model, data, uneven=True, args=args).train()
    trainer(plain, data, cls=hf.Trainer, args=args).train()
    close(model, plain, 1e-5)


# --- Weights and groups ---


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("kind", KINDS)
@BOTH
def test_epochs_with_weights_and_groups(trainer, named, kind, chain, accumulate):
    make, data, loss, options, normalised = KINDS[kind]
    (transforms, limit), model, collator = CHAINS[chain], make(), Recorded()
    plain = copy.deepcopy(model)
    trained = trainer(
        model, data(2 * SIZE + 6), transforms(), named=named, uneven=True, data_collator=collator,
        args={"gradient_accumulation_steps": accumulate}, optimizers=sgd(model), **options,
    )  # fmt: skip
    trained.train()
    assert all(NAMES[name] in collator.batches[0] for name in named)
    epochs = collator.batches[:3], collator.batches[3:]
    losses = by_hand(plain, epochs, accumulate, M, named, loss, normalised, limit)
    close(model, plain)
    assert column(trained, "loss") == pytest.approx(losses)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", ["fused", "loop", "vmap"])
@BOTH
def test_every_plan(trainer, named, plan):
    model, collator = language_model(), Recorded()
    plain = copy.deepcopy(model)
    trainer(
        model, sentences(2 * SIZE), named=named, data_collator=collator, plan=plan,
        args={"num_train_epochs": 1}, optimizers=sgd(model), compute_loss_func=token_loss,
    ).train()  # fmt: skip
    by_hand(plain, [collator.batches], 1, M, named, of_tokens)
    close(model, plain)


@pytest.mark.usefixtures("float64")
def test_one_row_per_sample_with_weights(trainer):
    model, collator = language_model(), Recorded()
    plain = copy.deepcopy(model)
    trainer(
        model, sentences(SIZE + 5), gf.chain(gf.clip_per_row(LIMIT), gf.mean_rows()),
        named=("sample_weights",), m=None, data_collator=collator, args={"num_train_epochs": 1},
        optimizers=sgd(model), compute_loss_func=token_loss,
    ).train()  # fmt: skip
    by_hand(plain, [collator.batches], 1, None, ("sample_weights",), of_tokens, limit=LIMIT)
    close(model, plain)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weights_of_zero_are_samples_without_labels_of_a_trainer(trainer, smoothing):
    """With the models' own losses, which are means, and Trainer's label smoothing."""
    model, data = language_model(), sentences(2 * SIZE + 6)
    plain, unlabelled = copy.deepcopy(model), copy.deepcopy(data)
    for sample, other in zip(data, unlabelled, strict=True):
        sample["weight"] = float(sample["weight"] > 0)
        if sample["weight"] == 0:
            other["labels"][:] = -100
    args = {"gradient_accumulation_steps": 2, "label_smoothing_factor": smoothing}
    trained = trainer(model, data, named=("sample_weights",), uneven=True, args=args)
    trained.train()
    usual = trainer(plain, unlabelled, cls=hf.Trainer, args=args)
    usual.train()
    close(model, plain, 1e-5)
    assert column(trained, "loss") == pytest.approx(column(usual, "loss"), abs=1e-4)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", KINDS)
def test_equal_weights_change_nothing(trainer, kind):
    make, data, _, options, _ = KINDS[kind]
    model, rows = make(), data(2 * SIZE + 6)
    for sample in rows:
        sample["weight"] = 0.7
    plain = copy.deepcopy(model)
    chain = gf.agree_filter(1.2)
    trainer(
        model, rows, chain, named=("sample_weights",), uneven=True, optimizers=sgd(model), **options
    ).train()
    trainer(plain, rows, chain, uneven=True, optimizers=sgd(plain), **options).train()
    close(model, plain)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@BOTH
def test_a_resumed_run_is_the_uninterrupted_one(trainer, tmp_path, named):
    def make():
        torch.manual_seed(7)
        model = language_model()
        args = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
        chain = gf.chain(gf.agree_filter(0.9), gf.spike_clip(warmup=1))
        return model, trainer(model, data, chain, named=named, uneven=True, args=args)

    data = sentences(4 * SIZE + 6)  # three steps in each epoch
    model, whole = make()
    whole.train()
    assert whole.state.global_step == 6
    for place in (2, 4):
        resumed, rest = make()
        rest.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{place}"))
        close(resumed, model, tolerance=0)
        assert column(rest, "loss") == column(whole, "loss")


class Scored(FilteredTrainer):
    """Logs an accuracy, and sees no column of weights or groups."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert set(inputs) == {"input_ids", "labels"}
        outputs = model(**inputs)
        hits = (outputs.logits.argmax(1) == inputs["labels"]).double()
        if model.training:
            self.log({"accuracy": hits.mean()})
        return (outputs.loss, outputs) if return_outputs else outputs.loss


@pytest.mark.parametrize("named", [("sample_weights",), tuple(NAMES)])
def test_what_the_loss_logs_is_the_mean_over_samples_with_weights(trainer, named):
    model, collator = classifier(), Recorded()
    plain = copy.deepcopy(model)
    trained = trainer(
        model, labelled(SIZE), cls=Scored, named=named, data_collator=collator,
        args={"num_train_epochs": 1},
    )  # fmt: skip
    trained.train()
    (batch,) = collator.batches
    hits = plain(input_ids=batch["input_ids"]).logits.argmax(1) == batch["labels"]
    real = batch["weight"] > 0
    assert 0 < real.sum() < SIZE
    assert column(trained, "accuracy") == pytest.approx([hits[real].double().mean().item()])


@pytest.mark.parametrize("remove", [True, False])
def test_an_evaluation_ignores_the_columns(trainer, remove):
    data, collator = labelled(2 * SIZE), Recorded()
    if remove:
        data = [{**sample, "note": "not a number"} for sample in data]
    args = {"remove_unused_columns": remove, "eval_strategy": "epoch", "num_train_epochs": 1}
    trained = trainer(
        classifier(), data, cls=Scored, named=tuple(NAMES), args=args, data_collator=collator,
        eval_dataset=data[:6],
    )  # fmt: skip
    trained.train()
    assert set(collator.batches[0]) == {"input_ids", "labels", "weight", "user_id"}
    usual = trainer(
        trained.model, data, cls=hf.Trainer, eval_dataset=[
            {name: sample[name] for name in ("input_ids", "labels")} for sample in data[:6]
        ],
    )  # fmt: skip
    assert column(trained, "eval_loss") == pytest.approx([usual.evaluate()["eval_loss"]])


class Tokens(UserDict):
    """The batch of a tokenizer is such a mapping, and not a dict."""


def test_the_batches_of_a_tokenizer(trainer):
    data, trained = labelled(2 * SIZE), []
    for collator in (
        lambda rows: Tokens(hf.default_data_collator(rows)), hf.default_data_collator
    ):  # fmt: skip
        torch.manual_seed(0)
        model = classifier()
        trainer(model, data, named=tuple(NAMES), data_collator=collator).train()
        trained.append(model)
    close(*trained, 0)


@pytest.mark.usefixtures("float64")
@BOTH
def test_rows_follow_the_gradient_of_a_reference_batch(trainer, named):
    model, data, clean = language_model(), sentences(SIZE), sentences(3)
    for sample in clean:
        sample["weight"] = 0.5
    reference, seen = hf.default_data_collator(clean), []
    plain, collator = copy.deepcopy(model), Recorded()

    def note(rows, state, params, /, *, reference, **extra):
        seen.append({name: g.clone() for name, g in reference.items()})
        return rows, state, {}

    chain = gf.chain(gf.transform("note", "rows -> rows", note), gf.mean_rows())
    options = {
        "named": named, "reference_batch": reference, "compute_loss_func": token_loss,
        "args": {"num_train_epochs": 1}, "data_collator": collator, "optimizers": sgd(model),
    }  # fmt: skip
    trainer(model, data, chain, **options).train()
    parts = [of_tokens(plain, reference, n) for n in range(3)]
    (sum(total for total, _ in parts) / sum(items for _, items in parts)).backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(seen[0][name], p.grad, rtol=1e-10, atol=1e-10)
    by_hand(plain, [collator.batches], 1, M, named, of_tokens)
    close(model, plain)


def test_a_reference_batch_with_unequal_weights_is_refused(trainer):
    data = labelled(SIZE)
    options = {"reference_batch": hf.default_data_collator(data), "named": ("sample_weights",)}
    with pytest.raises(ValueError, match="samples count the same, found unequal weights 'weight'"):
        trainer(classifier(), data, gf.reference_filter(), **options)


@pytest.mark.usefixtures("float64")
def test_users_of_any_number_are_rows_in_order():
    from gradfilter.interop._transformers import number_groups

    users = torch.tensor([70, -3, 70, 10**12, -3, 0])
    assert number_groups(users).tolist() == [0, 1, 0, 2, 1, 3]
    for _ in range(20):
        users = torch.randint(5, (9,))
        seen = list(dict.fromkeys(users.tolist()))
        assert number_groups(users).tolist() == [seen.index(user) for user in users.tolist()]


# --- Refusals ---


def without(name):
    return [{k: v for k, v in sample.items() if k != name} for sample in labelled(SIZE)]


def replaced(name, value):
    return [{**sample, name: value(i)} for i, sample in enumerate(labelled(SIZE))]


MISTAKES = {
    "a tensor": ({"sample_weights": torch.ones(8)}, TypeError, "name of a column .* found Tensor"),
    "one name": (
        {"sample_weights": "a", "groups": "a"}, ValueError, "two columns .* found 'a' for both"
    ),
    "no number of rows": (
        {"groups": "user_id", "m": None}, ValueError, "with groups=, found microbatches=None"
    ),
    "no column": (
        {"sample_weights": "weight", "data": without("weight")}, ValueError,
        r"expected a column 'weight' in the batch .* found \['input_ids', 'labels'\]",
    ),
    "texts": (
        {"groups": "user_id", "data": replaced("user_id", str)}, ValueError,
        "expected a column 'user_id' .*a collator omits or refuses texts",
    ),
    "fractions": (
        {"groups": "user_id", "data": replaced("user_id", float)}, TypeError,
        "expected whole numbers in the column 'user_id' for groups=, found torch.float",
    ),
    "many users": (
        {"groups": "user_id", "data": replaced("user_id", int)}, ValueError,
        "at most microbatches=4 different numbers .* found 8 in a batch. Use microbatches=8",
    ),
    "pairs of users": (
        {"groups": "user_id", "data": replaced("user_id", lambda i: [i, i])}, ValueError,
        r"of shape \(8,\) .* found \(8, 2\)",
    ),
    "negative weights": (
        {"sample_weights": "weight", "data": replaced("weight", lambda i: i - 2.0)}, ValueError,
        "Expected finite sample_weights >= 0",
    ),
    "a mean over tokens": (
        {"sample_weights": "weight", "model": Counted, "data": sentences(SIZE)}, ValueError,
        "expected a loss divided by num_items_in_batch .* mean over the tokens",
    ),
    "one of several sizes": (
        {"sample_weights": "weight", "data": labelled(SIZE + 6)}, ValueError,
        "a last one of 6 samples .* uneven=True",
    ),
    "fewer than rows": (
        {"uneven": True, "data": labelled(SIZE + 3)}, ValueError,
        "at least microbatches=4 samples in every batch, found one of 3.*dataloader_drop_last=True",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_clear_message(trainer, mistake):
    options, error, message = MISTAKES[mistake]
    options = dict(options)
    data, model = options.pop("data", labelled(SIZE)), options.pop("model", classifier)()
    with pytest.raises(error, match=message):
        trainer(model, data, **options).train()


def test_a_batch_of_an_unknown_number_is_refused_at_its_step(trainer):
    class Endless(torch.utils.data.IterableDataset):
        def __init__(self, n):
            self.n = n

        def __iter__(self):
            return iter(labelled(self.n))

    for n, text in ((6, r"uneven=True\)"), (3, "dataloader_drop_last=True")):
        for named in ((), ("sample_weights",)):
            made = trainer(
                classifier(), Endless(n), named=named, uneven=n == 3, args={"max_steps": 2}
            )
            with pytest.raises(ValueError, match=f"found N = {n} samples and M = 4") as caught:
                made.train()
            assert text.replace("\\", "") in caught.value.__notes__[-1]


def test_more_rows_than_samples_and_any_division_with_groups(trainer):
    """Samples of any number belong to the rows, and rows without samples take no part."""
    made = trainer(classifier(), labelled(SIZE + 3), named=("groups",), m=6)
    made.train()
    assert made.state.global_step == 4 and len(column(made, "keep")) == 4


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(LENGTH), nn.Linear(LENGTH, 2)

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.head(self.norm(input_ids.to(self.head.weight.dtype)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_statistics_of_the_batch_are_refused(trainer):
    made = trainer(Normed(), labelled(SIZE), named=("sample_weights",))
    with pytest.raises(ValueError, match=r"found 'norm' .*BatchNorm"):
        made.train()
