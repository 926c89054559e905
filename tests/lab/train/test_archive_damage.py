"""A flipped bit in a file of a run is reported, or changes no number."""

import io
import random
import zipfile

import pytest
import torch
from test_record_resume import BASE, assert_same, begin, files

from _lab import command, config, only_run, refused
from gradfilter.lab._usage import UsageError
from gradfilter.lab.train._archive import (
    ARCHIVE,
    LABELS,
    Checkpoint,
    add,
    checkpoints,
    damaged,
    misnamed,
    newest_whole,
    read_tensors,
    tensor_bytes,
    tensors_of,
)
from gradfilter.lab.train._run_place import place_of
from gradfilter.lab.train._train import recorded
from gradfilter.lab.train._train_command import parse_train

OPTIONS = [*BASE, "--save-checkpoint", 1]
FLAT = {
    "state.params.weight": torch.arange(12.0).reshape(3, 4),
    "state.momentum": torch.linspace(-1, 1, 5, dtype=torch.float64),
    "done": torch.tensor(17.0, dtype=torch.float64),
}


def flipped(content, at, bit=0):
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    return bytes(changed)


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


def test_a_flip_of_any_bit_is_seen_or_changes_nothing():
    whole = tensor_bytes(FLAT)
    seen = 0
    for at in range(len(whole)):
        for bit in range(8):
            try:
                found = tensors_of(flipped(whole, at, bit), "resume.pt")
            except UsageError as error:
                assert "resume.pt" in str(error)
                seen += 1
            else:
                assert same(found, FLAT), (at, bit)
    assert seen > 4 * len(whole)  # the rest is padding, dates and the like


def test_a_flip_in_the_numbers_is_not_read_by_torch_alone():
    """Torch reads it as if nothing had happened; only the checksums show it."""
    whole = tensor_bytes(FLAT)
    at = whole.index(FLAT["state.params.weight"].numpy().tobytes()) + 2
    read = torch.load(io.BytesIO(flipped(whole, at)), weights_only=True)
    assert not same(read, FLAT)
    with pytest.raises(UsageError, match=r"the file is damaged\. Take another\."):
        tensors_of(flipped(whole, at), "the file", "Take another.")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / ARCHIVE
    add(path, LABELS, tensor_bytes({"labels": torch.arange(5)}))
    for number, step in enumerate((0, 5, 9)):
        tensors = {"params.w": torch.arange(4.0) + step}
        add(path, Checkpoint(number, step, step / 5).entry, tensor_bytes(tensors))
    return path


def test_a_flip_of_any_bit_of_an_archive_is_seen_or_changes_nothing(archive, tmp_path):
    whole, chance = archive.read_bytes(), random.Random(0)
    saved = checkpoints(archive)
    with zipfile.ZipFile(archive) as opened:
        directory = opened.start_dir
    spoilt = tmp_path / ARCHIVE
    places = [*chance.sample(range(directory), 300), *range(directory, len(whole))]
    for at in places:
        spoilt.write_bytes(flipped(whole, at, chance.randrange(8)))
        try:
            lost, found = damaged(spoilt), checkpoints(spoilt)
            # What is missing from the list is named as damaged.
            assert {*saved} - {*found} == set() or lost, at
            for checkpoint in found:
                tensors = read_tensors(spoilt, checkpoint)
                assert torch.equal(tensors["params.w"], torch.arange(4.0) + checkpoint.step), at
        except UsageError as error:
            assert str(spoilt) in str(error), at


def test_another_checkpoint_is_offered_for_a_damaged_one(archive, tmp_path):
    whole, spoilt = archive.read_bytes(), tmp_path / ARCHIVE
    first, second, third = checkpoints(archive)
    at = whole.rindex((torch.arange(4.0) + 9).numpy().tobytes())
    spoilt.write_bytes(flipped(whole, at, 3))
    with pytest.raises(UsageError, match=rf"{third.entry}'.*damaged.*is 1, after step 5\.$"):
        read_tensors(spoilt, third)
    assert damaged(spoilt) == [third.entry] and misnamed(spoilt) == []
    assert newest_whole(spoilt) == second
    at = whole.rindex(first.entry.encode())  # in the directory at the end
    spoilt.write_bytes(flipped(whole, at + len("00000-ste")))
    assert checkpoints(spoilt) == [second, third]
    assert misnamed(spoilt) == damaged(spoilt) == ["00000-steq-0-epoch-0.000000.pt"]


# Runs


def interrupted(folder, step):
    run = begin(parse_train([*map(str, OPTIONS[1:]), "--save-dir", str(folder)]).settings)
    place = _place(run)
    assert not recorded(run, place, False, lambda: run.done == step)
    return place


def _place(run):
    place = place_of(run.config)
    place.mkdir(parents=True)
    return place


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert command(*OPTIONS, "--save-dir", folder)[0] == 0
    return files(folder)


def test_a_damaged_point_is_refused_and_the_one_before_it_goes_on(tmp_path, expected):
    run = interrupted(tmp_path, 30)
    point, before = run / "resume.pt", run / "resume.before.pt"
    steps = [int(torch.load(path, weights_only=True)["done"]) for path in (point, before)]
    assert steps[0] == 30 and 0 < steps[1] < 30
    whole = point.read_bytes()
    weight = torch.load(point, weights_only=True)["state.params.head.weight"]
    point.write_bytes(flipped(whole, whole.index(weight.numpy().tobytes()) + 2))
    line = refused(*OPTIONS, "--save-dir", tmp_path, "--resume")
    assert "resume.pt' is damaged" in line
    assert f"remove resume.pt, and the same command resumes after step {steps[1]}" in line
    assert config(run)["status"] == "interrupted"
    point.unlink()
    assert command(*OPTIONS, "--save-dir", tmp_path, "--resume")[0] == 0
    assert_same(files(tmp_path), expected)


def test_two_damaged_points_are_refused(tmp_path):
    run = interrupted(tmp_path, 30)
    for name in ("resume.pt", "resume.before.pt"):
        content = (run / name).read_bytes()
        (run / name).write_bytes(flipped(content, content.index(b"PK", 4) - 20))
    line = refused(*OPTIONS, "--save-dir", tmp_path, "--resume")
    assert "resume.pt' is damaged. No other point is intact: start anew" in line
    (run / "resume.pt").unlink()
    line = refused(*OPTIONS, "--save-dir", tmp_path, "--resume")
    assert "resume.before.pt' is damaged. No other point is intact: start anew" in line


def test_a_kill_between_the_two_points_loses_neither(tmp_path, expected):
    run = interrupted(tmp_path, 30)
    (run / "resume.pt").rename(run / "resume.before.pt")
    assert command(*OPTIONS, "--save-dir", tmp_path, "--resume")[0] == 0
    assert_same(files(tmp_path), expected)


def test_a_damaged_archive_is_refused_by_resume_and_by_stats(tmp_path):
    run = interrupted(tmp_path, 50)
    archive = run / ARCHIVE
    whole, saved = archive.read_bytes(), checkpoints(archive)
    weight = read_tensors(archive, saved[-1])["params.head.weight"].numpy().tobytes()
    archive.write_bytes(flipped(whole, whole.rindex(weight) + 1))
    line = refused(*OPTIONS, "--save-dir", tmp_path, "--resume")
    assert f"{ARCHIVE}' is damaged: {saved[-1].entry}. " in line
    assert f"intact checkpoint is {saved[-2].id}, after step {saved[-2].step}." in line
    line = refused("stats", run, "--last")
    assert (
        saved[-1].entry in line
        and "damaged" in line
        and f"intact checkpoint is {saved[-2].id}," in line
    )
    assert command("stats", run, "--checkpoint", saved[-2].id)[0] == 0
    # The name of the last one, in the archive's directory: it is no longer the last.
    at = whole.rindex(saved[-1].entry.encode())
    archive.write_bytes(flipped(whole, at + len("00003-step-"), 1))
    line = refused("stats", run, "--last")
    assert "damaged" in line and f"--checkpoint {saved[-2].id}" in line
    assert "damaged" in refused("stats", run, "--checkpoint", saved[-1].id)
    code, out, _ = command("stats", run)
    assert code == 0 and "damaged: 0000" in out
    assert command("stats", run, "--checkpoint", saved[0].id)[0] == 0
    assert "is damaged" in refused(*OPTIONS, "--save-dir", tmp_path, "--resume")
    assert only_run(tmp_path) == run
