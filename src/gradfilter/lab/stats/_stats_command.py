"""``gradfilter stats``: find the run and its checkpoints, and measure them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from gradfilter.lab._connect import connected
from gradfilter.lab._device import own_device, usable_device
from gradfilter.lab._interrupt import interruptible
from gradfilter.lab._processes import is_first_process
from gradfilter.lab._run_files import printable
from gradfilter.lab._usage import UsageError
from gradfilter.lab.stats._measurement import Measurement, listed, summary
from gradfilter.lab.stats._stats_config import StatsConfig, check_values
from gradfilter.lab.train._archive import ARCHIVE, Checkpoint, checkpoints, misnamed
from gradfilter.lab.train._restore import restored
from gradfilter.lab.train._run_place import find_runs, read_config

# --- Find the run and its checkpoints ---


WANTED = ("data", "model", "label_noise", "seed", "name")
SHOWN = 3


def find_run(config: StatsConfig) -> Path:
    """Find the one run directory that fits the settings.

    Raises:
        UsageError: No run fits, or several fit; the message lists them.
    """
    if config.run is not None:
        read_config(config.run)  # its error says what is missing
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
        f"{len(found)} runs fit {asked or 'without any option'}: {listed}{more}. "
        f"Name one of the directories: gradfilter stats {found[0]} ..., or add options that "
        "distinguish them: --name, --seed, --label-noise."
    )


def chosen(
    config: StatsConfig, saved: Sequence[Checkpoint], lost: Sequence[str] = ()
) -> list[Checkpoint]:
    """Return the chosen checkpoints; none if no option chooses one.

    Args:
        config: Settings.
        saved: The checkpoints of the run, in order.
        lost: Entries of a damaged archive that are not usable checkpoints.

    Raises:
        UsageError: The run does not have this checkpoint.
    """
    if config.last:
        if not saved:
            raise UsageError("--last: the run has no checkpoint yet. Train first.")
        if lost:
            raise UsageError(
                f"--last: the archive of the run is damaged: {', '.join(lost)}. The newest "
                f"usable checkpoint is --checkpoint {saved[-1].id}."
            )
        return [saved[-1]]
    by_step = config.checkpoint_by_step
    known = {c.step if by_step else c.id: c for c in saved}
    factor = config.nsteps_per_epoch or 1
    found = []
    for number in dict.fromkeys(config.checkpoint):
        place = number * factor if by_step else number
        if config.nsteps_per_epoch is not None and place not in known:
            # If the batch size does not divide the samples, an epoch ends some steps earlier.
            ends = {round(c.epoch): c.step for c in saved if abs(c.epoch - number) < 0.5}
            place = ends.get(number, place)
        if place not in known:
            kind = "step" if by_step else "id"
            raise UsageError(
                f"--checkpoint {number}: the run has no checkpoint of {kind} {place}. "
                f"There are: {', '.join(map(str, known)) or 'none yet'}.{_damage_note(lost)}"
            )
        found.append(known[place])
    return found


def _damage_note(lost: Sequence[str]) -> str:
    return f" The archive is damaged: {', '.join(lost)}." if lost else ""


# --- The command ---


def stats(config: StatsConfig) -> int:
    """Run ``gradfilter stats``: measure checkpoints, or list them if none is chosen.

    Returns:
        The exit code: 0, 130 after Ctrl-C, or 143 after SIGTERM.

    Raises:
        UsageError: A value is wrong, or existing numbers were measured differently. Existing files
            have not been changed then.
    """
    check_values(config)
    device = own_device(usable_device(config.device))
    run = find_run(config)
    saved = checkpoints(run / ARCHIVE)
    lost = misnamed(run / ARCHIVE)
    wanted = chosen(config, saved, lost)
    if not wanted:
        if is_first_process():
            print(listed(run, saved, lost))
        return 0
    finished = []
    interrupted: Path | None = None
    with ExitStack() as stack:
        ranks = stack.enter_context(connected(device))
        stop = stack.enter_context(interruptible())
        data = None
        for checkpoint in wanted:
            model = restored(run, checkpoint, device=device, data_dir=config.data_dir, data=data)
            data = model.data
            if config.restored_targets and not data.train.wrong.any():
                raise UsageError("--restored-targets: the run has no wrong labels. Omit it.")
            measurement = Measurement.of(config, model)
            if not measurement.run(ranks, stop):
                interrupted = measurement.path
                break
            finished.append(measurement.path)
        if ranks.is_first:
            if finished:
                print(summary(finished))
            if len(finished) < len(wanted):
                print(f"interrupted; the same command continues: {printable(interrupted)}")
    return 0 if len(finished) == len(wanted) else stop.exit_code
