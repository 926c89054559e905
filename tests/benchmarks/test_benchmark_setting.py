"""The settings of the benchmarks: equal samples for all candidates, and no rejected row."""

import pytest
import torch
from benchmarks._models import Task, images
from benchmarks._setting import THRESHOLD, Setting
from benchmarks._torch_steps import plain_step, sam_step
from torch import nn

import gradfilter as gf
from benchmarks import _setting

CPU = torch.device("cpu")
LINEAR = Task("Linear", lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), images(10), ())


@pytest.fixture
def setting():
    return Setting.of(LINEAR, 6, CPU)


def test_plain_plans_and_the_published_step_go_over_the_same_samples(monkeypatch, setting):
    seen = []

    def record(logits, targets):
        seen.append(targets.tolist())
        return nn.functional.cross_entropy(logits, targets)

    monkeypatch.setattr(_setting, "criterion", record)
    setting = Setting.of(LINEAR, 6, CPU)
    for computation in (setting.plain, setting.filtered(2, "loop"), setting.published(2)):
        computation()
    whole, *parts = seen
    assert len(whole) == 6 and parts == [whole[:3], whole[3:]] * 2


def test_every_row_is_combined(setting):
    grads, _, out = setting.filtered(3, "loop")()
    assert out["accepted"].all()
    inputs, targets = setting.batch
    nn.functional.cross_entropy(setting.model(inputs), targets).backward()
    torch.testing.assert_close(grads["1.weight"], setting.model[1].weight.grad)


def test_the_published_step_accepts_everything_and_stays_where_it_is(setting):
    step = setting.published(3)
    first, second = step(), step()
    assert first["agreed_count"] == second["agreed_count"] == 2
    assert first["train_loss"] == second["train_loss"]


def test_a_step_starts_from_the_same_parameters_every_time(setting):
    step = setting.step(2, "loop", gf.chain(gf.agree_filter(THRESHOLD), gf.sgd(0.1)))
    first, second = step(), step()
    assert not first[0]["1.weight"].equal(setting.params["1.weight"])
    assert first[0]["1.weight"].equal(second[0]["1.weight"])


def test_plain_leaves_no_gradients_behind(setting):
    setting.plain()
    assert all(p.grad is None for p in setting.model.parameters())


def test_autocast_reaches_the_model(setting):
    assert Setting.of(LINEAR, 6, CPU, bf16=True).rows(2, "loop")().losses.dtype == torch.float32
    rows, cast = (Setting.of(LINEAR, 6, CPU, bf16=b).rows(2, "loop")() for b in (False, True))
    difference = (rows.gram() - cast.gram()).abs().max() / rows.gram().abs().max()
    assert 1e-5 < difference < 0.1


@pytest.mark.parametrize("build", [plain_step, lambda setting: sam_step(setting, 0.05)])
def test_steps_of_torch_leave_the_setting_alone(build, setting):
    step = build(setting)
    step()
    step()
    for name, p in setting.model.named_parameters():
        assert p.equal(setting.params[name]) and p.grad is None
