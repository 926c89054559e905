"""Values that no counter or file system accepts: one line in every command."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest

from _lab import command, config, only_run, refused
from gradfilter.lab._demo_config import DemoConfig
from gradfilter.lab.data import _sources as _cifar
from gradfilter.lab.report._report_config import ReportConfig
from gradfilter.lab.stats._stats_config import StatsConfig
from gradfilter.lab.sweep._sweep_config import SweepConfig
from gradfilter.lab.train import _run_place as _place
from gradfilter.lab.train._train_config import TrainConfig

SMALL = ["train", "--model", "mlp_2", "--steps", "1", "--log-level", "error"]
BASES = {
    "train": (TrainConfig, ["train", "--model", "mlp_2"]),
    "stats": (StatsConfig, ["stats", "--last"]),
    "demo": (DemoConfig, ["demo"]),
    "sweep": (SweepConfig, ["sweep"]),
    "report": (ReportConfig, ["report"]),
}
HUGE = "1" + "0" * 400


def kinds(hint):
    """The plain types that a type is made of."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return kinds(parts[0])
    if origin is typing.Literal:
        return set()
    return set().union(*map(kinds, parts)) if parts else {hint}


def options(kind):
    for name, (found, base) in BASES.items():
        hints = typing.get_type_hints(found, include_extras=True)
        for field in dataclasses.fields(found):
            if kind in kinds(hints[field.name]) and field.name not in ("run", "dirs"):
                yield pytest.param(base, field.name, id=f"{name} {field.name}")


@pytest.mark.parametrize(("base", "name"), [*options(int)])
def test_whole_numbers_of_any_size_are_refused(base, name):
    option = f"--{name.replace('_', '-')}"
    for value in (HUGE, f"-{HUGE}", str(2**63)):
        typed = [f"{option}={value}"] if name != "checkpoint" else [option, value]
        line = refused(*base, *typed)
        assert option in line and len(line) < 500


@pytest.mark.parametrize(("base", "name"), [*options(str), *options(Path)])
def test_text_that_ends_early_for_the_system_is_refused(base, name):
    option = f"--{name.replace('_', '-')}"
    line = refused(*base, option, "a\0b")
    assert option in line or "a\\x00b" in line


@pytest.mark.parametrize(("base", "name"), [*options(Path)])
def test_names_that_no_file_system_takes_are_refused(base, name):
    option = f"--{name.replace('_', '-')}"
    if name == "config":  # which is read before there are options
        assert "File name too long" in refused(*base, option, "a" * 300)
        return
    assert option in refused(*base, option, "a" * 300)


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb", "caf\udce9", "\ud800", "n" * 256, "é" * 200])
def test_a_name_can_be_shown(name):
    assert "--name: expected" in refused(*SMALL, "--name", name)


def test_a_configuration_file_may_not_hide_what_cannot_be_typed(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text('[train]\nname = "a\\u0000b"\n')
    assert "--name: expected text without NUL" in refused(*SMALL, "--config", file)


def test_a_recorded_seed_of_any_size_is_refused(tmp_path):
    assert command(*SMALL, "--save-dir", tmp_path)[0] == 0
    run = only_run(tmp_path)
    text = (run / "config.json").read_text()
    for name in ("seed", "label_seed", "data_split_seed", "workers", "lr_patience", "image_size"):
        value = config(run)["settings"][name]
        (run / "config.json").write_text(text.replace(f'"{name}": {value}', f'"{name}": {HUGE}'))
        line = refused("stats", run, "--last")
        assert f"--{name.replace('_', '-')}" in line and len(line) < 600
        (run / "config.json").write_text(text)


@pytest.mark.parametrize(
    "given",
    ["--save-checkpoint 1e400", "--lr-warmup-epochs 1e308", "--samples-per-class 99999999999"],
)
def test_lengths_that_cannot_be_counted_are_refused(given):
    assert given.split()[0] in refused("train", "--model", "mlp_2", *given.split())


def test_a_recorded_download_is_none(tmp_path, monkeypatch):
    """A directory that came from elsewhere neither downloads nor makes folders."""
    assert command(*SMALL, "--save-dir", tmp_path / "runs")[0] == 0
    run = only_run(tmp_path / "runs")
    found = json.loads((run / "config.json").read_text())
    away = tmp_path / "away"
    found["settings"] |= {"data": "cifar10", "download": True, "data_dir": str(away)}
    (run / "config.json").write_text(json.dumps(found))
    asked = []

    class Datasets:
        class CIFAR10:
            url, base_folder = "https://there", "cifar-10-batches-py"

            def __init__(self, place, train, download):
                asked.append(download)
                raise RuntimeError("not found")

        CIFAR100 = CIFAR10

    monkeypatch.setattr(_cifar, "torchvision_datasets", lambda name: Datasets)
    line = refused("stats", run, "--last")
    assert "--data-dir: expected cifar10" in line and asked == [False] and not away.exists()


def test_long_settings_name_a_directory_that_can_be_made(tmp_path):
    for name in ("a" * 201, "é" * 130):
        place = _place.place_of(TrainConfig(data=f"folder:{name}", save_dir=tmp_path))
        other = _place.place_of(TrainConfig(data=f"folder:{name}b", save_dir=tmp_path))
        assert place != other
        place.mkdir(parents=True)
