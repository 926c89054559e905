"""The command ``gradfilter stats``."""

from __future__ import annotations

from contextlib import ExitStack

from gradfilter.lab._crew import connected, own_device
from gradfilter.lab._interrupt import interruptible
from gradfilter.lab._processes import is_first_process
from gradfilter.lab._reading import printable
from gradfilter.lab._usage import UsageError, usable_device
from gradfilter.lab.stats._check import check_values
from gradfilter.lab.stats._config import StatsConfig
from gradfilter.lab.stats._find import chosen, find_run
from gradfilter.lab.stats._measurement import Measurement
from gradfilter.lab.stats._show import listed, summary
from gradfilter.lab.train._archive import NAME, checkpoints, misnamed
from gradfilter.lab.train._restore import restored


def stats(config: StatsConfig) -> int:
    """Measure checkpoints, or list them where none is asked for.

    Returns:
        The exit code: 0, 130 after Ctrl-C, or 143 after SIGTERM.

    Raises:
        UsageError: A value is wrong, or numbers are there that were measured differently. Nothing
            that was there has been changed then.
    """
    check_values(config)
    device = own_device(usable_device(config.device))
    run = find_run(config)
    saved = checkpoints(run / NAME)
    lost = misnamed(run / NAME)
    wanted = chosen(config, saved, lost)
    if not wanted:
        if is_first_process():
            print(listed(run, saved, lost))
        return 0
    finished = []
    with ExitStack() as stack:
        crew = stack.enter_context(connected(device))
        stop = stack.enter_context(interruptible())
        data = None
        for checkpoint in wanted:
            model = restored(run, checkpoint, device=device, data_dir=config.data_dir, data=data)
            data = model.data
            if config.restored_targets and not data.train.wrong.any():
                raise UsageError("--restored-targets: the run has no wrong labels. Leave it away.")
            measurement = Measurement.of(config, model)
            if not measurement.carry_out(crew, stop):
                break
            finished.append(measurement.path)
        if crew.is_first:
            if finished:
                print(summary(finished))
            if len(finished) < len(wanted):
                print(f"interrupted; the same command goes on: {printable(measurement.path)}")
    return 0 if len(finished) == len(wanted) else stop.exit_code
