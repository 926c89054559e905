"""Compare rules with wrong labels, and their cost, each at its own best learning rate.

A network 64-256-256-10 is trained on digits. Every rule uses the same 1500 batches of 80 samples,
eight of every class. The learning rate of a rule is the one with the highest final accuracy on a
validation split (a fifth of the training part, with right labels), over two seeds that are not used
again. Six rates are tried, and more until the best is neither the lowest nor the highest rate. Then
the rule is trained on the whole training part with five other seeds. Accuracies are those after the
last step. "best" is the highest of the 30 evaluations; test labels select it, so it is an upper
bound and not a result. At equal time, a rule stops when plain training has finished; the time of a
step is measured separately, with the rules in turn.

    python benchmarks/label_noise.py                  # the rules at 30 % noise
    python benchmarks/label_noise.py --part default   # one rate for 0, 30 and 50 %, ten seeds
    python benchmarks/label_noise.py --part clean     # plain training at its best rate for 0 %
    python benchmarks/label_noise.py --part one_sam   # SAM along every sample, at 30 % noise
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

if not __package__:  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._machine import machine
from benchmarks._noise_rules import STEPS, Rule, candidates, one_sam, rules
from benchmarks._noise_runs import CPU, EVERY, Done, Task, build_run
from benchmarks._results import write
from gradfilter.lab.train._training import advance

SWEEP_SEEDS = (100, 101)
PARTS = ("rules", "default", "clean", "one_sam")


@dataclass(frozen=True)
class Study:
    """A comparison of rules.

    Attributes:
        name: The name of the file.
        rules: The rules to compare.
        noises: The fractions of wrong labels; a rule has one learning rate for all of them.
        ladder: The learning rates, in increasing order.
        first: The lowest and the highest rate that every rule is tried with.
        seeds: The seeds of the final trainings.
    """

    name: str
    rules: list[Rule]
    noises: tuple[float, ...]
    ladder: tuple[float, ...]
    first: tuple[float, float]
    seeds: tuple[int, ...]

    def finals(self, rule: Rule, rate: float, noise: float) -> list[Task]:
        return [Task(rule.name, rate, noise, seed, False) for seed in self.seeds]


def study(part: str) -> Study:
    """Return the study with a name."""
    one_three = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    one_two_five = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    five, ten, noises = tuple(range(5)), tuple(range(10)), (0.0, 0.3, 0.5)
    studies = (
        Study("label_noise", rules(), (0.3,), one_three, (0.001, 0.3), five),
        Study("default_rule", candidates(), noises, one_two_five, (0.02, 0.2), ten),
        Study("clean_labels", [Rule("plain")], (0.0,), one_two_five, (0.02, 0.2), ten),
        Study("one_sam", one_sam(), (0.3,), one_three, (0.001, 0.3), five),
    )
    return dict(zip(PARTS, studies, strict=True))[part]


Means = dict[float, float]


def sweep(done: Done, chosen: Study, jobs: int) -> dict[str, tuple[float, Means]]:
    """Return for each rule the rate with the best validation accuracy, and all mean accuracies.

    The accuracy is a mean over all noises. If the best rate of a rule is the lowest or the highest
    one tried, one more is tried.
    """
    low, high = (chosen.ladder.index(rate) for rate in chosen.first)
    tried = {rule.name: (low, high) for rule in chosen.rules}
    while True:
        trial = {
            (name, rate): [
                Task(name, rate, noise, seed, True)
                for noise in chosen.noises
                for seed in SWEEP_SEEDS
            ]
            for name, (low, high) in tried.items()
            for rate in chosen.ladder[low : high + 1]
        }
        done.all_of([task for tasks in trial.values() for task in tasks], jobs, "learning rates")
        means: dict[str, Means] = {name: {} for name in tried}
        for (name, rate), tasks in trial.items():
            finals = [done[task]["curve"][-1]["val_accuracy"] for task in tasks]
            means[name][rate] = statistics.mean(finals)
        best = {name: max(found, key=lambda rate: found[rate]) for name, found in means.items()}
        wider = {
            name: (
                max(0, low - (chosen.ladder[low] == best[name])),
                min(len(chosen.ladder) - 1, high + (chosen.ladder[high] == best[name])),
            )
            for name, (low, high) in tried.items()
        }
        if wider == tried:
            return {name: (best[name], means[name]) for name in tried}
        tried = wider


def spread(values: list[float]) -> dict[str, Any]:
    """Return the mean and the sample standard deviation."""
    return {
        "mean": round(statistics.mean(values), 5),
        "sd": round(statistics.stdev(values), 5),
        "values": values,
    }


def summary(curves: list[list[dict[str, float]]], at: int) -> dict[str, Any]:
    """Summarise the results of all seeds after ``at`` steps."""
    index = at // EVERY - 1
    return {
        "steps": (index + 1) * EVERY,
        "final": spread([curve[index]["test_accuracy"] for curve in curves]),
        "best": spread([max(p["test_accuracy"] for p in c[: index + 1]) for c in curves]),
        "clean_train": spread([curve[index]["train_clean_accuracy"] for curve in curves]),
        **(
            {}
            if curves[0][index]["memorised"] is None
            else {"memorised": spread([curve[index]["memorised"] for curve in curves])}
        ),
    }


def step_costs(chosen: list[Rule], rounds: int, steps: int = 10) -> dict[str, float]:
    """Return the milliseconds per step: the median over rounds that run all rules in turn."""
    torch.set_num_threads(1)
    runs = {rule.name: build_run(rule, Task(rule.name, 0.05, 0.3, 0, False)) for rule in chosen}
    for run in runs.values():
        advance(run, steps)
    costs: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            advance(run, run.done + steps)
            costs[name].append((time.perf_counter() - start) / steps * 1e3)
    return {name: statistics.median(values) for name, values in costs.items()}


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, default="rules")
    parser.add_argument(
        "--jobs", type=int, default=2, help="number of processes, each with one thread"
    )
    parser.add_argument("--rounds", type=int, default=40, help="rounds for the time of a step")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--work", type=Path, help="file for finished trainings")
    given = parser.parse_args(args)
    chosen = study(given.part)
    given.out.mkdir(parents=True, exist_ok=True)
    done = Done(given.work or given.out / f".{chosen.name}.jsonl")
    rates = sweep(done, chosen, given.jobs)
    final = [
        task
        for rule in chosen.rules
        for noise in chosen.noises
        for task in chosen.finals(rule, rates[rule.name][0], noise)
    ]
    done.all_of(final, given.jobs, f"{len(chosen.seeds)} seeds")
    costs = step_costs(chosen.rules, given.rounds)
    found = [_found(done, chosen, rule, rates[rule.name], costs) for rule in chosen.rules]
    facts = {
        "benchmark": chosen.name,
        **machine(CPU),
        "steps": STEPS,
        "rates": chosen.ladder,
        "sweep_seeds": SWEEP_SEEDS,
        "seeds": chosen.seeds,
        "noises": chosen.noises,
    }
    write(given.out / f"{chosen.name}-cpu.json", {**facts, "rules": found})
    for noise in chosen.noises:
        Console(width=140).print(_table(found, noise))


def _found(
    done: Done, chosen: Study, rule: Rule, rate: tuple[float, Means], costs: dict[str, float]
) -> dict[str, Any]:
    steps = max(EVERY, min(STEPS, int(STEPS * costs["plain"] / costs[rule.name])))
    by_noise = {}
    for noise in chosen.noises:
        curves = [done[task]["curve"] for task in chosen.finals(rule, rate[0], noise)]
        by_noise[str(noise)] = {
            "equal_samples": summary(curves, STEPS),
            "equal_time": summary(curves, steps),
        }
    return {
        "rule": rule.name,
        "settings": rule.settings,
        "averaged": rule.ema,
        "learning_rate": rate[0],
        "validation": {str(tried): accuracy for tried, accuracy in rate[1].items()},
        "milliseconds_per_step": round(costs[rule.name], 3),
        "noise": by_noise,
    }


def _table(found: list[dict[str, Any]], noise: float) -> Table:
    table = Table(title=f"digits, {100 * noise:g} % of the training labels wrong")
    table.add_column("rule")
    for heading in ("lr", "final %", "best % (oracle)", "memorised %", "at equal time %", "ms"):
        table.add_column(heading, justify="right")
    for line in found:
        same, timed = (line["noise"][str(noise)][k] for k in ("equal_samples", "equal_time"))
        cells = [same["final"], same["best"], same.get("memorised"), timed["final"]]
        table.add_row(
            line["rule"],
            f"{line['learning_rate']:g}",
            *(f"{100 * c['mean']:.1f} ± {100 * c['sd']:.1f}" if c else "-" for c in cells),
            f"{line['milliseconds_per_step']:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
