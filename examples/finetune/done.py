"""Trainings that are finished, in a file from which a study resumes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loop import evaluate, train
from setting import Setting


class Done:
    """Finished trainings, in a file with a line for each."""

    def __init__(self, path: Path) -> None:
        """Read the file, if there is one."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.found = {_key(each["setting"]): each for each in map(json.loads, lines)}

    def __call__(self, setting: Setting) -> dict[str, Any]:
        """Return the curve and the last validation accuracy of a setting; train if necessary."""
        key = _key(asdict(setting))
        if key not in self.found:
            self.found[key] = {"setting": asdict(setting), **trained(setting)}
            with self.path.open("a") as file:
                file.write(json.dumps(self.found[key]) + "\n")
            print(f"{len(self.found)} trainings, the last: {key}", flush=True)
        return self.found[key]


def _key(setting: dict[str, Any]) -> str:
    return json.dumps(setting, sort_keys=True)


def trained(setting: Setting) -> dict[str, Any]:
    """Train in this process; return the numbers over the steps."""
    data = setting.load()
    model = setting.model(data)
    lines = []
    for line, params in train(setting, data, model):
        lines.append({name: value for name, value in line.items() if name != "seconds"})
        last = params
    curve = {name: [round(line[name], 5) for line in lines] for name in lines[0]}
    return {"curve": curve, "validation": evaluate(model, last, data.validation)[1]}
