"""One file with what all parts measured on one device: what the page is made of.

Every script writes a file of its own, NAME-cpu.json, with all it knows. Those files are the
source: numbers elsewhere link to them, and one script can be run again without the others. The
file of a device, cpu.json or nvidia-h200.json, is collected from them and is never measured by
itself. It keeps of every part the machine, and of every contender the ratio to the base, then
seconds and memory, as median and quartiles; what is left out are single values and extremes.

The scripts' file names tell a CPU from a GPU, but not one GPU from another. So a GPU's parts have
a folder named after it, next to the collected file.
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
RAW = {"benchmark", "values", "lines", "validation", "best", "min", "max"}
CELL = ("ratio", "seconds", "peak_bytes", "failure")


def slug(name: str) -> str:
    """NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def file_of_device(device: str, device_name: str) -> str:
    """All CPUs share one file: which one it was stands in it."""
    return f"{'cpu' if device == 'cpu' else slug(device_name)}.json"


def folder_of_parts(out: Path, device: str, device_name: str) -> Path:
    """Where the parts of a device are written, and looked for."""
    return out if device == "cpu" else out / slug(device_name)


def collect(out: Path, device: str, device_name: str) -> Path:
    """Write the file of a device anew from the parts that are there; the others stay in it.

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
        raise FileNotFoundError(f"No part has results in {folder}. Run one first.")
    newest = max((part["machine"] for part in parts.values()), key=lambda facts: facts["date"])
    contents = {
        "device": path.stem,
        "machine": newest,
        "parts": {name: parts[name] for name in PARTS if name in parts},
    }
    path.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n")
    return path


def shortened(contents: Json) -> Json:
    """What is kept of a part's file."""
    machine = {key: contents[key] for key in MACHINE if key in contents}
    kept = {key: value for key, value in contents.items() if key not in machine}
    if "lines" in contents:  # one per run, which are left out
        kept |= {"seeds": sorted({line["seed"] for line in contents["lines"]})}
    return {"machine": machine} | _pruned(kept)


def _pruned(node: Any) -> Any:
    if isinstance(node, list):
        return [_pruned(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "seconds" in node and "failure" in node:  # a contender's cell: the ratio first
        node = {key: node[key] for key in CELL if node.get(key) is not None}
    return {key: _pruned(value) for key, value in node.items() if key not in RAW}
