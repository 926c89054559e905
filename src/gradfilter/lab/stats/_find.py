"""Which run, and which of its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradfilter.lab._usage import UsageError
from gradfilter.lab.stats._config import StatsConfig
from gradfilter.lab.train._archive import Checkpoint
from gradfilter.lab.train._place import find_runs, read_config

WANTED = ("data", "model", "label_noise", "seed", "name")
SHOWN = 3


def find_run(config: StatsConfig) -> Path:
    """The one run directory that fits.

    Raises:
        UsageError: None does, or several do, which are then listed.
    """
    if config.run is not None:
        read_config(config.run)  # says what is missing
        return config.run
    given = {name: getattr(config, name) for name in WANTED}
    wanted = {name: value for name, value in given.items() if value is not None}
    found = find_runs(config.save_dir, **wanted)
    if len(found) == 1:
        return found[0]
    asked = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in wanted.items())
    if not found:
        raise UsageError(
            f"no run in {str(config.save_dir)!r} fits {asked or 'a training'}. Train first, or "
            "name another --save-dir."
        )
    more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    listed = ", ".join(map(str, found[:SHOWN]))
    raise UsageError(
        f"{len(found)} runs fit {asked or 'without anything asked for'}: {listed}{more}. "
        f"Name one of the directories: gradfilter stats {found[0]} ..., or add what tells them "
        "apart: --name, --seed, --label-noise."
    )


def chosen(
    config: StatsConfig, saved: Sequence[Checkpoint], lost: Sequence[str] = ()
) -> list[Checkpoint]:
    """The checkpoints that are asked for; none if none is.

    Args:
        config: What is asked for.
        saved: What there is, in order.
        lost: Entries that a damaged archive has in the place of some.

    Raises:
        UsageError: There is no such checkpoint.
    """
    if config.last:
        if not saved:
            raise UsageError("--last: the run has no checkpoint yet. Train first.")
        if lost:
            raise UsageError(
                f"--last: the archive of the run is damaged: {', '.join(lost)}. The newest "
                f"checkpoint that is in its place is --checkpoint {saved[-1].id}."
            )
        return [saved[-1]]
    by_step = config.checkpoint_by_step
    known = {c.step if by_step else c.id: c for c in saved}
    factor = config.nsteps_per_epoch or 1
    found = []
    for number in dict.fromkeys(config.checkpoint):
        place = number * factor if by_step else number
        if config.nsteps_per_epoch is not None and place not in known:
            # Where the batches do not divide the samples, an epoch ends some steps before.
            ends = {round(c.epoch): c.step for c in saved if abs(c.epoch - number) < 0.5}
            place = ends.get(number, place)
        if place not in known:
            kind = "step" if by_step else "id"
            raise UsageError(
                f"--checkpoint {number}: the run has no checkpoint of {kind} {place}. "
                f"There are: {', '.join(map(str, known)) or 'none yet'}.{_damage(lost)}"
            )
        found.append(known[place])
    return found


def _damage(lost: Sequence[str]) -> str:
    return f" The archive is damaged: {', '.join(lost)}." if lost else ""
