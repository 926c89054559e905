"""`gradfilter demo`: its files, its refusals, and the fairness of its comparison."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradfilter as gf
from _lab import command, config, metrics, numbers, refused
from gradfilter.lab._demo import METHODS, train_config
from gradfilter.lab._demo_config import DemoConfig
from gradfilter.lab._interrupt import interruptible
from gradfilter.lab._options import one_line
from gradfilter.lab.models._build import build_model
from gradfilter.lab.train._build_training import build_training
from gradfilter.lab.train._evaluation import Evaluation
from gradfilter.lab.train._train_command import parse_train
from gradfilter.lab.train._training import advance, evaluation

CPU = torch.device("cpu")
RUNS = ["sgd", "agree", "consensus"]


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
    assert list(found["runs"]) == RUNS
    for settings in found["runs"].values():
        assert settings["learning_rate"] == 0.05 and settings["momentum"] == 0.9
        assert settings["model"] == "mlp_256" and settings["seed"] == settings["label_seed"] == 3
    assert found["versions"]["gradfilter"] == gf.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"].startswith("3.")


def test_metrics_are_one_object_per_run_and_evaluation(finished):
    lines = metrics(finished[0])
    assert [(line["run"], line["step"]) for line in lines] == [
        (run, step) for step in range(6) for run in RUNS
    ]
    for line in lines:
        assert list(line) == ["run", "seed", *(field.name for field in fields(Evaluation))]
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
            f"{100 * np.mean([line['accepted'] for line in own[1:]]):.1f}",
            str(own[-1]["skipped"]),
            f"{own[-1]['seconds']:.1f}",
        ]


@pytest.mark.parametrize("run", RUNS)
def test_checkpoint_gives_the_last_metrics_again(finished, run):
    flat = torch.load(finished[0] / f"{run}-seed-3.pt", weights_only=True)
    again = begun(run, steps=5, seed=3)
    again.state = gf.load_state_dict(again.state, flat)
    found, last = evaluation(again), [x for x in metrics(finished[0]) if x["run"] == run][-1]
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
        (["--steps", "abc"], "--steps: expected a whole number, found 'abc'"),
        (["--steps", "1.5", "--noise", "x"], "--noise: expected a number, found 'x'"),
        (["--steps"], "--steps"),
        (["--nonsense", "3"], "Unrecognized options: --nonsense, 3"),
        (["--step", "3"], "Unrecognized options: --step, 3. Did you mean --steps? See"),
        (["--steps=3", "--nose=0.1"], "--nose=0.1. Did you mean --noise? See"),
        (["--sedes", "3", "--nose", "1"], "Did you mean --seeds? Did you mean --noise? See"),
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
        "gradfilter demo: --steps: expected a whole number, found 'abc'. "
        "See gradfilter demo --help.\n"
    )


def test_unforeseen_error_boxes_still_are_one_line():
    assert one_line(" Title \n something\n else ") == "Title something else"
    assert one_line("") == "bad options"


def test_out_has_to_be_a_new_or_empty_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "cannot write" in refused("demo", "--out", tmp_path / "file")
    assert "cannot write" in refused("demo", "--out", tmp_path / "file" / "below")
    assert "names of at most 255 bytes" in refused("demo", "--out", tmp_path / (300 * "n"))
    assert "new or empty" in refused("demo", "--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_out_has_to_be_writable(tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot write" in refused("demo", "--out", tmp_path)
    assert "cannot write" in refused("demo", "--out", tmp_path / "new")


# The command itself


def test_a_misspelt_command_is_told_the_nearest():
    line = refused("trian")
    assert "unknown command 'trian'. Did you mean 'train'? The commands are: demo, train" in line
    assert "Did you mean" not in refused("--nonsense")


@pytest.mark.parametrize("name", ["demo", "train", "find-lr", "stats", "sweep", "report", "runs"])
def test_paragraphs_of_help_are_no_wider_than_a_page(name, monkeypatch):
    lines = {}
    for columns in (60, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        code, out, err = command(name, "--help")
        assert (code, err) == (0, "")
        lines[columns] = out.splitlines()
        table = next(i for i, line in enumerate(lines[columns]) if line.startswith(" ---"))
        first = lines[columns].index("") + 1  # below the usage
        text = lines[columns][first : table - 1]
        assert max(map(len, text)) <= min(79, columns)
        paragraphs = "\n".join(text).strip().split("\n\n")
        for paragraph in paragraphs:  # as full as words allow
            for line, following in pairwise(paragraph.split("\n")):
                assert len(f"{line} {following.split()[0]}") > min(79, columns)
        assert len(paragraphs) > 1 and paragraphs[0].endswith(".")
        assert any(line.startswith("  -h, --help") for line in lines[columns][table:])
    # Tables are as wide as the terminal.
    assert lines[80] != lines[200]


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


def test_help_and_what_it_says_of_itself_fit_a_screen():
    for args in ([], ["--help"]):
        lines = command(*args)[1].splitlines()
        assert len(lines) <= 24 and max(map(len, lines)) <= 80


def test_without_the_lab_it_still_says_what_it_is_and_what_is_missing():
    code = (
        "import sys; from importlib import metadata; found = metadata.version\n"
        "def version(name):\n"
        "    if name == 'tyro': raise metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "metadata.version = version; sys.modules['tyro'] = None\n"
        "import gradfilter.__main__ as m; m.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'not installed: pip install "gradfilter[lab]"' in done.stdout
    assert f"torch {torch.__version__}" in done.stdout and gf.__version__ in done.stdout


def test_module_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "gradfilter", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"gradfilter {gf.__version__}\n"), done.stderr


@pytest.mark.parametrize(("package", "command_name"), [("tyro", "demo"), ("optuna", "sweep")])
def test_missing_extra_is_named(package, command_name):
    code = f"import sys; sys.modules[{package!r}] = None; import gradfilter.__main__ as m; m.main()"
    run = [sys.executable, "-c", code, command_name]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert repr(package) in done.stderr and "gradfilter[lab]" in done.stderr
    assert done.stderr.count("\n") == 1


# argv: the signal, the seed during which it comes, once a step of it is written; options.
INTERRUPTED = """
import os, sys
from gradfilter.lab import _demo
from gradfilter.lab._cli import main

append, number, during = _demo.append_json_line, int(sys.argv[1]), int(sys.argv[2])

def interrupted(path, line):
    append(path, line)
    if line["seed"] == during and line["step"] > 0:
        os.kill(os.getpid(), number)
        _demo.append_json_line = append

_demo.append_json_line = interrupted
main(sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "during", "title", "number"),
    [
        (2000, 0, "of 2000 steps", signal.SIGINT),
        (12, 1, "1 of 2 seeds finished", signal.SIGTERM),
    ],
    ids=["first seed", "second seed"],
)
def test_ctrl_c_leaves_a_valid_directory(steps, during, title, number, tmp_path):
    args = ["demo", "--steps", str(steps), "--seeds", "2", "--out", str(tmp_path / "run")]
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(int(number)), str(during), *args],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    out, err = process.stdout, process.stderr
    assert (process.returncode, err) == (128 + number, "")
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


def test_a_polite_kill_asks_as_often_as_it_comes():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with interruptible() as stopped, interruptible() as inside:
            assert inside is stopped and not inside()
            signal.raise_signal(signal.SIGTERM)  # of the scheduler
            signal.raise_signal(signal.SIGTERM)  # of torchrun, which was told, too
            assert inside() and stopped.exit_code == 143
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with interruptible() as stopped:
            signal.raise_signal(signal.SIGTERM)
            assert not stopped() and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


# The trainings


def begun(name, steps=6, seed=0, noise=0.3, threshold=0.9):
    config = DemoConfig(noise=noise, steps=steps, threshold=threshold)
    method = next(m for m in METHODS if m.name == name)
    return build_training(train_config(method, config, seed), CPU)


def trained(name, steps=6, **options):
    run = begun(name, steps, **options)
    advance(run, steps)
    return run


def everything(samples):
    return samples.images.fetch(torch.arange(len(samples)))


def test_plain_sgd_is_ordinary_training():
    run = trained("sgd")
    samples = run.data.train
    model = build_model("mlp_256", classes=10, shape=(1, 8, 8), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for chosen in run.order(0, 6):
        optimizer.zero_grad()
        logits = model(samples.images.fetch(chosen))
        torch.nn.functional.cross_entropy(logits, samples.labels[chosen]).backward()
        optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(run.state["params"][name], value.detach())


def test_the_batches_of_all_runs_hold_the_same_samples():
    drawn = [begun(name).order(0, 6).sort(1).values for name in RUNS]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_every_run_is_a_preset_of_train():
    for name in RUNS:
        preset = parse_train(["--preset", f"demo-{name}"]).settings
        seeds = {"data_split_seed": 0, "label_seed": 0}
        assert begun(name, steps=800).config == replace(preset, **seeds)


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
    run = trained("agree", threshold=0.0)
    model = build_model("mlp_256", classes=10, shape=(1, 8, 8), seed=0)
    result, data = evaluation(run), run.data
    for name, value in model.named_parameters():
        assert torch.equal(run.state["params"][name], value)
    assert result.skipped == 6 and result.accepted == 1 / 8
    train = model(everything(data.train)).argmax(1)
    test = model(everything(data.test)).argmax(1)

    def share(right):
        return pytest.approx(right.double().mean().item())

    assert result.test_accuracy == share(test == data.test.clean)
    assert result.train_accuracy == share(train == data.train.labels)
    assert result.train_clean_accuracy == share(train == data.train.clean)
    assert result.memorised == share((train == data.train.labels)[data.train.wrong])
    assert result.step == 6 and result.loss == pytest.approx(math.log(10), rel=0.05)


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", RUNS)
def test_no_step_waits_for_the_device(name):
    run = begun(name, steps=2)
    with NoHostReads():
        advance(run, 2)
