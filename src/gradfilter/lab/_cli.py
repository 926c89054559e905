"""Run the command line: subcommands, and one line for any error in their options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from gradfilter._about import answer
from gradfilter.lab._processes import is_first_process
from gradfilter.lab._run_files import printable
from gradfilter.lab._usage import UsageError, did_you_mean


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line; exit code 2 after a bad value, 130 after Ctrl-C.

    Args:
        args: Arguments without the program's name; None for those of the process.
    """
    args = sys.argv[1:] if args is None else args
    text = answer(args)
    if text is not None:
        print(text, end="")
        return
    command, *options = args
    try:
        if command in COMMANDS:
            sys.exit(COMMANDS[command](options))
        else:
            known = ", ".join(COMMANDS)
            hint = did_you_mean(command, COMMANDS, "'{}'")
            raise UsageError(f"unknown command {command!r}.{hint} The commands are: {known}.")
    except UsageError as error:
        name = f"gradfilter {command}" if command in COMMANDS else "gradfilter"
        if is_first_process():  # only one of several processes prints it
            print(printable(f"{name}: {error}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("gradfilter: interrupted", file=sys.stderr)
        sys.exit(130)


def _demo(options: Sequence[str]) -> int:
    from gradfilter.lab._demo_config import DemoConfig
    from gradfilter.lab._options import environment_arguments, parse

    given = [*environment_arguments(DemoConfig), *options]
    config = parse(DemoConfig, "gradfilter demo", given)
    from gradfilter.lab._demo import demo

    return demo(config)


def _train(options: Sequence[str]) -> int:
    from gradfilter.lab.train._train_command import train_command

    return train_command(options)


def _find_lr(options: Sequence[str]) -> int:
    from gradfilter.lab._find_lr_config import parse_find_lr

    command = parse_find_lr(options)
    from gradfilter.lab._find_lr import find_lr

    return find_lr(command)


def _stats(options: Sequence[str]) -> int:
    from gradfilter.lab._options import environment_arguments, from_files, parse
    from gradfilter.lab.stats._stats_config import StatsConfig, refuse_unread

    given = [
        *from_files(options, "stats", StatsConfig),
        *environment_arguments(StatsConfig),
        *options,
    ]
    config = parse(StatsConfig, "gradfilter stats", given)
    refuse_unread(config, options)
    from gradfilter.lab.stats._stats_command import stats

    return stats(config)


def _sweep(options: Sequence[str]) -> int:
    from gradfilter.lab.sweep._sweep_config import parse_own

    parse_own(options)  # answers --help and a misspelt option without the modules that follow
    from gradfilter.lab.sweep._sweep_command import sweep_command

    return sweep_command(options)


def _report(options: Sequence[str]) -> int:
    from gradfilter.lab._options import parse
    from gradfilter.lab.report._report_config import ReportConfig

    config = parse(ReportConfig, "gradfilter report", options)
    from gradfilter.lab.report._report import report

    return report(config)


def _runs(options: Sequence[str]) -> int:
    from gradfilter.lab._options import parse
    from gradfilter.lab._runs_config import RunsConfig

    config = parse(RunsConfig, "gradfilter runs", options)
    from gradfilter.lab._list_runs import runs

    return runs(config)


# Each command parses its options before it imports the modules that do the work, so that --help
# and a misspelt option answer fast.
COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "demo": _demo,
    "train": _train,
    "find-lr": _find_lr,
    "stats": _stats,
    "sweep": _sweep,
    "report": _report,
    "runs": _runs,
}
