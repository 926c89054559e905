"""Run directories made to do harm: to memory, terminals, options and names."""

import csv
import io
import json
import os
import shutil
import sqlite3
import sys
import tomllib
import tracemalloc
import zipfile

import pytest
import torch
from PIL import Image

from _lab import command, config, only_run, refused
from _report_runs import make_run, sparse
from _stats_run import TRAINING, train
from gradfilter.lab._run_files import DEEPEST, content_of, json_of, printable
from gradfilter.lab._usage import UsageError
from gradfilter.lab.stats._stats_files import join_ranges
from gradfilter.lab.train._archive import (
    add,
    checkpoints,
    read_tensors,
    recover,
    tensor_bytes,
    tensors_of,
)
from gradfilter.lab.train._run_place import config_of

MEGABYTE = 2**20


def packed(entries, how):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as new:
        for name, content in entries.items():
            new.writestr(name, content)
    return buffer.getvalue()


def entries_of(content):
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        return {name: old.read(name) for name in old.namelist()}


# Memory


def test_an_entry_that_would_inflate_is_refused_before_it_does(tmp_path):
    archive, name = tmp_path / "checkpoints.zip", "00000-step-0-epoch-0.000000.pt"
    content = tensor_bytes({"params.w": torch.zeros(16 * MEGABYTE)})
    archive.write_bytes(packed({name: content}, zipfile.ZIP_DEFLATED))
    assert archive.stat().st_size < MEGABYTE / 4
    (saved,) = checkpoints(archive)
    tracemalloc.start()
    with pytest.raises(UsageError, match="is compressed"):
        read_tensors(archive, saved)
    assert tracemalloc.get_traced_memory()[1] < MEGABYTE
    tracemalloc.stop()


def test_tensors_that_would_inflate_are_refused_before_they_do():
    content = tensor_bytes({"params.w": torch.zeros(16 * MEGABYTE)})
    with pytest.raises(UsageError, match="a is compressed"):
        tensors_of(packed(entries_of(content), zipfile.ZIP_DEFLATED), "a")


def test_entries_that_lie_over_each_other_are_refused():
    """Each is read as a tensor of its own, and the file is as small as one of them."""
    content = packed(entries_of(tensor_bytes({"a": torch.zeros(100_000)})), zipfile.ZIP_STORED)
    start = content.rindex(b"PK\x05\x06")
    first = content.index(b"PK\x01\x02")
    directory = content[first:start]
    end = bytearray(content[start:])
    more = 100
    end[8:10] = end[10:12] = (int.from_bytes(end[8:10], "little") * (more + 1)).to_bytes(
        2, "little"
    )
    end[12:16] = (len(directory) * (more + 1)).to_bytes(4, "little")
    bomb = content[:first] + directory * (more + 1) + bytes(end)
    with zipfile.ZipFile(io.BytesIO(bomb)) as opened:
        assert sum(info.file_size for info in opened.infolist()) > 10 * len(bomb)
    with pytest.raises(UsageError, match="a is damaged"):
        tensors_of(bomb, "a")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**12),
        torch.zeros(3).to_sparse(),
        torch.empty(10**12, device="meta"),
    ],
    ids=["expanded", "sparse", "meta"],
)
def test_a_tensor_without_numbers_of_its_own_is_refused(tensor):
    buffer = io.BytesIO()
    torch.save({"a": tensor}, buffer)
    with pytest.raises(UsageError, match="a is not a dict of tensors"):
        tensors_of(buffer.getvalue(), "a")


@pytest.mark.parametrize(
    "start", [0, 1, 2**31, 2**62, 2**63 + 5, 2**64 - 1], ids=lambda start: f"{start:.0e}"
)
def test_what_a_killed_run_kept_is_put_back_only_where_it_fits(tmp_path, start):
    archive = tmp_path / "checkpoints.zip"
    add(archive, "00000-step-0-epoch-0.000000.pt", tensor_bytes({}))
    before = archive.read_bytes()
    kept = tmp_path / ".checkpoints.zip.directory"
    with zipfile.ZipFile(archive) as opened:
        place = opened.start_dir
    kept.write_bytes(start.to_bytes(8, "big") + before[place:])
    with pytest.raises(UsageError, match=r"directory' cannot be read: it does not fit the archive"):
        recover(archive)
    assert archive.read_bytes() == before
    kept.write_bytes(place.to_bytes(8, "big") + before[place:])
    archive.write_bytes(before[: place + 7])
    recover(archive)
    assert archive.read_bytes() == before and not kept.exists()


def test_a_point_that_is_far_larger_than_the_run_is_not_read(tmp_path):
    run = train(tmp_path)
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"finished"', '"interrupted"'))
    with (run / "resume.pt").open("r+b") as file:
        file.truncate(2**40)  # which takes no room on the disk
    options = [*TRAINING, "--save-dir", tmp_path, "--save-checkpoint", 1]
    line = refused("train", *options, "--resume")
    assert "resume.pt' cannot be read: it has 1099511627776 bytes, more than any such file" in line
    assert "resume.before.pt, is intact" in line


def test_json_is_at_most_so_deep():
    assert json_of(b"[" * DEEPEST + b"]" * DEEPEST)
    for content in (b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), b"[" * 10**5, b'{"a":' * 10**5):
        with pytest.raises(RecursionError):
            json_of(content)


# Options


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_additions": ["--download"]}, "--download"),
        ({"help": True}, "'help'"),
        ({"print_config": True}, "'print_config'"),
        ({"seed": True}, "seed does not fit this version: True is not a whole number"),
        ({"betas": [0.9]}, "betas"),
        ({"epochs": 10**400}, "epochs"),
        ({"seed": 10**400}, "seed"),
        ({"optimizer": ["sgd"]}, "optimizer"),
        ({"learning_rate": -1.0}, "--learning-rate"),
    ],
)
def test_recorded_settings_are_values_and_never_options(tmp_path, change, said):
    settings = config(make_run(tmp_path))["settings"]
    assert config_of(settings, "it").model == "mlp_256"
    if change == {"model_additions": ["--download"]}:
        found = config_of(settings | change, "it")
        assert found.model_additions == ("--download",) and not found.download
        return
    with pytest.raises(UsageError) as refusal:
        config_of(settings | change, "it")
    assert said in str(refusal.value) and str(refusal.value).startswith("it cannot be used: ")


# Terminals and names


EVIL = "\x1b]0;owned\x07\x1b[2J\r\u202e"


def shown(*args):
    code, out, err = command(*args)
    assert all(c.isprintable() or c == "\n" for c in out + err), (out, err)
    return code, out + err


def test_control_characters_of_records_do_not_reach_the_terminal(tmp_path):
    place = make_run(tmp_path, evaluations=[sparse(1)])
    record = config(place)
    record["status"] = record["settings"]["device"] = EVIL
    record["versions"] = {EVIL: EVIL}
    record["settings"] |= {"name": EVIL, "model_additions": [EVIL, "[/red]"]}
    (place / "config.json").write_text(json.dumps(record))
    (place / "stats").mkdir()
    (place / "stats" / f"{EVIL}.json").write_text("{}")
    code, said = shown("report", tmp_path)
    assert code == 0 and r"\x1b" in said
    for name in ("index.html", "runs.csv"):
        text = (tmp_path / "report" / name).read_text(encoding="utf-8")
        assert not {"\x1b", "\x07", "\u202e"} & {*text}
        assert r"\x1b]0;owned" in text
    assert shown("report", tmp_path / EVIL)[0] == 2
    assert shown("stats", tmp_path / EVIL)[0] == 2
    assert shown("train", "--model", EVIL)[0] == 2
    assert shown("train", "--resume", "--save-dir", tmp_path / EVIL, "--steps", 1)[0] == 0
    assert shown("sweep", "--grid", f"model={EVIL}")[0] == 2


def test_a_printed_configuration_is_toml_whatever_is_in_it():
    code, out, _ = command("train", "--print-config", "--save-dir", f'{EVIL}\x7f\n"\\é')
    assert code == 0
    assert tomllib.loads(out)["train"]["save_dir"] == f'{EVIL}\x7f\n"\\é'


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are Unicode")
def test_directories_whose_names_are_not_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    options = ["train", *TRAINING, "--save-dir", folder, "--save-checkpoint", 1]
    code, said = shown(*options)
    assert code == 0 and r"caf\xe9" in said
    assert shown(*options, "--resume")[0] == 0
    code, said = shown("stats", only_run(folder), "--last")
    assert code == 0 and r"caf\xe9" in said
    code, said = shown("report", folder)
    assert code == 0 and r"caf\xe9" in said
    assert r"caf\xe9" in (folder / "report" / "index.html").read_text(encoding="utf-8")
    with (folder / "report" / "runs.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert r"caf\xe9" in row["run"]
    sweep = ["sweep", "--grid", "seed=0,1", "--", *TRAINING, "--save-dir", folder]
    code, said = shown(*sweep)
    assert code == 2 and "--storage: expected a path in UTF-8" in said  # databases know no other
    assert shown(*sweep[:3], "--storage", tmp_path / "study.db", *sweep[3:])[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are Unicode")
def test_data_sets_whose_names_are_not_utf_8(tmp_path):
    data = os.fsdecode(bytes(tmp_path) + b"/caf\xe9")
    for part in ("train/a", "train/b", "val/a", "val/b"):
        os.makedirs(f"{data}/{part}")
        Image.new("RGB", (8, 8)).save(f"{data}/{part}/0.png")
    options = ["--model", "mlp_4", "--image-size", 8, "--batch-size", 2, "--epochs", 1]
    options += ["--save-dir", tmp_path / "runs"]
    code, said = shown("sweep", "--grid", f"data=folder:{data}", "--", *options)
    assert code == 0, said
    with (tmp_path / "runs" / "sweep" / "study.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["data"].endswith(r"caf\xe9")
    line = refused("train", *options, "--data", f"folder:{data}", "--print-config")
    assert "--print-config: expected names in UTF-8" in line and r"caf\udce9" in line


# Links, and files without an end


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("name", ["study.db", "study.db-journal", "study.db.lock"])
def test_a_study_does_not_write_through_a_link(tmp_path, name):
    victim, folder = tmp_path / "victim.db", tmp_path / "runs" / "sweep"
    sqlite3.connect(victim).close()
    folder.mkdir(parents=True)
    (folder / name).symlink_to(victim)
    before = victim.read_bytes()
    line = refused("sweep", "--grid", "seed=0", "--", *TRAINING, "--save-dir", tmp_path / "runs")
    assert f"{name}' is a symbolic link" in line
    assert victim.read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="it has no /proc")
def test_no_more_of_a_file_is_read_than_it_says(tmp_path):
    (tmp_path / "config.json").symlink_to("/proc/self/maps")  # of 0 bytes, and far more
    assert content_of(tmp_path / "config.json") == b""
    assert "is not JSON" in refused("stats", tmp_path)


def test_checkpoints_of_other_names_are_none(tmp_path):
    archive = tmp_path / "checkpoints.zip"
    own = "00001-step-5-epoch-1.000000.pt"
    add(archive, "0-step-0-epoch-0.pt", tensor_bytes({}))
    add(archive, own, b"x" * 100)
    content = archive.read_bytes()
    archive.write_bytes(content.replace(b"x" * 100, b"y" * 100))
    assert [checkpoint.entry for checkpoint in checkpoints(archive)] == [own]
    with pytest.raises(UsageError, match=r"is damaged.*No checkpoint there is intact"):
        read_tensors(archive, own)


def test_ranges_that_lead_round_in_circles_end(tmp_path):
    run = train(tmp_path)
    measure = ["stats", run, "--last", "--num-samples", 10]
    assert command(*measure)[0] == 0
    (first,) = (run / "stats").iterdir()
    stem = first.stem.removesuffix("-id-0-10")
    for name in ("0-0", "10-0"):
        shutil.copy(first, first.with_name(f"{stem}-id-{name}.json"))
    assert join_ranges(run / "stats", stem, 1000) is None


def test_printable_text_stays_as_it_is():
    assert printable("± µ 日本 – ✓") == "± µ 日本 – ✓"


def test_a_part_whose_name_has_brackets_is_found_again(tmp_path):
    run = train(tmp_path)
    assert command("stats", run, "--last", "--outname", "[a]")[0] == 0
    assert [path.name for path in (run / "stats").iterdir()] == [
        "[a]-crossentropy-train-checkpoint-2.json"
    ]
    assert "cannot be used" not in refused("stats", run, "--last", "--outname", "a/b")
