"""Which rules help against wrong labels, and what they cost, each at its own best learning rate.

On digits, a network 64-256-256-10 sees the same 1500 batches of 80 samples under every rule, eight
samples of every class. The learning rate of a rule is the one with the highest final accuracy on a
validation split (a fifth of the training part, true labels) over two seeds that are not used again;
then it is trained on the whole training part with five other seeds. Accuracies are those of the
last step; "best" is the highest of the 30 evaluations, picked with the test labels, so an upper
bound and no result. At equal time a rule stops where plain training is at its end; the cost of a
step is measured apart, the rules taking turns.

    python benchmarks/label_noise.py                  # the rules at 30 % noise
    python benchmarks/label_noise.py --part default   # one rule for 0, 30 and 50 %
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

if not __package__:  # run as a file: make the folder around it the package it is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._machine import machine
from benchmarks._noise_rules import STEPS, Rule, candidates, rules
from benchmarks._noise_runs import EVERY, Done, Task, begun
from benchmarks._results import write
from gradfilter.lab.train._run import advance

RATES = (0.01, 0.03, 0.1, 0.3)
AsWritten = argparse.RawDescriptionHelpFormatter
SWEEP_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)
NOISES = {"rules": (0.3,), "default": (0.0, 0.3, 0.5)}
NAMES = {"rules": "label_noise", "default": "default_rule"}


def best_rate(done: Done, rule: Rule, noises: tuple[float, ...]) -> tuple[float, dict[str, float]]:
    """The rate of the highest validation accuracy, over all noises, and those of all rates."""
    means = {
        str(rate): statistics.mean(
            done[Task(rule.name, rate, noise, seed, True)]["curve"][-1]["val_accuracy"]
            for noise in noises
            for seed in SWEEP_SEEDS
        )
        for rate in RATES
    }
    return float(max(means, key=lambda rate: means[rate])), means


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and sample deviation."""
    return {
        "mean": round(statistics.mean(values), 5),
        "sd": round(statistics.stdev(values), 5),
        "values": values,
    }


def summary(curves: list[list[dict[str, float]]], at: int) -> dict[str, Any]:
    """Numbers of all seeds after ``at`` steps."""
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
    """Milliseconds of a step: the median over rounds in which all rules take turns."""
    torch.set_num_threads(1)
    runs = {rule.name: begun(rule, Task(rule.name, 0.05, 0.3, 0, False)) for rule in chosen}
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
    parser.add_argument("--part", choices=list(NOISES), default="rules")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--rounds", type=int, default=40, help="of the step costs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--work", type=Path, help="where finished trainings are kept")
    given = parser.parse_args(args)
    name, noises = NAMES[given.part], NOISES[given.part]
    given.out.mkdir(parents=True, exist_ok=True)
    done = Done(given.work or given.out / f".{name}.jsonl")
    chosen = rules() if given.part == "rules" else candidates()
    sweep = [
        Task(rule.name, rate, noise, seed, True)
        for rule in chosen
        for rate in RATES
        for noise in noises
        for seed in SWEEP_SEEDS
    ]
    done.all_of(sweep, given.jobs, "learning rates")
    rates = {rule.name: best_rate(done, rule, noises) for rule in chosen}
    final = [
        Task(rule.name, rates[rule.name][0], noise, seed, False)
        for rule in chosen
        for noise in noises
        for seed in SEEDS
    ]
    done.all_of(final, given.jobs, "five seeds")
    costs = step_costs(chosen, given.rounds)
    found = [_found(done, rule, rates[rule.name], noises, costs) for rule in chosen]
    facts = {
        "benchmark": name,
        **machine(torch.device("cpu")),
        "steps": STEPS,
        "rates": RATES,
        "sweep_seeds": SWEEP_SEEDS,
        "seeds": SEEDS,
        "noises": noises,
    }
    write(given.out / f"{name}-cpu.json", {**facts, "rules": found})
    for noise in noises:
        Console(width=140).print(_table(found, noise))


def _found(
    done: Done,
    rule: Rule,
    rate: tuple[float, dict[str, float]],
    noises: tuple[float, ...],
    costs: dict[str, float],
) -> dict[str, Any]:
    by_noise = {}
    for noise in noises:
        curves = [done[Task(rule.name, rate[0], noise, s, False)]["curve"] for s in SEEDS]
        steps = max(EVERY, min(STEPS, int(STEPS * costs["plain"] / costs[rule.name])))
        by_noise[str(noise)] = {
            "equal_samples": summary(curves, STEPS),
            "equal_time": summary(curves, steps),
        }
    return {
        "rule": rule.name,
        "settings": rule.settings,
        "learning_rate": rate[0],
        "validation": rate[1],
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
