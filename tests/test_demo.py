"""`gradfilter demo`: what it writes, what it refuses, and that its comparison is a fair one."""

import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import gradfilter as gf
from gradfilter.lab import _training
from gradfilter.lab._cli import main, one_line
from gradfilter.lab._digits import CLASSES, corrupted, noisy_digits, stream
from gradfilter.lab._evaluation import Evaluation, evaluate
from gradfilter.lab._interrupt import interruptible
from gradfilter.lab._sampling import class_balanced
from gradfilter.lab._training import Method, advance, begin

CPU = torch.device("cpu")
RUNS = ["sgd", "agree", "consensus"]


def command(*args):
    """Exit code, stdout and stderr of a command line, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def metrics(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def config(folder):
    return json.loads((folder / "config.json").read_text())


def refused(*args):
    """The one line on stderr after a bad value."""
    code, out, err = command(*args)
    assert (code, out) == (2, "")
    assert err.endswith("\n") and err.count("\n") == 1
    return err


def numbers(line):
    return {key: value for key, value in line.items() if key != "seconds"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run, evaluated at every step, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    code, out, err = command("demo", "--steps", 5, "--seed", 3, "--out", folder)
    assert (code, err) == (0, "")
    return folder, out


# What a run leaves behind


def test_writes_every_file_and_says_where(finished):
    folder, out = finished
    checkpoints = [f"{run}-seed-3.pt" for run in RUNS]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["config.json", "curves.png", "metrics.jsonl", *checkpoints]
    )
    assert str(folder) in out.splitlines()[0] and str(folder) in out.splitlines()[-1]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_config_records_settings_versions_and_status(finished):
    found = config(finished[0])
    assert found["status"] == "finished"
    given_values = {"noise": 0.3, "threshold": 0.9, "steps": 5, "seed": 3, "seeds": 1}
    assert given_values.items() <= found.items()
    assert found["out"] == str(finished[0]) and found["device"] == "cpu"
    assert found["learning_rate"] == 0.05 and found["momentum"] == 0.9
    assert found["versions"]["gradfilter"] == gf.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"].startswith("3.")


def test_metrics_are_one_object_per_run_and_evaluation(finished):
    lines = metrics(finished[0])
    assert [(line["run"], line["step"]) for line in lines] == [
        (run, step) for step in range(6) for run in RUNS
    ]
    for line in lines:
        assert list(line) == [field.name for field in fields(Evaluation)]
        assert line["seed"] == 3
        assert (line["loss"] is None) == (line["accepted"] is None) == (line["step"] == 0)
        assert 0 <= line["memorised"] <= 1
    plain = [line for line in lines if line["run"] == "sgd"][1:]
    assert all(line["accepted"] == 1 and line["skipped"] == 0 for line in plain)
    filtered = [line for line in lines if line["run"] == "consensus"][1:]
    assert all(0 < line["accepted"] < 1 for line in filtered)
    assert plain[0]["seconds"] < plain[-1]["seconds"]


def test_table_has_the_columns_and_the_last_numbers(finished):
    folder, out = finished
    words = [
        "final",
        "best test %",
        "oracle",
        "clean",
        "memorised",
        "accepted",
        "skipped",
        "seconds",
    ]
    assert all(word in out for word in words)
    for run in RUNS:
        own = [line for line in metrics(folder) if line["run"] == run]
        row = next(line.split() for line in out.splitlines() if line.split()[:1] == [run])
        assert row == [
            run,
            f"{100 * own[-1]['test_accuracy']:.1f}",
            f"{100 * max(line['test_accuracy'] for line in own):.1f}",
            f"{100 * own[-1]['train_clean_accuracy']:.1f}",
            f"{100 * own[-1]['memorised']:.1f}",
            f"{100 * own[-1]['accepted']:.1f}",
            str(own[-1]["skipped"]),
            f"{own[-1]['seconds']:.1f}",
        ]


@pytest.mark.parametrize("run", RUNS)
def test_checkpoint_gives_the_last_metrics_again(finished, run):
    flat = torch.load(finished[0] / f"{run}-seed-3.pt", weights_only=True)
    reducer, microbatches = {
        "sgd": (gf.mean_rows(), 1),
        "agree": (gf.agree_filter(0.9), 8),
        "consensus": (gf.consensus_filter(), None),
    }[run]
    batches = torch.zeros(1, 80, dtype=torch.long)
    data = noisy_digits(0.3, 3, CPU)
    again = begin(Method(run, run, reducer, microbatches), 99, data, batches)
    again.state = gf.load_state_dict(again.state, flat)
    found, last = evaluate(again, data), [x for x in metrics(finished[0]) if x["run"] == run][-1]
    names = ("test_accuracy", "train_clean_accuracy", "memorised")
    assert [getattr(found, name) for name in names] == [last[name] for name in names]


def test_same_seed_gives_the_same_bits(finished, tmp_path):
    assert command("demo", "--steps", 5, "--seed", 3, "--out", tmp_path)[0] == 0
    first, second = metrics(finished[0]), metrics(tmp_path)
    assert [numbers(line) for line in first] == [numbers(line) for line in second]
    for run in RUNS:
        a, b = (
            torch.load(folder / f"{run}-seed-3.pt", weights_only=True)
            for folder in (finished[0], tmp_path)
        )
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_several_seeds_give_mean_and_deviation(tmp_path):
    code, out, _ = command("demo", "--steps", 2, "--seeds", 2, "--seed", 5, "--out", tmp_path)
    assert code == 0
    lines = metrics(tmp_path)
    assert sorted({line["seed"] for line in lines}) == [5, 6]
    final = [
        100 * line["test_accuracy"]
        for line in lines
        if line["run"] == "agree" and line["step"] == 2
    ]
    assert final[0] != final[1]
    row = next(line for line in out.splitlines() if line.split()[:1] == ["agree"])
    assert f"{np.mean(final):.1f} ± {np.std(final, ddof=1):.1f}" in row
    assert len(list(tmp_path.glob("*.pt"))) == 6


def test_noise_and_threshold_reach_the_trainings(tmp_path):
    args = ["--steps", 1, "--noise", 0, "--threshold", 0]
    code, out, _ = command("demo", *args, "--out", tmp_path)
    assert code == 0
    assert {line["memorised"] for line in metrics(tmp_path)} == {None}
    assert [line["skipped"] for line in metrics(tmp_path)[3:]] == [0, 1, 0]
    assert next(line for line in out.splitlines() if "sgd " in line).split()[4] == "-"


def test_default_directory_names_the_settings_and_is_never_used_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert command("demo", "--steps", 1, "--noise", 0.25)[0] == 0
    first, second = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert first == "demo-noise-0.25-threshold-0.9-steps-1-cpu-seed-0"
    assert second == f"{first}-2"
    assert len(metrics(tmp_path / "runs" / first)) == 6


# Bad values


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--noise", "1"], "--noise: expected a fraction in [0, 1), found 1.0"),
        (["--noise", "-0.1"], "--noise: expected a fraction"),
        (["--noise", "nan"], "--noise: expected a fraction"),
        (["--threshold", "2.5"], "--threshold: expected a cosine distance in [0, 2], found 2.5"),
        (["--threshold", "-1"], "--threshold: expected"),
        (["--steps", "0"], "--steps: expected at least 1, found 0"),
        (["--seeds", "0"], "--seeds: expected at least 1"),
        (["--seed", "-1"], "--seed: expected at least 0"),
        (["--device", "cuda:99"], "--device: expected a device of this machine, found 'cuda:99'"),
        (["--device", "meta"], "Available: cpu"),
        (["--device", "toaster"], "found 'toaster'"),
        (["--steps", "abc"], "--steps: invalid literal for int() with base 10: 'abc'"),
        (["--steps", "1.5", "--noise", "x"], "--noise: could not convert"),
        (["--steps"], "--steps"),
        (["--nonsense", "3"], "Unrecognized options: --nonsense, 3"),
        (["--step", "3"], "Unrecognized options: --step, 3"),
        (["--" + 40 * "long", "[red]x[/red]"], "longlong"),
        (["surplus"], "surplus"),
    ],
)
def test_bad_values_get_one_line(args, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in (line := refused("demo", *args)) and line.startswith("gradfilter demo: ")
    assert not list(tmp_path.iterdir())


def test_parse_errors_are_plain_on_a_terminal_too(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    line = refused("demo", "--steps", "abc")
    assert line == (
        "gradfilter demo: Error parsing --steps: invalid literal for int() with base 10: 'abc'. "
        "See gradfilter demo --help.\n"
    )


def test_unforeseen_error_boxes_still_are_one_line():
    assert one_line(" Title \n something\n else ") == "Title something else"
    assert one_line("") == "bad options"


def test_out_has_to_be_a_new_or_empty_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "cannot write" in refused("demo", "--out", tmp_path / "file")
    assert "cannot write" in refused("demo", "--out", tmp_path / "file" / "below")
    assert "cannot write" in refused("demo", "--out", tmp_path / (300 * "n"))
    assert "new or empty" in refused("demo", "--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_out_has_to_be_writable(tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot write" in refused("demo", "--out", tmp_path)
    assert "cannot write" in refused("demo", "--out", tmp_path / "new")


# The command itself


def test_help_version_and_unknown_commands():
    for args in ([], ["--help"], ["-h"]):
        code, out, err = command(*args)
        assert (code, err) == (0, "") and "demo" in out and "--version" in out
    assert command("--version") == (0, f"gradfilter {gf.__version__}\n", "")
    assert "unknown command 'demos'" in refused("demos")
    assert "--nonsense" in refused("--nonsense")
    code, out, err = command("demo", "--help")
    assert (code, err) == (0, "")
    for option in ("noise", "threshold", "steps", "seed", "seeds", "device", "out"):
        assert f"--{option} " in out


def test_module_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "gradfilter", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"gradfilter {gf.__version__}\n"), done.stderr


def test_missing_extra_is_named():
    code = "import sys; sys.modules['tyro'] = None; import gradfilter.__main__ as m; m.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "'tyro'" in done.stderr and "gradfilter[lab]" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("steps", "during", "title"),
    [(2000, 0, "of 2000 steps"), (12, 1, "1 of 2 seeds finished")],
    ids=["first seed", "second seed"],
)
def test_ctrl_c_leaves_a_valid_directory(steps, during, title, tmp_path):
    args = ["demo", "--steps", str(steps), "--seeds", "2", "--out", str(tmp_path / "run")]
    written = tmp_path / "run" / "metrics.jsonl"

    def begun():
        # As text: a reader may see the line that is being written in part.
        text = written.read_text() if written.exists() else ""
        return re.search(f'"seed": {during}, "step": [1-9]', text)

    with subprocess.Popen(
        [sys.executable, "-m", "gradfilter", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            while not begun():
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, err) == (130, "")
    assert title in out and "consensus" in out and str(tmp_path / "run") in out.splitlines()[-1]
    assert config(tmp_path / "run")["status"] == "interrupted"
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "run").glob(".*"))
    assert "±" not in out  # half a seed is no second value
    lines = metrics(tmp_path / "run")
    assert len(list((tmp_path / "run").glob("*.pt"))) == 3 * (during + 1)
    for seed in range(during + 1):
        for run in RUNS:
            flat = torch.load(tmp_path / "run" / f"{run}-seed-{seed}.pt", weights_only=True)
            last = [x for x in lines if (x["run"], x["seed"]) == (run, seed)][-1]
            # sgd counts the steps it applied: the checkpoint and the last line are of one moment.
            assert flat["transforms.sgd.count"] == last["step"] - last["skipped"]
            assert (last["step"] == steps) == (seed < during)


def test_first_ctrl_c_asks_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with interruptible():
        pass
    assert signal.getsignal(signal.SIGINT) is before


# The data


@given(noise=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 2**64))
def test_noise_changes_exactly_so_many_labels(noise, seed):
    clean = np.arange(197) % CLASSES
    noisy = corrupted(clean, noise, stream(seed, "noise"))
    assert (noisy != clean).sum() == round(noise * 197)
    assert noisy.min() >= 0 and noisy.max() < CLASSES


def test_noise_is_symmetric():
    clean = np.full(90_000, 7)
    counts = np.bincount(corrupted(clean, 0.999999, stream(0, "noise")), minlength=CLASSES)
    others = np.delete(counts, 7)
    assert abs(others / 10_000 - 1).max() < 0.05  # five standard deviations


def test_digits_are_split_and_standardised_by_the_training_part():
    data = noisy_digits(0.3, 0, CPU)
    assert data.images.shape == (1257, 64) and data.test_images.shape == (540, 64)
    assert data.wrong.sum() == 377  # round(0.3 · 1257)
    torch.testing.assert_close(data.images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.images.std(correction=0), torch.tensor(1.0))
    assert data.test_images.mean().abs() > 1e-5
    share = torch.bincount(data.test_labels) / torch.bincount(
        torch.cat([data.clean, data.test_labels])
    )
    assert (share - 0.3).abs().max() < 0.01
    other = noisy_digits(0.3, 1, CPU)
    assert not torch.equal(other.test_labels, data.test_labels)


def test_every_purpose_has_random_numbers_of_its_own():
    draws = {
        purpose: stream(4, purpose).integers(2**62)
        for purpose in ("split", "noise", "init", "batches")
    }
    assert len(set(draws.values())) == 4
    before = noisy_digits(0.5, 4, CPU)
    class_balanced(before.labels.numpy(), CLASSES, 3, 8, stream(4, "batches"))
    torch.manual_seed(1)
    np.random.seed(1)
    after = noisy_digits(0.5, 4, CPU)
    assert torch.equal(before.labels, after.labels) and torch.equal(before.images, after.images)
    # Another amount of noise is another set of labels on the same split.
    assert torch.equal(before.images, noisy_digits(0.1, 4, CPU).images)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    steps=st.integers(1, 7),
    microbatches=st.integers(1, 5),
    per_class=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_every_microbatch_is_class_balanced(sizes, steps, microbatches, per_class, seed):
    random = np.random.default_rng(seed)
    classes = len(sizes)
    labels = random.permutation(np.repeat(np.arange(classes), sizes))
    drawn = class_balanced(labels, classes, steps, microbatches, random, per_class=per_class)
    assert drawn.shape == (steps, microbatches * classes * per_class)
    rows = labels[drawn].reshape(steps * microbatches, -1)
    assert (np.sort(rows) == np.repeat(np.arange(classes), per_class)).all()
    for label, size in enumerate(sizes):
        # Ragged classes cycle: every sample comes once before any comes again.
        in_order = drawn.reshape(-1)[labels[drawn.reshape(-1)] == label]
        for start in range(0, len(in_order), size):
            turn = in_order[start : start + size]
            assert len(set(turn)) == len(turn)


def test_a_class_without_samples_is_named():
    labels = np.array([0, 0, 1, 3])
    with pytest.raises(ValueError, match="none of class 2"):
        class_balanced(labels, 4, 1, 1, np.random.default_rng(0))


def test_order_of_the_samples_depends_on_the_seed_and_is_new_in_every_round():
    labels = np.zeros(50, dtype=np.int64)
    first = class_balanced(labels, 1, 100, 1, stream(0, "batches"))[:, 0]
    other = class_balanced(labels, 1, 100, 1, stream(1, "batches"))[:, 0]
    assert (first[:50] != other[:50]).any() and (first[:50] != first[50:]).any()


# The trainings


def trained(method, steps=6, data=None):
    data = data or noisy_digits(0.3, 0, CPU)
    batches = class_balanced(data.labels.numpy(), CLASSES, steps, 8, stream(0, "batches"))
    training = begin(method, 0, data, torch.from_numpy(batches))
    advance(training, data, steps, stopped=lambda: False, tick=lambda: None)
    return training, data


def test_plain_sgd_is_ordinary_training():
    training, data = trained(Method("sgd", "", gf.mean_rows(), 1))
    model = _training.mlp(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for chosen in training.batches:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(data.images[chosen]), data.labels[chosen])
        loss.backward()
        optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(training.state["params"][name], value.detach())


def test_all_runs_start_alike_and_see_the_same_batches(tmp_path):
    # A threshold of 2 accepts every microbatch, so that agreement is plain SGD.
    assert command("demo", "--threshold", 2, "--steps", 4, "--out", tmp_path)[0] == 0
    plain, agree, consensus = ([x for x in metrics(tmp_path) if x["run"] == r] for r in RUNS)
    compared = ("test_accuracy", "train_clean_accuracy", "memorised", "loss")
    for a, b in zip(plain, agree, strict=True):
        assert [a[key] for key in compared] == pytest.approx([b[key] for key in compared])
    assert agree[-1]["accepted"] == 1 and agree[-1]["skipped"] == 0
    assert plain[0]["test_accuracy"] == consensus[0]["test_accuracy"]
    # The loss of the first step is taken before anything differs.
    assert plain[1]["loss"] == pytest.approx(consensus[1]["loss"])
    assert plain[4]["loss"] != pytest.approx(consensus[4]["loss"])


def test_evaluation_counts_what_it_says():
    # At threshold 0 no second row is ever accepted: the network stays as it was.
    strict, data = trained(Method("agree", "", gf.agree_filter(0.0), 8))
    result, model = evaluate(strict, data), _training.mlp(0)
    assert torch.equal(strict.state["params"]["0.weight"], model[0].weight)
    assert result.skipped == 6 and result.accepted == 1 / 8
    train, test = model(data.images).argmax(1), model(data.test_images).argmax(1)

    def share(right):
        return pytest.approx(right.double().mean().item())

    assert result.test_accuracy == share(test == data.test_labels)
    assert result.train_clean_accuracy == share(train == data.clean)
    assert result.memorised == share((train == data.labels)[data.labels != data.clean])
    assert result.step == 6 and result.loss == pytest.approx(math.log(10), rel=0.05)
    assert math.isnan(evaluate(strict, data).loss)  # no step since the evaluation before


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("reducer", "microbatches"),
    [(gf.mean_rows(), 1), (gf.agree_filter(0.9), 8), (gf.consensus_filter(), None)],
    ids=RUNS,
)
def test_no_step_waits_for_the_device(reducer, microbatches):
    data = noisy_digits(0.3, 0, CPU)
    with NoHostReads():
        trained(Method("run", "", reducer, microbatches), steps=2, data=data)
