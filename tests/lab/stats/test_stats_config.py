"""Options that `gradfilter stats` refuses before it computes, and the checkpoints that it finds."""

import json

import pytest

from gradfilter.lab._usage import UsageError
from gradfilter.lab.stats._stats_command import chosen, find_run
from gradfilter.lab.stats._stats_config import METRICS, StatsConfig, check_values
from gradfilter.lab.train._archive import Checkpoint

SAVED = [Checkpoint(0, 0, 0.0), Checkpoint(1, 80, 5.0), Checkpoint(2, 160, 10.0)]


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_accepted_with_defaults(metric):
    check_values(StatsConfig(metric=metric))


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"batch_size": 0}, "--batch-size"),
        ({"num_directions": 0}, "--num-directions"),
        ({"num_power_iters": 0}, "--num-power-iters"),
        ({"num_probes": 0}, "--num-probes"),
        ({"skip": -1}, "--skip"),
        ({"mc_sample_seed": -1}, "--mc-sample-seed"),
        ({"num_samples": 0}, "--num-samples"),
        ({"nsteps_per_epoch": 0}, "--nsteps-per-epoch"),
        ({"checkpoint": (1, -1)}, "--checkpoint"),
        ({"outname": "../up"}, "--outname"),
        ({"outname": "x" * 101}, "--outname"),
        ({"normalization": "softmax"}, "--normalization"),
        ({"metric": "loss_gradient", "target_logit_only": True}, "--target-logit-only"),
        ({"metric": "jacobian", "legacy_scale": True}, "--legacy-scale"),
        ({"metric": "jacobian", "method": "gram"}, "--method"),
        ({"metric": "tangent_jacobian", "normalization": "jacobian"}, "--normalization"),
        ({"rho": 0.1}, "--rho"),
        ({"metric": "jacobian", "num_power_iters": 10}, "--num-power-iters"),
        ({"metric": "loss_hessian_top", "num_probes": 10}, "--num-probes"),
        ({"metric": "sharpness", "microbatches": 4}, "--microbatches"),
        (
            {"metric": "jacobian", "normalization": "crossentropy", "target_logit_only": True},
            "--target-logit-only",
        ),
        ({"metric": "agreement", "microbatches": 1}, "--microbatches"),
        ({"metric": "agreement", "batch_size": 12}, "--batch-size"),
        ({"metric": "agreement", "gen_strategy": "svd-5"}, "--gen-strategy"),
        ({"metric": "sharpness", "rho": 0.0}, "--rho"),
        ({"metric": "sharpness", "rho": float("nan")}, "--rho"),
        ({"cumulative": True}, "--cumulative"),
        ({"raw_path": True, "gen_strategy": "svd-5"}, "--raw-path"),
        ({"cumulative": True, "raw_path": True, "gen_strategy": "svd-path"}, "--cumulative"),
        ({"last": True, "checkpoint": (1,)}, "--last"),
        ({"checkpoint_by_step": True}, "--checkpoint-by-step"),
        ({"nsteps_per_epoch": 10, "checkpoint": (1,)}, "--nsteps-per-epoch"),
    ],
)
def test_a_bad_value_is_one_line_about_its_option(settings, option):
    with pytest.raises(UsageError) as refused:
        check_values(StatsConfig(**settings))
    line = str(refused.value)
    assert option in line.split(":")[0] and "\n" not in line


def test_run_and_search_exclude_each_other(tmp_path):
    with pytest.raises(UsageError, match="RUN"):
        check_values(StatsConfig(run=tmp_path, seed=3))
    # NAME may stand in the environment, whatever the command.
    check_values(StatsConfig(run=tmp_path, name="study"))


# Checkpoints


def ids(**settings):
    return [c.id for c in chosen(StatsConfig(**settings), SAVED)]


def test_checkpoints_by_id_step_and_epoch():
    assert ids() == []
    assert ids(last=True) == [2]
    assert ids(checkpoint=(2, 0, 2)) == [2, 0]
    assert ids(checkpoint=(160, 0), checkpoint_by_step=True) == [2, 0]
    assert ids(checkpoint=(5, 10), checkpoint_by_step=True, nsteps_per_epoch=16) == [1, 2]


@pytest.mark.parametrize(
    "settings",
    [
        {"checkpoint": (3,)},
        {"checkpoint": (81,), "checkpoint_by_step": True},
        {"checkpoint": (80,), "checkpoint_by_step": True, "nsteps_per_epoch": 3},
    ],
)
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(settings):
    with pytest.raises(UsageError, match="There are: 0, "):
        ids(**settings)


def test_the_last_of_none_is_refused():
    with pytest.raises(UsageError, match="no checkpoint yet"):
        chosen(StatsConfig(last=True), [])


# Runs


def make(folder, **settings):
    folder.mkdir(parents=True)
    record = {"command": "train", "status": "finished", "settings": settings}
    (folder / "config.json").write_text(json.dumps(record))


def test_the_run_that_fits_is_found(tmp_path):
    make(tmp_path / "a", data="digits", model="mlp_8", label_noise=0.3, seed=0, name="")
    make(tmp_path / "b", data="digits", model="mlp_8", label_noise=0.3, seed=1, name="")
    make(tmp_path / "c", data="digits", model="mlp_9", label_noise=0.0, seed=1, name="x")
    found = lambda **wanted: find_run(StatsConfig(save_dir=tmp_path, **wanted))
    assert found(seed=0) == tmp_path / "a"
    assert found(model="mlp_8", seed=1) == tmp_path / "b"
    assert found(label_noise=0.0) == found(name="x") == tmp_path / "c"
    assert find_run(StatsConfig(run=tmp_path / "a")) == tmp_path / "a"
    with pytest.raises(UsageError, match="2 runs fit --model mlp_8") as several:
        found(model="mlp_8")
    assert all(str(tmp_path / name) in str(several.value) for name in "ab")
    assert str(tmp_path / "c") not in str(several.value)
    for number in range(3, 6):
        make(tmp_path / f"more{number}", data="digits", model="mlp_8", seed=number)
    with pytest.raises(UsageError, match="5 runs fit --model mlp_8") as many:
        found(model="mlp_8")
    listed, advice = str(many.value).split(". Name one of the directories: ")
    assert listed.count(str(tmp_path)) == 3 and listed.endswith("more3, and 2 more")
    assert f"gradfilter stats {tmp_path / 'a'} ..." in advice
    with pytest.raises(UsageError, match=r"no run .* fits --seed 7"):
        found(seed=7)
    with pytest.raises(UsageError, match="no run"):
        find_run(StatsConfig(run=tmp_path / "d"))
