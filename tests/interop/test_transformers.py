"""`FilteredTrainer` in the training of `Trainer`: the steps are those of a `Filtered` loop."""

import copy
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradfilter as gf
from _float16 import (
    GROWTH,
    SCALE,
    Perceptron,
    TrainerInHalf,
    samples,
    scales_by_hand,
    train_by_hand,
)
from gradfilter import interop
from gradfilter.interop import Filtered

hf = pytest.importorskip("transformers")
FilteredTrainer = interop.FilteredTrainer

PICKY, NOTHING, ALL = 0.9, 0.0, 2.0  # PICKY skips some steps of these batches
STEPS, SIZE, M, WORDS, LENGTH = 20, 8, 4, 13, 6


def language_model():
    config = hf.LlamaConfig(
        vocab_size=WORDS, max_position_embeddings=LENGTH, hidden_size=8, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).to(torch.get_default_dtype())


def classifier():
    config = hf.BertConfig(
        vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return hf.BertForSequenceClassification(config).to(torch.get_default_dtype())


def sentences(n=STEPS * SIZE, ragged=False):
    """Words that count upwards; only the beginning of ragged ones has labels."""
    rows = []
    for _ in range(n):
        words = (torch.randint(WORDS, ()) + torch.arange(LENGTH)) % WORDS
        labels = words.clone()
        if ragged:
            labels[torch.randint(2, LENGTH + 1, ()) :] = -100
        rows.append({"input_ids": words, "labels": labels})
    return rows


def labelled(n=STEPS * SIZE):
    words = torch.randint(WORDS, (n, LENGTH))
    return [{"input_ids": w, "labels": (w[0] > WORDS // 2).long()} for w in words]


def counting():
    """A link with a state, which makes later gradients larger."""

    def update(grads, state, params, **extra):
        count = state["count"] + 1
        return {k: g * (1 + 0.1 * count) for k, g in grads.items()}, {"count": count}, {}

    zero = lambda params: {"count": torch.zeros((), dtype=torch.int64)}
    return gf.link("counting", "tree -> tree", update, init=zero)


def sgd(model):
    """An optimizer and a scheduler, and a list that grows with every step made."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    return optimizer, scheduler, calls


class Recorded:
    """A collator that remembers its batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append(hf.default_data_collator(rows))
        return dict(self.batches[-1])


@pytest.fixture
def trainer(tmp_path):
    def make(model, data, transforms=None, *, cls=FilteredTrainer, m=M, args=None, **options):
        settings = {
            "max_steps": STEPS, "per_device_train_batch_size": SIZE, "logging_steps": 1,
            "max_grad_norm": 0.0, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
            "use_cpu": True,
        }  # fmt: skip
        if issubclass(cls, FilteredTrainer):
            options |= {"transforms": transforms or gf.agree_filter(PICKY), "microbatches": m}
        arguments = hf.TrainingArguments(str(tmp_path), **settings | (args or {}))
        made = cls(model, arguments, train_dataset=data, **options)
        made.remove_callback(hf.PrinterCallback)
        return made

    return make


def by_hand(model, batches, transforms, *, accumulate=1, context=None):
    """The same training with `Filtered`; the results of its steps."""
    optimizer, scheduler, _ = sgd(model)
    wrapper = Filtered(model, None, transforms, optimizer, M)
    model.train()
    results = []
    for i, batch in enumerate(batches, 1):
        with context or torch.enable_grad():
            if i % accumulate:
                wrapper.accumulate(batch)
                continue
            results.append(wrapper.step(batch))
        scheduler.step()
    return results


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=tolerance, atol=tolerance)


def column(trained, name):
    return [row[name] for row in trained.state.log_history if name in row]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_twenty_steps_are_those_of_a_plain_loop(trainer, accumulate):
    model, chain, collator = language_model(), gf.agree_filter(0.3), Recorded()
    plain = copy.deepcopy(model)
    optimizer, scheduler, calls = sgd(model)
    trained = trainer(
        model, sentences(STEPS * SIZE * accumulate), chain, data_collator=collator,
        args={"gradient_accumulation_steps": accumulate}, optimizers=(optimizer, scheduler),
    )  # fmt: skip
    trained.train()
    results = by_hand(plain, collator.batches, chain, accumulate=accumulate)
    close(model, plain)
    kept = [float(result.info["keep"]) for result in results]
    assert len(calls) == sum(kept) and 0 < sum(kept) < STEPS
    assert trained.state.global_step == STEPS
    assert column(trained, "keep") == kept
    assert column(trained, "loss") == pytest.approx([r.loss.item() for r in results])
    accepted = [r.info["agree_filter/accepted"].double().mean().item() for r in results]
    assert column(trained, "agree_filter/accepted") == pytest.approx(accepted)
    assert scheduler.get_last_lr() == pytest.approx([0.1 * 0.9**STEPS])


OBJECTIVES = {
    "sentences": (language_model, lambda: sentences(ragged=True), {}, {}),
    "smoothed sentences": (
        language_model, lambda: sentences(ragged=True), {}, {"label_smoothing_factor": 0.2}
    ),
    "smoothed classes": (classifier, labelled, {}, {"label_smoothing_factor": 0.2}),
    "own function": (
        classifier, labelled,
        {"compute_loss_func": lambda out, y, num_items_in_batch: (
            F.cross_entropy(out.logits, y, reduction="sum", label_smoothing=0.1)
            / num_items_in_batch
        )}, {},
    ),
}  # fmt: skip


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("m", [M, None])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_mean_of_all_rows_is_the_gradient_of_a_trainer(trainer, objective, m):
    make, data, options, args = OBJECTIVES[objective]
    model, rows = make(), data()[:100]  # the last batch of an epoch has fewer
    plain = copy.deepcopy(model)
    args = args | {
        "gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "learning_rate": 1e-2,
        "weight_decay": 0.1, "warmup_steps": 3, "max_steps": 10,
    }  # fmt: skip
    trained = trainer(model, rows, gf.mean_rows(), m=m, args=args, **options)
    trained.train()
    usual = trainer(plain, rows, cls=hf.Trainer, args=args, **options)
    usual.train()
    close(model, plain, tolerance=1e-8)
    for name in ("loss", "grad_norm", "learning_rate"):
        assert column(trained, name) == pytest.approx(column(usual, name), abs=1e-6)
    assert max(column(trained, "grad_norm")) > 0.1  # clipped


class CountingLoss:
    """A loss with a state of its own: row m sees the counter that row m - 1 left."""

    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, labels, num_items_in_batch=None):
        self.calls += 1
        return self.calls * F.cross_entropy(outputs.logits, labels)


class CountingModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, outputs, labels, num_items_in_batch=None):
        self.calls += 1
        return self.calls * F.cross_entropy(outputs.logits, labels)


class CountingTrainer(FilteredTrainer):
    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls += 1
        logits = model(input_ids=inputs["input_ids"]).logits
        return self.calls * F.cross_entropy(logits, inputs["labels"])


class HoldingTrainer(FilteredTrainer):
    """A trainer with losses of its own, set before or after Trainer's attributes."""

    def __init__(self, *args, early=None, late=None, **kwargs):
        if early is not None:
            self.losses = early
        super().__init__(*args, **kwargs)
        if late is not None:
            self.losses = late

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = self.losses["ours"] if isinstance(self.losses, dict) else self.losses
        return loss(model(input_ids=inputs["input_ids"]), inputs["labels"])


SHARED = SimpleNamespace(calls=0)


def global_loss(outputs, labels, num_items_in_batch=None):
    SHARED.calls += 1
    return SHARED.calls * F.cross_entropy(outputs.logits, labels)


class CountingElsewhere(FilteredTrainer):
    """Counts in the place that `count` writes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"]).logits
        return self.count() * F.cross_entropy(logits, inputs["labels"])


def trainer_with(make, count):
    """Return a class of trainers with an attribute ``calls`` of its own, and one that counts it."""

    def init(self, *args, **kwargs):
        CountingElsewhere.__init__(self, *args, **kwargs)
        self._calls = make()
        SHARED.calls = 0

    return type("Counts", (CountingElsewhere,), {"__init__": init, "count": count, "calls": 0})


def count_in_a_list(self):
    self._calls[0] += 1
    return self._calls[0]


def count_in_an_object(self):
    self._calls.calls += 1
    return self._calls.calls


def count_in_the_class(self):
    type(self).calls += 1
    return self.calls


class GlobalTrainer(FilteredTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        SHARED.calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        SHARED.calls += 1
        logits = model(input_ids=inputs["input_ids"]).logits
        return SHARED.calls * F.cross_entropy(logits, inputs["labels"])


def global_function():
    SHARED.calls = 0
    return FilteredTrainer, {"compute_loss_func": global_loss}


COUNTING = {
    "private list": lambda: (trainer_with(lambda: [0], count_in_a_list), {}),
    "private object": lambda: (trainer_with(CountingLoss, count_in_an_object), {}),
    "class": lambda: (trainer_with(lambda: None, count_in_the_class), {}),
    "global": lambda: (GlobalTrainer, {}),
    "global of a function": global_function,
    "object": lambda: (FilteredTrainer, {"compute_loss_func": CountingLoss()}),
    "module": lambda: (FilteredTrainer, {"compute_loss_func": CountingModule()}),
    "partial": lambda: (FilteredTrainer, {"compute_loss_func": partial(CountingLoss())}),
    "bound method": lambda: (FilteredTrainer, {"compute_loss_func": CountingLoss().__call__}),
    "attribute": lambda: (CountingTrainer, {}),
    "early module": lambda: (HoldingTrainer, {"early": CountingModule()}),
    "early dict": lambda: (HoldingTrainer, {"early": {"ours": CountingLoss()}}),
    "late module": lambda: (HoldingTrainer, {"late": CountingModule()}),
    "late object": lambda: (HoldingTrainer, {"late": CountingLoss()}),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("where", COUNTING)
def test_a_loss_that_counts_goes_from_row_to_row(trainer, where):
    model, collator = classifier(), Recorded()
    plain = copy.deepcopy(model)
    cls, options = COUNTING[where]()
    trained = trainer(
        model, labelled(2 * SIZE), gf.mean_rows(), cls=cls, data_collator=collator,
        args={"max_steps": 2}, optimizers=sgd(model)[:2], **options,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"changes attribute '.*calls(\.0)?'"):
        trained.train()
    optimizer, scheduler, _ = sgd(plain)
    plain.train()
    calls = 0
    for batch in collator.batches:
        optimizer.zero_grad()
        words, labels = batch["input_ids"].chunk(M), batch["labels"].chunk(M)
        for row in zip(words, labels, strict=True):
            calls += 1
            loss = calls * F.cross_entropy(plain(input_ids=row[0]).logits, row[1])
            (loss / M).backward()
        optimizer.step()
        scheduler.step()
    close(model, plain)


class Totalling(FilteredTrainer):
    """A trainer that adds up its losses in place, as Trainer itself does."""

    total = None

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.total is None:
            self.total = torch.zeros_like(loss)
        self.total += loss
        return loss


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", ["auto", "fused", "loop"])
def test_a_subclass_trains_as_its_base_with_accumulation_and_sharpness(trainer, plan):
    chain = gf.chain(gf.sam_perturb(0.05), gf.mean_rows())
    trained = {}
    for cls in (FilteredTrainer, type("Plain", (FilteredTrainer,), {}), Totalling):
        torch.manual_seed(0)
        model = classifier()
        torch.manual_seed(1)
        made = trainer(
            model, labelled(8 * SIZE), chain, cls=cls, plan=plan,
            args={"gradient_accumulation_steps": 2, "max_steps": 4}, optimizers=sgd(model)[:2],
        )  # fmt: skip
        made.train()
        trained[cls.__name__] = model
    close(trained["Plain"], trained["FilteredTrainer"], 0)
    close(trained["Totalling"], trained["FilteredTrainer"], 0)


@pytest.mark.usefixtures("float64")
def test_an_overriding_compute_loss_is_the_loss_of_a_microbatch(trainer):
    seen = []

    class Squared:
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append((len(inputs["labels"]), model.training))
            outputs = model(input_ids=inputs["input_ids"])
            loss = F.mse_loss(outputs.logits, F.one_hot(inputs["labels"], 2).to(outputs.logits))
            return (loss, outputs) if return_outputs else loss

    filtered = type("FilteredSquared", (Squared, FilteredTrainer), {})
    usual = type("UsualSquared", (Squared, hf.Trainer), {})
    model, data = classifier(), labelled()
    plain = copy.deepcopy(model)
    trainer(model, data, gf.mean_rows(), cls=filtered).train()
    assert set(seen) == {(SIZE // M, True)}
    trainer(plain, data, cls=usual).train()
    close(model, plain, tolerance=1e-8)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.filterwarnings("error:Fell back to plan:UserWarning")
@pytest.mark.usefixtures("float64")
def test_gradient_checkpointing_changes_no_step(trainer):
    plain = classifier()
    model, data = copy.deepcopy(plain), labelled(2 * SIZE)
    for trained, on in ((model, True), (plain, False)):
        settings = {"max_steps": 2, "gradient_checkpointing": on}
        trainer(trained, data, args=settings, optimizers=sgd(trained)[:2]).train()
    assert model.is_gradient_checkpointing
    close(model, plain)


def test_the_loss_goes_down(trainer):
    model, data = language_model(), sentences(3 * STEPS * SIZE)
    args = {"learning_rate": 3e-2, "max_steps": 3 * STEPS, "logging_steps": 5}
    trained = trainer(model, data, gf.agree_filter(0.97), args=args)
    trained.train()
    losses = column(trained, "loss")
    assert len(losses) == 12 and losses[-1] < 0.6 * losses[0]
    assert all(5 * keep == pytest.approx(round(5 * keep)) for keep in column(trained, "keep"))


@pytest.mark.usefixtures("float64")
def test_a_resumed_run_is_the_uninterrupted_one(trainer, tmp_path):
    def make():
        torch.manual_seed(7)
        chain = gf.chain(gf.agree_filter(0.3), counting())
        model = language_model()
        args = {"save_strategy": "steps", "save_steps": 10, "num_train_epochs": 2}
        return model, trainer(model, data, chain, args=args)

    data = sentences(6 * SIZE)  # a step in the middle of an epoch
    model, whole = make()
    whole.train()
    resumed, rest = make()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    close(resumed, model, tolerance=0)
    for name in ("keep", "loss", "learning_rate"):
        assert column(rest, name) == column(whole, name)
    kept = sum(column(whole, "keep")[:10])
    saved = torch.load(tmp_path / "checkpoint-10" / "transforms.pt", weights_only=True)
    assert saved == {"counting.count": kept} and 0 < kept < 10
    (tmp_path / "checkpoint-10" / "transforms.pt").unlink()
    afresh, again = make()
    with pytest.warns(UserWarning, match=r"transforms\.pt, found none: they start afresh"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert not torch.equal(afresh.lm_head.weight, model.lm_head.weight)


def test_a_filter_that_accepts_nothing_never_calls_the_optimizer(trainer):
    words = torch.randint(WORDS, (2, LENGTH))
    data = [{"input_ids": w, "labels": torch.tensor(k)} for k in (0, 1) for w in words]
    model = classifier()
    before = copy.deepcopy(model)

    class InOrder(FilteredTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(data)

    trained = trainer(
        model, data, gf.agree_filter(NOTHING), cls=InOrder, m=2,
        args={"max_steps": 4, "max_grad_norm": 1.0, "per_device_train_batch_size": 4},
    )  # fmt: skip
    optimizer, calls = trained.create_optimizer(), []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    trained.train()
    close(model, before, tolerance=0)
    assert not calls and not optimizer.state
    assert trained.state.global_step == trained.lr_scheduler.last_epoch == 4
    assert column(trained, "keep") == [0.0] * 4


def test_bf16_is_autocast_around_the_model(trainer):
    model, collator, chain = language_model(), Recorded(), gf.agree_filter(ALL)
    plain, full = copy.deepcopy(model), copy.deepcopy(model)
    trained = trainer(
        model, sentences(), chain, args={"bf16": True}, data_collator=collator,
        optimizers=sgd(model)[:2],
    )  # fmt: skip
    trained.train()
    by_hand(plain, collator.batches, chain, context=torch.autocast("cpu", torch.bfloat16))
    by_hand(full, collator.batches, chain)
    assert not torch.equal(model.lm_head.weight, full.lm_head.weight)
    close(model, plain, tolerance=5e-3)
    close(model, full, tolerance=5e-2)


def test_rows_of_a_step_that_broke_off_are_not_filtered_later(trainer):
    model, data = language_model(), sentences()
    plain = copy.deepcopy(model)

    class Breaking(FilteredTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.breaks:
                self.breaks = False
                raise InterruptedError
            return loss

    args = {"gradient_accumulation_steps": 2, "max_steps": 3}
    trained = trainer(model, data, gf.mean_rows(), cls=Breaking, args=args)
    trained.breaks = True
    with pytest.raises(InterruptedError):
        trained.train()
    trained.train()
    trainer(plain, data, gf.mean_rows(), args=args).train()
    close(model, plain, tolerance=1e-6)


def test_evaluation_and_more_training_go_on(trainer):
    data = labelled(4 * SIZE)
    args = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    model = classifier()
    trained = trainer(model, data, gf.agree_filter(ALL), args=args, eval_dataset=data)
    trained.train()
    before = copy.deepcopy(model)
    trained.train()
    assert len(column(trained, "eval_loss")) == 2 and len(column(trained, "keep")) == 4
    assert not torch.equal(before.classifier.weight, model.classifier.weight)


def test_names_are_those_of_the_model(trainer):
    model = classifier()
    before = copy.deepcopy(model)
    zero = gf.link("zero", "tree -> tree", lambda grads, state, params, **extra: (
        {k: torch.zeros_like(g) for k, g in grads.items()}, state, {}
    ))  # fmt: skip
    chain = gf.chain(gf.mean_rows(), gf.masked(zero, lambda name: name.startswith("classifier.")))
    trainer(model, labelled(), chain, optimizers=sgd(model)[:2]).train()
    assert torch.equal(model.classifier.weight, before.classifier.weight)
    assert not torch.equal(model.bert.pooler.dense.weight, before.bert.pooler.dense.weight)


def test_a_last_batch_that_does_not_divide_is_known_before_the_first(trainer):
    class Strict:
        def compute_loss(self, *args, **kwargs):
            raise AssertionError("a batch was met")

    strict = type("StrictTrainer", (Strict, FilteredTrainer), {})
    model, data = classifier(), labelled(3 * SIZE + 2)
    epochs = {"max_steps": -1, "num_train_epochs": 1}
    with pytest.raises(ValueError, match=r"last one of 2 samples .* Use dataloader_drop_last=True"):
        trainer(model, data, args=epochs, cls=strict).train()
    with pytest.raises(ValueError, match="a last one of 2 samples"):
        trainer(model, data, args={"max_steps": 4}, cls=strict).train()
    assert trainer(model, data, args={"max_steps": 3}).train().global_step == 3
    dropped = epochs | {"dataloader_drop_last": True}
    assert trainer(model, data, args=dropped).train().global_step == 3
    assert trainer(model, data, m=2, args=epochs).train().global_step == 4
    assert trainer(model, data, m=None, args=epochs).train().global_step == 4

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(labelled(3))

    with pytest.raises(ValueError, match="found N = 3 samples and M = 4") as caught:
        trainer(model, Endless(), args={"max_steps": 2}).train()
    assert "dataloader_drop_last=True" in caught.value.__notes__[-1]


@pytest.mark.parametrize("plan", ["auto", "loop"])
def test_what_the_loss_logs_is_the_mean_over_rows_and_steps(trainer, plan):
    class Scored:
        def compute_loss(self, model, inputs, **kwargs):
            outputs = model(**inputs)
            hits = (outputs.logits.argmax(1) == inputs["labels"]).double()
            self.log({"accuracy": hits.mean(), "loss": 7.0, "rows": 1})
            return outputs.loss

    scored = type("ScoredTrainer", (Scored, FilteredTrainer), {})
    model, collator = classifier(), Recorded()
    plain = copy.deepcopy(model)
    trained = trainer(
        model, labelled(), gf.agree_filter(2.0), cls=scored, plan=plan, data_collator=collator,
        args={"max_steps": 4, "logging_steps": 2}, optimizers=sgd(model)[:2],
    )  # fmt: skip
    trained.train()

    def criterion(outputs, batch):
        return outputs.loss, (outputs.logits.argmax(1) == batch["labels"]).double()

    optimizer, scheduler, _ = sgd(plain)
    wrapper = Filtered(plain, criterion, gf.agree_filter(2.0), optimizer, M, has_aux=True)
    plain.train()
    results = []
    for batch in collator.batches[:4]:  # the loader looks one ahead
        results.append(wrapper.step(batch))
        scheduler.step()
    hits = [result.aux.mean().item() for result in results]
    close(model, plain, tolerance=1e-5)
    assert column(trained, "accuracy") == pytest.approx([sum(hits[:2]) / 2, sum(hits[2:]) / 2])
    assert column(trained, "rows") == [1.0, 1.0]
    assert 7.0 not in column(trained, "loss")


def test_mistakes_are_one_clear_message(trainer, monkeypatch):
    model, data = classifier(), labelled()
    with pytest.raises(TypeError, match="keyword-only arguments: 'transforms' and 'microbatches'"):
        FilteredTrainer(model)
    with pytest.raises(TypeError, match=r"found 'rows -> update'. Remove 'sgd'"):
        trainer(model, data, gf.chain(gf.mean_rows(), gf.sgd(0.1)))
    with pytest.raises(ValueError, match=r"expected per_device_train_batch_size .* found 8. Use 6"):
        trainer(model, data, m=3).train()
    with pytest.raises(ValueError, match=r"takes gradients, found .*LOMO"):
        trainer(model, data, args={"optim": "lomo"})
    monkeypatch.setattr(hf.TrainingArguments, "n_gpu", 2)  # without two of them
    with pytest.raises(ValueError, match="expected one device in a process, found 2"):
        trainer(model, data)


average_of = partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.8))


class Averaging(hf.TrainerCallback):
    """An average of the weights after every step, made or skipped."""

    def on_train_begin(self, *args, model, **kwargs):
        self.average = average_of(model)

    def on_step_end(self, *args, model, **kwargs):
        self.average.update_parameters(model)


@pytest.mark.usefixtures("float64")
def test_averaged_weights_are_those_of_filtered_steps(trainer):
    model, chain, collator = language_model(), gf.agree_filter(0.3), Recorded()
    plain, averaging = copy.deepcopy(model), Averaging()
    trained = trainer(
        model, sentences(), chain, data_collator=collator, optimizers=sgd(model)[:2],
        callbacks=[averaging],
    )  # fmt: skip
    trained.train()
    average = average_of(plain)
    optimizer, scheduler, _ = sgd(plain)
    wrapper = Filtered(plain, None, chain, optimizer, M)
    plain.train()
    for batch in collator.batches[:STEPS]:
        wrapper.step(batch)
        average.update_parameters(plain)
        scheduler.step()
    assert 0 < sum(column(trained, "keep")) < STEPS
    close(averaging.average.module, average.module)
    assert not torch.allclose(average.module.lm_head.weight, plain.lm_head.weight)


@pytest.mark.usefixtures("float64")
def test_a_run_whose_first_step_is_skipped_does_not_warn(trainer):
    model = classifier()
    made = trainer(
        model, labelled(2 * SIZE), gf.agree_filter(NOTHING), m=2, args={"max_steps": 2},
        optimizers=sgd(model)[:2],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*lr_scheduler.step")
        made.train()
    assert column(made, "keep") == [0.0, 0.0]


class Half(TrainerInHalf, FilteredTrainer):
    """A trainer in float16."""


class Scales(hf.TrainerCallback):
    """Notes the scale after every step, and the norm of the gradient of steps made."""

    def __init__(self, made):
        self.made, self.scales = made, []

    def on_step_end(self, *args, **kwargs):
        self.scales.append(self.made.accelerator.scaler.get_scale())


HOT = [(1, 2), (3, 0), (3, 3), *((5, row) for row in range(M))]  # the sixth step is skipped
HALVES = 8


def as_samples(columns):
    flat = {name: values.flatten(0, 2) for name, values in columns.items()}
    return [{n: v[i] for n, v in flat.items()} for i in range(len(flat["labels"]))]


HALF = {
    "fp16": True, "max_steps": HALVES, "max_grad_norm": 0.4, "save_strategy": "steps",
    "save_steps": 4, "train_sampling_strategy": "sequential",
}  # fmt: skip


def half_precision(make, model, data, args=None, resume=None, cls=Half):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    made = make(
        model, as_samples(data), gf.mean_rows(), cls=cls, args=HALF | (args or {}),
        optimizers=(optimizer, constant),
    )  # fmt: skip
    noted = Scales(made)
    made.add_callback(noted)
    made.train(resume_from_checkpoint=resume)
    return made, noted.scales, len(calls)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_float16_a_row_that_overflows_is_rejected_and_not_the_step(trainer, accumulate):
    data, model = samples(HALVES, accumulate * M, 2, HOT), Perceptron()
    plain = copy.deepcopy(model)
    args = {"gradient_accumulation_steps": accumulate}
    trained, scales, calls = half_precision(trainer, model, data, args)
    norms = train_by_hand(plain, data, HOT, limit=0.4)
    assert scales == scales_by_hand(HALVES, HOT)
    assert calls == len(norms) == HALVES - (accumulate == 1) and min(norms) < 0.4 < max(norms)
    kept = [step for step, keep in enumerate(column(trained, "keep")) if keep]
    found = [column(trained, "grad_norm")[step] for step in kept]
    assert found == pytest.approx(norms, rel=5e-3)
    close(model, plain, tolerance=5e-3)
    assert trained.state.global_step == HALVES


def test_a_scale_is_resumed_with_the_run(trainer, tmp_path):
    data, model = samples(HALVES, M, 2, [(1, 2)]), Perceptron()  # at 4 the scale has just grown
    start = copy.deepcopy(model)
    _, scales, _ = half_precision(trainer, model, data, {"save_steps": 3})
    again, rest, _ = half_precision(trainer, start, data, resume=str(tmp_path / "checkpoint-3"))
    close(again.model, model, tolerance=0)
    assert rest == scales[3:] and scales == scales_by_hand(HALVES, [(1, 2)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_in_float16_on_a_gpu_a_row_that_overflows_is_rejected_alone(trainer):
    class Scaled(FilteredTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            options = {"init_scale": SCALE, "growth_interval": GROWTH}
            self.accelerator.scaler = torch.amp.GradScaler("cuda", **options)

    data, model = samples(HALVES, M, 2, HOT), Perceptron()
    plain = copy.deepcopy(model)
    args = {"use_cpu": False}
    _, scales, _ = half_precision(trainer, model, data, args, cls=Scaled)
    train_by_hand(plain, data, HOT, limit=0.4)
    assert scales == scales_by_hand(HALVES, HOT)
    close(model.cpu(), plain, tolerance=5e-3)


def test_without_transformers_the_rest_is_there(monkeypatch):
    monkeypatch.delitem(sys.modules, "gradfilter.interop._transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert interop.Filtered is Filtered
    with pytest.raises(ImportError, match=r"FilteredTrainer is built on.*gradfilter\[interop\]"):
        _ = interop.FilteredTrainer


def texts(n):
    """Texts of several lengths, as a tokenizer leaves them."""
    words = torch.randint(WORDS, (n, LENGTH))
    lengths = 2 + torch.arange(n) % (LENGTH - 1)
    return [
        {"input_ids": w[:k].tolist(), "labels": int(w[0] > WORDS // 2)}
        for w, k in zip(words, lengths.tolist(), strict=True)
    ]


def to_the_longest(rows):
    """Pads as a collator does, and says where there is text."""
    longest = max(len(row["input_ids"]) for row in rows)
    pad = lambda values: values + [0] * (longest - len(values))
    return {
        "input_ids": torch.tensor([pad(row["input_ids"]) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"])) for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", ["auto", "fused"])
def test_padded_texts_one_by_one_are_the_training_of_a_trainer(trainer, plan):
    """Every step is fused, though each batch has texts with and without padding."""
    steps, model, data = 8, classifier(), texts(8 * SIZE)
    plain = copy.deepcopy(model)
    args = {"max_steps": steps, "learning_rate": 1e-2}
    options = {"data_collator": to_the_longest, "args": args}
    trained = trainer(model, data, gf.mean_rows(), m=None, plan=plan, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Fell back")
        trained.train()
    trainer(plain, data, cls=hf.Trainer, **options).train()
    assert trained.state.global_step == steps
    close(model, plain, tolerance=1e-8)


def test_rows_follow_the_gradient_of_a_reference_batch(trainer):
    torch.manual_seed(0)
    model, data = classifier(), labelled(4 * SIZE)
    clean = hf.default_data_collator(labelled(3))
    plain, collator = copy.deepcopy(model), Recorded()
    made = trainer(
        model,
        data,
        gf.reference_filter(),
        args={"max_steps": 4},
        data_collator=collator,
        reference_batch=clean,
        optimizers=sgd(model)[:2],
    )
    made.train()
    optimizer, scheduler, _ = sgd(plain)
    wrapper = Filtered(plain, None, gf.reference_filter(), optimizer, M)
    for batch in collator.batches:
        wrapper.step(batch, reference_batch=clean)
        scheduler.step()
    for (name, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], msg=name)
