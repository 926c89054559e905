"""A damaged file of a run: every command reports it in one line, or does not need it."""

import random
import shutil
import zipfile

import matplotlib.figure
import pytest

from _damage import cut, damage, flipped, overwritten
from _lab import command, only_run
from _stats_run import TRAINING, train
from gradfilter.lab.stats._stats_files import appending, origin_of, part_path, read, records_of
from gradfilter.lab.train import _archive

SETS, CASES = 8, 15
PART = ["--last", "--metric", "confidence", "--num-samples", 10, "--batch-size", 5]
DOT = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63600000"
    "000200015d0a2db40000000049454e44ae426082"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was interrupted at its end, with numbers, a part of others, and a report."""
    root = tmp_path_factory.mktemp("whole")
    run = train(root)
    assert command("stats", run, "--last", "--num-samples", 10)[0] == 0
    assert command("stats", run, *PART)[0] == 0
    (measured,) = (run / "stats").glob("confidence-*")
    found = read(measured)
    measured.unlink()
    (record,) = records_of(found)
    half = type(record)(0, 5, *(column[:5] for column in _columns(record)))
    with appending(part_path(run / "stats", measured.stem, 0), origin_of(found)) as append:
        append(half)
    assert command("report", root)[0] == 0
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"finished"', '"interrupted"'))
    archive = (run / "checkpoints.zip").read_bytes()
    with zipfile.ZipFile(run / "checkpoints.zip") as opened:
        start = opened.start_dir
    kept = start.to_bytes(8, "big") + archive[start:]
    (run / ".checkpoints.zip.directory").write_bytes(kept)
    return root


def _columns(record):
    return record.sample_ids, record.targets, record.ground_truths, record.stats


@pytest.fixture
def quick(monkeypatch):
    """Figures that are laid out, but not drawn; readers that do not wait for a writer."""
    monkeypatch.setattr(_archive, "PATIENCE", 0.0)
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, file, **options: file.write(DOT)
    )


def spoilt(whole, folder, seed):
    """A copy in which one file is damaged, and which one."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    chance = random.Random(seed)
    run = only_run(folder)
    if chance.random() < 0.8:  # the other kind of reader waits for the writer
        (run / ".checkpoints.zip.directory").unlink()
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    path = chance.choice([*files, folder / "report" / "report.json"])
    damage(path, chance)
    return run, path


def said(*args):
    """Return what a command prints about a damaged file: nothing, or one line at the end."""
    code, out, err = command(*args)
    assert code in (0, 2), (code, err)
    assert all(character.isprintable() or character == "\n" for character in out + err), out + err
    lines = err.splitlines()
    if code == 2:
        assert lines and lines[-1].startswith(f"gradfilter {args[0]}: "), err
    assert len([line for line in lines if line.startswith("gradfilter ")]) == (code == 2), err
    return code, err


@pytest.mark.slow
@pytest.mark.parametrize("number", range(SETS))
def test_a_damaged_file_is_one_line(whole, quick, tmp_path, number):
    refusals = 0
    for seed in range(number * CASES, (number + 1) * CASES):
        folder = tmp_path / "a"
        run, path = spoilt(whole, folder, seed)
        options = [*TRAINING, "--save-dir", folder, "--save-checkpoint", 1]
        for args in (  # the last one repairs and writes again
            ["stats", run, *PART],
            ["stats", run, "--last", "--num-samples", 10],
            *([["report", folder]] if path.suffix in (".json", ".jsonl") else ()),
            ["train", *options, "--resume"],
        ):
            try:
                refusals += said(*args)[0] == 2
            except BaseException as error:
                raise AssertionError(f"seed {seed}, {path.name}: {args[0]}: {error!r}") from error
    assert refusals > CASES / 4


# Studies

SWEEP = ["sweep", "--grid", "learning_rate=0.01,0.1", "--", "--model", "mlp_4", "--steps", 1]
FILE_ONLY = (flipped, flipped, flipped, overwritten, cut)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished study of two trainings."""
    root = tmp_path_factory.mktemp("study")
    assert command(*SWEEP, "--save-dir", root)[0] == 0
    return root


@pytest.mark.slow
def test_a_damaged_study_is_one_line(study, tmp_path):
    refusals = 0
    for seed in range(40):
        chance, folder = random.Random(seed), tmp_path / str(seed)
        shutil.copytree(study, folder)
        (path,) = folder.rglob("study.db")
        content = path.read_bytes()
        used = [place for place, byte in enumerate(content) if byte]  # most of a page is empty
        if seed % 2:
            spoilt = bytearray(content)
            spoilt[chance.choice(used)] ^= 1 << chance.randrange(8)
            path.write_bytes(bytes(spoilt))
        else:
            path.write_bytes(chance.choice(FILE_ONLY)(content, chance))
        try:
            refusals += said(*SWEEP, "--save-dir", folder)[0] == 2
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
    assert refusals >= 12  # the others hit what no study needs
