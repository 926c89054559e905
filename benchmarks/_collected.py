"""Collect the results of all parts on one device in one file; the page is made from this file.

Every script writes its own file with all its results, NAME-cpu.json. Numbers on pages link to these
files, and one script can run again without the others. The file of a device, for example cpu.json
or nvidia-h200.json, is collected from them. For every part it contains the machine, and for every
contender the ratio to the base, the seconds and the memory, each as median and quartiles. It does
not contain single values, minimum and maximum.

The file names of the scripts distinguish a CPU from a GPU, but not one GPU from another. So the
parts of a GPU have a folder with its name, next to the collected file.
"""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks._parts import PARTS

Json = dict[str, Any]
MACHINE = (
    "device", "device_name", "cores", "load", "threads", "torch", "python", "gradfilter", "peers",
    "date",
    "cuda", "cudnn", "capability", "memory_bytes", "tf32_matmul", "tf32_convolution",
)  # fmt: skip
RAW = {"benchmark", "functions", "values", "lines", "validation", "best", "min", "max"}
CELL = ("ratio", "seconds", "peak_bytes", "failure")


def slug(name: str) -> str:
    """Turn a device name into a file name: NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def file_of_device(device: str, device_name: str) -> str:
    """Return the file name of a device. All CPUs share one file, which contains the CPU's name."""
    return f"{'cpu' if device == 'cpu' else slug(device_name)}.json"


def folder_of_parts(out: Path, device: str, device_name: str) -> Path:
    """Return the folder where the parts of a device are written and read."""
    return out if device == "cpu" else out / slug(device_name)


def collect(out: Path, device: str, device_name: str) -> Path:
    """Write the file of a device from the existing parts; parts without a file do not change.

    Returns:
        Its path.
    """
    path = out / file_of_device(device, device_name)
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    folder = folder_of_parts(out, device, device_name)
    for name in PARTS:
        file = folder / f"{name}-{device}.json"
        if file.exists():
            parts[name] = {"file": file.relative_to(out).as_posix()} | shortened(
                json.loads(file.read_text())
            )
    if not parts:
        raise FileNotFoundError(
            f"Expected the results of at least one part in {folder}, found none. Run a part first."
        )
    newest = max((part["machine"] for part in parts.values()), key=lambda facts: facts["date"])
    contents = {
        "device": path.stem,
        "machine": newest,
        "parts": {name: parts[name] for name in PARTS if name in parts},
    }
    path.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n")
    return path


def shortened(contents: Json) -> Json:
    """Return the content of a part's file without single values and extremes."""
    machine = {key: contents[key] for key in MACHINE if key in contents}
    kept = {key: value for key, value in contents.items() if key not in machine}
    if "lines" in contents:  # one per run; only their seeds are kept
        kept |= {"seeds": sorted({line["seed"] for line in contents["lines"]})}
    return {"machine": machine} | _pruned(kept)


def _pruned(node: Any) -> Any:
    if isinstance(node, list):
        return [_pruned(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "seconds" in node and "failure" in node:  # the cell of a contender: the ratio first
        node = {key: node[key] for key in CELL if node.get(key) is not None}
    return {key: _pruned(value) for key, value in node.items() if key not in RAW}
