"""`gradfilter stats` on a run of `gradfilter train`."""

import json
import shutil

import pytest
import torch
from filelock import FileLock

from _lab import command, refused
from _stats_run import numbers, train
from gradfilter.lab.stats._stats_config import METRICS
from gradfilter.lab.train._archive import ARCHIVE, checkpoints
from gradfilter.lab.train._restore import restored

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("train"))


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run: numbers of one test are not found by another."""
    return shutil.copytree(trained, tmp_path / "runs" / "run")


def last(run):
    return restored(run, checkpoints(run / ARCHIVE)[-1], device=CPU)


# What is measured


def test_without_a_checkpoint_it_lists_them(run):
    code, out, err = command("stats", run)
    assert (code, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines()[1:-1]] == ["0", "1", "2"]
    assert not (run / "stats").exists()


def test_numbers_are_those_of_the_training(run):
    path, found = numbers(run, "--metric", "accuracy", "--dataset-split", "test")
    assert path.name == "accuracy-test-checkpoint-2.json"
    trained = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["metadata"]["aggregate"]["mean"] == pytest.approx(trained["test_accuracy"])
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]  # nothing else is left


def test_columns_and_metadata(run):
    _, found = numbers(run)
    model = last(run)
    train = model.data.train
    assert found["sample_ids"] == train.ids.tolist()
    assert found["targets"] == train.labels.tolist() != found["ground_truths"]
    assert found["ground_truths"] == train.clean.tolist()
    metadata = found["metadata"]
    checkpoint = checkpoints(run / ARCHIVE)[-1]
    assert metadata["checkpoint"] == {
        "id": 2,
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
    }
    assert metadata["settings"]["metric"] == "crossentropy"
    expected = {"model": "mlp_8", "data": "digits", "label_noise": 0.3, "seed": 0, "nulls": 0}
    assert expected.items() <= metadata.items()
    with torch.no_grad():
        logits = model.model(train.images.fetch(torch.arange(100)))
    losses = torch.nn.functional.cross_entropy(logits, train.labels, reduction="none")
    assert torch.tensor(found["stats"]).numpy() == pytest.approx(losses.numpy(), rel=1e-5)


def test_wrong_labels_have_steeper_losses_and_restored_targets_mend_them(run):
    _, noisy = numbers(run, "--metric", "crossentropy")
    _, clean = numbers(run, "--metric", "crossentropy", "--restored-targets")
    rows = zip(noisy["stats"], clean["stats"], noisy["targets"], clean["targets"], strict=True)
    assert all((a != b) == (s != t) for s, t, a, b in rows)
    assert clean["targets"] == clean["ground_truths"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_from_the_command_line(run, metric):
    small = {"num_probes": ("--num-probes", 2), "microbatches": ("--microbatches", 2)}
    own = [part for name in METRICS[metric].takes for part in small.get(name, ())]
    options = ["--metric", metric, "--num-samples", 16, "--batch-size", 8, *own]
    path, found = numbers(run, *options)
    assert path.name.startswith(f"{metric}-train-") and "-id-0-16" in path.name
    assert len(found["stats"]) == (2 if METRICS[metric].per_batch else 16)
    assert len(found["sample_ids"]) == 16
    if metric != "agreement":  # a noise scale may be infinite
        assert found["metadata"]["nulls"] == 0


def test_several_checkpoints_and_a_table(run):
    code, out, err = command("stats", run, "--checkpoint", 0, 2, "--metric", "confidence")
    assert (code, err) == (0, "")
    names = sorted(path.name for path in (run / "stats").iterdir())
    assert names == [f"confidence-train-checkpoint-{i}.json" for i in (0, 2)]
    means = [
        json.loads((run / "stats" / name).read_text())["metadata"]["aggregate"]["mean"]
        for name in names
    ]
    assert means[0] != means[1] and all(f"{mean:.6g}" in out for mean in means)
    assert "not finite" in out  # a head that says what it counts


def test_operator_norms_show_the_lipschitz_constant(run):
    settings = ["--metric", "jacobian_operator_norm", "--num-samples", 8]
    code, out, err = command("stats", run, "--last", *settings)
    assert (code, err) == (0, "")
    (path,) = (run / "stats").iterdir()
    found = json.loads(path.read_text())
    sigma = torch.tensor(found["stats"], dtype=torch.float64)
    lipschitz = found["metadata"]["aggregate"]["lipschitz"]
    assert lipschitz == pytest.approx(sigma.square().mean().sqrt().item(), rel=1e-12)
    assert f"{lipschitz:.6g}" in out and f"{sigma.mean():.6g}" in out
    assert lipschitz > 1.0001 * sigma.mean()


def test_the_run_is_found_by_its_settings(run):
    save_dir = run.parent
    code, _, err = command("stats", "--save-dir", save_dir, "--model", "mlp_8", "--last")
    assert (code, err) == (0, "")
    shutil.copytree(run, save_dir / "again")
    line = refused("stats", "--save-dir", save_dir, "--model", "mlp_8", "--last")
    assert str(run) in line and str(save_dir / "again") in line


def test_raw_paths_have_distances(run):
    settings = ["--gen-strategy", "shifts-path", "--num-directions", 2, "--num-samples", 3]
    path, found = numbers(run, *settings, "--raw-path")
    assert path.name == (
        "crossentropy-train-shifts-path-num-directions-2-raw-path-checkpoint-2-id-0-3.json"
    )
    assert torch.tensor(found["stats"]).shape == (3, 2, 5)
    assert torch.tensor(found["path_distances"]).shape == (3, 2, 4)
    assert found["metadata"]["axes"] == ["sample", "direction", "anchor"]


# What is refused


def test_another_process_at_work_is_one_line(run):
    path = run / "stats" / "crossentropy-train-checkpoint-2.json"
    path.parent.mkdir()
    with FileLock(path.with_name(f".{path.stem}.lock")):
        assert "another process is measuring the same" in refused("stats", run, "--last")
        numbers(run, "--outname", "mine")
    numbers(run)


def test_numbers_of_another_checkpoint_are_not_overwritten(run):
    path, found = numbers(run)
    found["metadata"]["weights"] = "0" * 16
    path.write_text(json.dumps(found))
    before = path.read_bytes()
    assert "with other weights" in refused("stats", run, "--last")
    assert path.read_bytes() == before
    numbers(run, "--outname", "again")


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["--metric", "nonsense"], "metric"),
        (["--checkpoint", 7], "--checkpoint 7"),
        (["--last", "--dataset-split", "val"], "--dataset-split val"),
        (["--last", "--skip", 100], "--skip"),
        (["--last", "--skip", 90, "--num-samples", 11], "--num-samples"),
        (["--last", "--device", "nonsense"], "--device"),
        (["--last", "--batch-size", 0], "--batch-size"),
        (["--last", "--gen-strategy", "svd-6"], "gen-strategy"),
    ],
)
def test_bad_values_are_one_line_and_write_nothing(run, args, what):
    assert what in refused("stats", run, *args)
    assert not (run / "stats").exists()


def test_a_folder_that_cannot_be_written_is_one_line(run):
    (run / "stats").touch()
    assert "cannot be written" in refused("stats", run, "--last")
