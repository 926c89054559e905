"""Bad input of a training: one clear line, exit code 2, and no file is overwritten."""

import errno
import io
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from _lab import command, config, metrics, only_run, refused
from gradfilter.lab import _run_files as _rundir
from gradfilter.lab._usage import UsageError
from gradfilter.lab.train import _run_place as _place
from gradfilter.lab.train._archive import add, checkpoints, read_tensors, tensor_bytes, tensors_of
from gradfilter.lab.train._restore import restored

SMALL = ["train", "--model", "mlp_8", "--epochs", 1, "--log-level", "error"]
VALUES = {
    "--model nonsense": "nonsense",
    "--model resnet18_0": "--model",
    "--model cnn_4": "32",
    "--model mlp_8 --model-additions batchnorm": "--model-additions",
    "--model mlp_8 --weight-init fixup": "fixup",
    "--data mnist": "mnist",
    "--data cifar10": "--download",
    "--data cifar100n-fine": "cifar100n-fine",
    "--data folder:nowhere": "nowhere",
    "--augmentation": "--augmentation",
    "--crop-flipped-only": "--crop-flipped-only",
    "--label-noise 1.5": "--label-noise: expected a fraction in [0, 1), found 1.5",
    "--label-noise -0.1": "--label-noise",
    "--label-noise nan": "--label-noise",
    "--noise-type odd": "--noise-type",
    "--learning-rate -1": "--learning-rate: expected a positive number, found -1.0",
    "--learning-rate inf": "--learning-rate",
    "--learning-rate x": "--learning-rate",
    "--momentum 1.5": "--momentum",
    "--optimizer tiger": "--optimizer: expected one of sgd, adam, adamw, rmsprop, lion, muon,",
    "--optimizer RAdam": "Did you mean torch:RAdam?",
    "--optimizer radam": "Did you mean torch:RAdam?",
    "--optimizer torch:radam": "Did you mean torch:RAdam?",
    "--optimizer torch:RAdan": "Did you mean torch:RAdam?",
    "--optimizer torch:Tiger": "expected torch: and one of ASGD, Adadelta, Adafactor, Adagrad,",
    "--optimizer torch:": "found 'torch:'",
    "--optimizer torch:Optimizer": "found 'torch:Optimizer'",
    "--optimizer torch:lr_scheduler": "found 'torch:lr_scheduler'",
    "--optimizer torch:LBFGS": "torch:LBFGS evaluates the loss several times in a step",
    "--optimizer torch:SparseAdam": "torch:SparseAdam takes sparse gradients alone",
    "--optimizer torch:Muon": "Give --optimizer muon, which has adamw for those",
    "--optimizer torch:Adafactor --compile": "--compile: torch's Adafactor reads numbers",
    "--optimizer torch:Rprop --device cuda": "--device cuda: torch's Rprop reads numbers",
    "--optimizer torch:RAdam --momentum 0.9": "--momentum: it would change nothing with a class",
    "--optimizer torch:SGD --betas 0.9 0.99": "--betas: it would change nothing with a class",
    "--optimizer torch:Adagrad --eps 1e-6": "--eps: it would change nothing with a class of torch",
    "--optimizer torch:Adafactor --eps 1e-6": "--optimizer-arguments sets what the class has",
    "--optimizer torch:ASGD --alpha 0.9": "--alpha: it would change nothing with a class of torch",
    "--optimizer torch:Adam --centered": "--centered: it would change nothing with a class",
    "--optimizer torch:Rprop --weight-decay 0.1": "--weight-decay 0.1: torch:Rprop has no weight",
    "--preset agc-cifar10 --optimizer torch:Rprop --no-nesterov": "0.0005: torch:Rprop has no",
    "--optimizer torch:Rprop --schedule cosine": "reads the learning rate in its first step alone",
    "--optimizer torch:RAdam --nesterov": "--nesterov: expected --optimizer sgd with momentum",
    "--optimizer torch:SGD --nesterov": "it refuses its arguments: Nesterov momentum requires a",
    "--optimizer torch:RAdam --cautious": "--cautious: expected an update rule of gradfilter",
    "--optimizer torch:SGD --momentum 0.9 --msam 0.3": "--msam: expected an update rule of",
    "--optimizer torch:RAdam --weight-decay 0.1 --no-decay *.bias": "--no-decay: expected an",
    "--optimizer torch:AdamW --schedule-free": "expected --optimizer sgd, adam or adamw, found",
    "--optimizer-arguments amsgrad=true": "--optimizer-arguments: it would change nothing without",
    "--optimizer torch:Adam --optimizer-arguments amsgrad": "expected NAME=VALUE, found 'amsgrad'",
    "--optimizer torch:Adam --optimizer-arguments amsgard=true": "Did you mean amsgrad?",
    "--optimizer torch:Adam --optimizer-arguments amsgrad=x": "a number, true, false or none",
    "--optimizer torch:Adam --optimizer-arguments amsgrad=": "a number, true, false or none",
    "--optimizer torch:Adam --optimizer-arguments lr=1": "among amsgrad, maximize",
    "--optimizer torch:Adam --optimizer-arguments eps=1": "expected no eps, which --eps sets",
    "--optimizer torch:ASGD --optimizer-arguments t0=1 t0=2": "each once, found 't0=2'",
    "--optimizer torch:Rprop --optimizer-arguments etas=0.5": "torch:Rprop: it refuses its",
    "--optimizer torch:Rprop --optimizer-arguments etas=2,1": "refuses its arguments: Invalid eta",
    "--optimizer torch:ASGD --optimizer-arguments lambd=1,2": "torch:ASGD: it refuses its",
    "--msam 0": "--msam: expected a positive number",
    "--msam 0.3 --sam 0.05": "--msam, --sam: both perturb",
    "--msam 0.3 --momentum 0": "with momentum, found sgd without",
    "--msam 0.3 --optimizer rmsprop": "with momentum, found rmsprop without",
    "--msam 0.3 --optimizer muon": "--msam: expected one rule for all parameters",
    "--msam 0.3 --ema 0.9": "--ema: it averages",
    "--schedule-free --ema 0.9": "--ema: it averages",
    "--schedule-free --msam 0.3": "--schedule-free, --msam",
    "--schedule-free --optimizer lion": "expected --optimizer sgd, adam or adamw, found lion",
    "--schedule-free --nesterov": "in place of momentum",
    "--schedule-free --cautious": "in place of momentum",
    "--cautious --optimizer adamw --betas 0 0.9": "with momentum, found adamw without",
    "--optimizer lion --eps 0.1": "--eps: it would change nothing with --optimizer sgd or lion",
    "--optimizer adam --nesterov": "--nesterov",
    "--batch-size 81 --microbatches 8": "--batch-size: expected a multiple of --microbatches 8",
    "--batch-size 0": "--batch-size",
    "--batch-size 5000": "--batch-size",
    "--batch-size 80 --samples-per-class 1": "Choose one",
    "--microbatches 0": "--microbatches",
    "--samples-per-class 0": "--samples-per-class",
    "--epochs -1": "--epochs",
    "--steps 0": "--steps",
    "--agree 0.9": "--microbatches 8",
    "--agree 3 --microbatches 8": "--agree: expected a cosine distance in [0, 2], found 3.0",
    "--consensus": "--per-sample",
    "--consensus-hard": "--consensus-hard",
    "--agree 0.9 --consensus 1 --microbatches 8": "Choose one",
    "--per-sample --microbatches 8": "Choose one",
    "--gsam 0.4": "--sam 0.05",
    "--friendly-sam 1": "--sam 0.05",
    "--look-sam 5": "--sam 0.05",
    "--sam 0.05 --friendly-sam 0": "--friendly-sam: expected a positive number, found 0.0",
    "--sam 0.05 --look-sam 1": "--look-sam: expected at least 2, found 1",
    "--sam 0.05 --friendly-sam 1 --look-sam 5": "Choose one",
    "--sam 0.05 --friendly-sam 1 --m-sharpness --per-sample": "--m-sharpness: it perturbs rows",
    "--sam 0.05 --look-sam 5 --m-sharpness --per-sample": "--m-sharpness: it perturbs rows",
    "--sam 0.05 --look-sam 5 --gsam 0.4": "--look-sam, --gsam: both replace the gradient",
    "--adaptive asam": "--sam 0.05",
    "--sam 0.05 --rho-schedule proportional --schedule poly --rho-min 1": "--rho-min: expected",
    "--sam -1": "--sam",
    "--agc -1": "--agc",
    "--clip-per-row 0": "--clip-per-row",
    "--trimmed-mean 0 --per-sample": "--trimmed-mean: expected a positive number, found 0",
    "--trimmed-mean 1": "--trimmed-mean: expected several rows to compare",
    "--coordinate-median": "--coordinate-median: expected several rows to compare",
    "--centered-clip 0 --per-sample": "--centered-clip: expected a positive number",
    "--centered-clip 1 --trimmed-mean 1 --per-sample": "--trimmed-mean and --centered-clip: each",
    "--geometric-median --agree 0.9 --microbatches 4": "--agree and --geometric-median: each makes",
    "--agree-per leaf --microbatches 4": "--agree-per: it would change nothing without --agree",
    "--agree-exclude head.*": "--agree-exclude: it would change nothing without --agree",
    "--agree 0.9 --agree-per row --microbatches 4": "--agree-per",
    "--trimmed-mean 1 --sam 0.1 --per-sample": "--sam: it combines rows by their weights, and with",
    "--agree 0.9 --agree-per leaf --sam 0.1 --microbatches 4": "Also give --m-sharpness",
    "--coordinate-median --sam 0.1 --m-sharpness --gsam 0.4 --per-sample": "--gsam: it combines",
    "--budget-clip 0 --per-sample": "--budget-clip",
    "--budget-clip --budget-power -1 --per-sample": "--budget-power",
    "--budget-clip": "--budget-clip",
    "--budget-clip --per-sample --clip-per-row 1": "--clip-per-row",
    "--optimizer muon --weight-decay 0.1 --no-decay *.bias": "Choose another",
    "--optimizer per_example_adam --weight-decay 0.1 --no-decay *.bias": "Choose another",
    "--clip-quantile 2": "--clip-quantile",
    "--clip-quantile --clip-smallest --per-sample": "--clip-quantile, --clip-smallest",
    "--normalize-rows --clip-per-row 1": "Choose one",
    "--clip-per-leaf": "--clip-per-row 1",
    "--clip-smallest": "--per-sample",
    "--outlier-filter 0.5 --per-sample": "--outlier-filter",
    "--trim-losses 0.2": "--per-sample",
    "--reference": "--microbatches 8",
    "--reference --agree 0.9 --microbatches 8": "Choose one",
    "--reference-samples 10": "--reference-samples: it would change nothing without --reference",
    "--reference --reference-samples 9999 --per-sample": "--reference-samples",
    "--spike-clip 0": "--spike-clip",
    "--spike-clip --adagc": "Choose one",
    "--adagc 0": "--adagc",
    "--spike-skip -1": "--spike-skip",
    "--watch 0": "--watch",
    "--budget-power 2 --per-sample": "--budget-power",
    "--label-smoothing 1": "--label-smoothing",
    "--ema 1": "--ema: expected a decay in [0, 1), found 1.0",
    "--ema -0.1": "--ema",
    "--schedule exponential": "--schedule",
    "--lr-min 1": "--lr-min",
    "--lr-decay-rate 2": "--lr-decay-rate",
    "--lr-power 1": "--lr-power",
    "--val-split 0.999": "--batch-size",
    "--val-split -3": "--val-split",
    "--train-split 0.5 --val-split 0.6": "--train-split",
    "--save-checkpoint 0": "--save-checkpoint",
    "--eval-every 0": "--eval-every",
    "--workers -1": "--workers",
    "--epochs 0": "--epochs",
    "--steps 3 --schedule constant --lr-warmup-epochs 5": "--lr-warmup-epochs: expected at most",
    "--steps 3 --schedule cosine --lr-warmup-epochs 5": "--lr-warmup-epochs: expected at most",
    "--seed 99999999999999999999999": "--seed",
    "--steps 99999999999999999999 --schedule cosine": "--steps",
    "--early-exit-accuracy 50": "--early-exit-accuracy",
    "--train-split 1": "--train-split",
    "--name ../escape": "--name",
    "--name /abs": "--name",
    "--epochs 5 --steps 10": "--epochs: it would change nothing",
    "--betas 0.9 0.99": "--betas: it would change nothing without --optimizer adam, adamw",
    "--agc-exclude head.*": "--agc-exclude: it would change nothing without --agc",
    "--against first": "--against",
    "--noise-type pairflip": "--noise-type",
    "--model-arguments depth": "--model-arguments",
    "--model-arguments width=3": "width",
    "--device cuda:99": "--device: expected a device of this machine",
    "--seed -1": "--seed",
    "--preset nothing": "gaf-cifar100",
    "--config nowhere.toml": "nowhere.toml",
    "--betas 0.9": "--betas",
    "--betas 0.9 1": "--betas",
    "--nonsense 3": "--nonsense",
    "surplus": "surplus",
}


@pytest.mark.parametrize("options", VALUES)
def test_bad_values_get_one_line_and_nothing_is_written(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused("train", *options.split())
    assert line.startswith("gradfilter train: ") and VALUES[options] in line
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_configuration_is_named(tmp_path):
    file = tmp_path / "own.toml"
    for text in (
        *("[train", "train = 3", "[train]\nlearning_rat = 3", "[train]\nepochs = 'x'"),
        *("model = 'mlp_8'", "[trian]\nepochs = 1", "[train]\npreset = 'gaf-cifar100'"),
    ):
        file.write_text(text)
        assert "--" in refused("train", "--config", file)


# Directories


def test_a_run_that_is_there_is_not_written_over(tmp_path):
    assert command(*SMALL, "--save-dir", tmp_path)[0] == 0
    before = {path: path.read_bytes() for path in only_run(tmp_path).iterdir()}
    line = refused(*SMALL, "--save-dir", tmp_path)
    assert "--resume" in line and "finished" in line
    assert {path: path.read_bytes() for path in only_run(tmp_path).iterdir()} == before


@pytest.mark.slow
def test_a_directory_in_use_by_a_live_process_is_left_alone(tmp_path):
    options = [*map(str, SMALL), "--epochs", "100000", "--save-dir", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "gradfilter", *options],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            while not list(tmp_path.rglob("resume.pt")):
                assert process.poll() is None
                time.sleep(0.05)
            line = refused(*options, "--resume")
            assert "in use by another process" in line and process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        finally:
            process.kill()
    # A killed process leaves no lock behind.
    with _place.locked_run(only_run(tmp_path)):
        pass


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("mine")
    line = refused(*SMALL, "--save-dir", tmp_path / "file")
    assert "cannot write to" in line and (tmp_path / "file").read_text() == "mine"


def test_a_read_only_directory(tmp_path, monkeypatch):
    # Root may write anywhere, so the file system has to say no itself.
    def mkdir(self, *args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert "Read-only file system" in refused(*SMALL, "--save-dir", tmp_path / "runs")


@pytest.mark.parametrize(
    ("name", "writes"), [("resume.pt", 2), ("metrics.jsonl", 2), ("checkpoints.zip", 7)]
)
def test_a_full_disk_loses_nothing(name, writes, tmp_path, monkeypatch):
    options = [*SMALL, "--epochs", 3, "--save-checkpoint", 1, "--save-dir", tmp_path]
    calls = []

    def full(path):
        if path.name.strip(".").startswith(name):
            calls.append(path)
        if len(calls) > writes:
            raise OSError(errno.ENOSPC, "No space left on device")

    replace, append = os.replace, _rundir.append_json_line
    monkeypatch.setattr(os, "replace", lambda a, b: (full(Path(b)), replace(a, b)))
    write = zipfile.ZipFile.writestr

    def writestr(self, *args):
        if isinstance(self.filename, str):
            full(Path(self.filename))
        write(self, *args)

    def append_line(path, value):
        full(path)
        append(path, value)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", writestr)
    monkeypatch.setattr("gradfilter.lab.train._record.append_json_line", append_line)
    line = refused(*options)
    assert "No space left on device" in line and "--resume" in line
    monkeypatch.undo()
    run = only_run(tmp_path)
    assert config(run)["status"] == "running"  # no room for another word, either
    assert not list(run.glob(".*")) and checkpoints(run / "checkpoints.zip")
    assert command(*options, "--resume")[0] == 0
    assert [line["step"] for line in metrics(run)] == [0, 16, 32, 48]
    assert [c.step for c in checkpoints(run / "checkpoints.zip")] == [0, 16, 32, 48]


# Checkpoints


class Evil:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["EVIL"]),)


@pytest.fixture
def run(tmp_path):
    assert command(*SMALL, "--save-dir", tmp_path / "runs")[0] == 0
    return only_run(tmp_path / "runs")


def test_a_foreign_pickle_is_not_executed(run, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "executed"))
    buffer = io.BytesIO()
    torch.save({"params.w": Evil()}, buffer)
    for content in (buffer.getvalue(), pickle.dumps(Evil())):
        with pytest.raises(UsageError, match=r"more than tensors|damaged"):
            tensors_of(content, "checkpoint")
        (run / "checkpoints.zip").unlink()
        add(run / "checkpoints.zip", "00000-step-0-epoch-0.pt", content)
        for wanted in checkpoints(run / "checkpoints.zip"):
            with pytest.raises(UsageError):
                read_tensors(run / "checkpoints.zip", wanted)
        (run / "resume.pt").write_bytes(content)
        text = (run / "config.json").read_text()
        (run / "config.json").write_text(text.replace('"finished"', '"interrupted"'))
        refused(*SMALL, "--save-dir", run.parents[3], "--resume")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileExistsError):  # the pickle does what it should do, if it is let
        (tmp_path / "executed").touch()
        pickle.loads(pickle.dumps(Evil()))
        raise FileExistsError


def test_a_damaged_archive_is_named(run):
    archive = run / "checkpoints.zip"
    whole = archive.read_bytes()
    first = checkpoints(archive)[0]
    for content in (b"", b"no zip", whole[: len(whole) // 2]):
        archive.write_bytes(content)
        with pytest.raises(UsageError, match="damaged"):
            checkpoints(archive)
    spoilt = bytearray(whole)
    at = whole.index(first.entry.encode()) + len(first.entry) + 300
    spoilt[at : at + 50] = bytes(50)
    archive.write_bytes(bytes(spoilt))
    with pytest.raises(UsageError, match="damaged"):
        read_tensors(archive, first)
    archive.unlink()
    with pytest.raises(UsageError, match="Train first"):
        checkpoints(archive)


def test_a_checkpoint_of_another_model_or_data_set_is_refused(run):
    wanted = checkpoints(run / "checkpoints.zip")[0]
    text = (run / "config.json").read_text()
    for before, after, said in (
        ("mlp_8", "mlp_9", "does not fit mlp_9"),
        ('"data_split_seed": 42', '"data_split_seed": 43', "not those that the run"),
        ('"epochs": 1.0', '"epochs": "x"', "does not fit this version"),
        ('"settings"', '"sittings"', "not the record of a run"),
    ):
        (run / "config.json").write_text(text.replace(before, after))
        with pytest.raises(UsageError, match=said):
            restored(run, wanted, device=torch.device("cpu"))


def test_resuming_on_another_data_set_is_refused(run):
    text = (run / "config.json").read_text().replace('"finished"', '"interrupted"')
    (run / "config.json").write_text(text)
    labels = read_tensors(run / "checkpoints.zip", "labels.pt")
    (run / "checkpoints.zip").unlink()
    line = refused(*SMALL, "--save-dir", run.parents[3], "--resume")
    assert "checkpoints of the run are gone" in line
    labels["labels"][3] += 1
    add(run / "checkpoints.zip", "labels.pt", tensor_bytes(labels))
    line = refused(*SMALL, "--save-dir", run.parents[3], "--resume")
    assert "not those that the run" in line


def test_resuming_with_other_settings_is_refused(run):
    text = (run / "config.json").read_text().replace('"finished"', '"interrupted"')
    (run / "config.json").write_text(text.replace('"momentum": null', '"momentum": 0.5'))
    line = refused(*SMALL, "--save-dir", run.parents[3], "--resume")
    assert "other settings: momentum" in line
