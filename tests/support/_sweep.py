"""Helpers for tests of sweeps: studies that are started in this process, without a worker."""

from contextlib import ExitStack, contextmanager

from gradfilter.lab.sweep._join import joined_study
from gradfilter.lab.sweep._queue import enqueue
from gradfilter.lab.sweep._sweep_command import parse_sweep


@contextmanager
def studies_in(folder):
    """Return a function that starts or joins the study of a command line in a directory."""
    with ExitStack() as stack:

        def begin(*options):
            _, plan = parse_sweep([*options, "--save-dir", str(folder)])
            # No test waits until a heartbeat is old.
            queue = stack.enter_context(joined_study(plan, None, 3600))
            enqueue(queue, retry_failed=False)
            return queue

        yield begin


def states(queue):
    return [trial.state for trial in queue.trials()]
