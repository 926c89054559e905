"""Run directories like those of `gradfilter train` and `gradfilter stats`, without training."""

import json
import math
from dataclasses import fields

from gradfilter.lab.stats._stats_files import StatsRecord, document, write
from gradfilter.lab.train._evaluation import Evaluation
from gradfilter.lab.train._run_place import METRICS, place_of, plain_settings
from gradfilter.lab.train._train_config import TrainConfig

STEPS = 4


def evaluation(step, **numbers):
    """Make an evaluation with different numbers in every field and step."""
    usual = {
        field.name: (0.01 * place + 0.07 * step) % 1
        for place, field in enumerate(fields(Evaluation))
    }
    usual |= {"step": step, "epoch": float(step), "samples": 100 * step, "seconds": 0.5 * step}
    usual |= {"skipped": 0, "peak_memory": 1000}
    return usual | numbers


def sparse(step, **numbers):
    """Make an evaluation with few figures, for tests of other parts."""
    return evaluation(step, **{"memorised": math.nan, "train_loss": math.nan} | numbers)


def make_run(root, *, evaluations=None, status="finished", parameters=10, offset=0.0, **settings):
    """Write a run; ``offset`` is added to its accuracies so that seeds differ."""
    config = TrainConfig(save_dir=root, **settings)
    place = place_of(config)
    place.mkdir(parents=True)
    record = {
        "command": "train",
        "status": status,
        "settings": plain_settings(config),
        "batch_size": config.batch_size or 80,
        "parameters": parameters,
        "versions": {"gradfilter": "1.2.3", "torch": "4.5.6"},
    }
    (place / "config.json").write_text(json.dumps(record))
    if evaluations is None:
        evaluations = [evaluation(step) for step in range(STEPS + 1)]
    lines = []
    for found in evaluations:
        moved = {n: v + offset if n.endswith("accuracy") and v else v for n, v in found.items()}
        plain = {
            n: None if isinstance(v, float) and not math.isfinite(v) else v
            for n, v in moved.items()
        }
        lines.append(json.dumps(plain))
    (place / METRICS).write_text("".join(f"{line}\n" for line in lines))
    return place


def make_stats(place, metric, values, *, step=STEPS, targets=None, columns=None, **settings):
    """Write a file of measurements next to a run."""
    count = len(values)
    targets = targets or [0] * count
    origin = {
        "command": "stats",
        "settings": {
            "metric": metric,
            "dataset_split": "train",
            "gen_strategy": "none",
            **settings,
        },
        "columns": columns or [metric],
        "axes": ["batch", "column"] if columns else ["sample"],
        "checkpoint": {"id": 1, "step": step, "epoch": float(step)},
    }
    stats = [list(v) if columns else v for v in values]
    record = StatsRecord(0, count, list(range(count)), targets, [0] * count, stats)
    folder = place / "stats"
    folder.mkdir(exist_ok=True)
    words = "-".join(str(v) for v in settings.values())
    stem = f"{metric}-train{words and f'-{words}'}-checkpoint-1-id-0-{count}"
    path = folder / f"{stem}.json"
    write(path, document([record], origin))
    return path
