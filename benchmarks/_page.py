"""Write the page of all results, Markdown and charts, from the files of the devices alone."""

import json
import os
from pathlib import Path
from typing import Any

from benchmarks import _tables
from benchmarks._dots import Chart, Dot, Dots, Panel, draw
from benchmarks._gpu_sections import gpu
from benchmarks._section import Section, over
from benchmarks._sections import SECTIONS
from benchmarks._study_sections import STUDIES

Json = dict[str, Any]
PAGE, PICTURES = "benchmarks.md", "pictures"

HEAD = """\
# Benchmarks

Times are ratios to a base, which every section names. In every round each contender runs once, and
the order changes from round to round. The ratios are computed within a round, so a slow drift of
the machine has no effect. A number is the median with its [lower, upper] quartile; below 1 is
faster than the base. In the charts a dot is the median, and the line goes from the lower to the
upper quartile. Results of gradfilter are **bold** and blue. Above each table a list names the
contenders that are faster than ours at the same work. *Load* is the number of programs that were
ready to run when a part started, including those of the part before it.

`python -m benchmarks` measures everything again and writes this page. The numbers are in
{files}.
The command needs the extra `bench` (`pip install -e ".[bench]"` in a clone). `--quick` runs
everything in minutes as a test; its times mean nothing. `--only NAME` measures one part. `--page`
measures nothing and writes the page from the existing files.
"""


def write_page(results: Path, target: Path) -> Path:
    """Write the page about all devices with files in a folder.

    Args:
        results: The folder.
        target: The folder for the page; the charts go into a folder inside it.

    Returns:
        The path of the page.
    """
    text, charts = page(results, target)
    for old in (target / PICTURES).glob("benchmarks-*.svg"):
        old.unlink()
    for name, chart in charts.items():
        draw(chart, target / PICTURES / name)
    path = target / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def page(results: Path, target: Path) -> tuple[str, dict[str, Chart]]:
    """Return the text of the page and its charts by file name, without writing them."""
    devices = [path for path in sorted(results.glob("*.json")) if _is_device(path)]
    away = Path(os.path.relpath(results, target)).as_posix()
    files = " and ".join(f"[`{path.name}`]({away}/{path.name})" for path in devices)
    blocks, charts = [HEAD.format(files=files)], {}
    for path in devices:
        found, drawn = _device(json.loads(path.read_text()), away)
        blocks.append(found)
        charts |= drawn
    return "\n".join(blocks), charts


def _is_device(path: Path) -> bool:
    contents = json.loads(path.read_text())
    return isinstance(contents, dict) and {"device", "machine", "parts"} == contents.keys()


def _device(contents: Json, away: str) -> tuple[str, dict[str, Chart]]:
    """Return the text about one device, and its charts by file name."""
    device, facts, parts = (contents[key] for key in ("device", "machine", "parts"))
    names = dict.fromkeys(part["machine"]["device_name"] for part in parts.values())
    title = " and ".join(names) + (f", {facts['cores']} cores" if device == "cpu" else "")
    blocks, charts = [f"## {title}\n"], {}

    def picture(name: str, alt: str, chart: Chart) -> str:
        file = f"benchmarks-{device}-{name}.svg"
        charts[file] = chart
        return f"![{alt}]({PICTURES}/{file})\n"

    if (chart := summary(parts)) is not None:
        alt = "Time of every contender over one plain forward and backward pass"
        blocks.append(f"{picture('summary', alt, chart)}\n*{alt}. Details are below.*\n")
    if facts.get("peers"):
        versions = ", ".join(f"{name} {version}" for name, version in facts["peers"].items())
        blocks.append(f"Other libraries: {versions}.\n")
    for section in sections(parts):
        files = [parts[name]["file"] for name in section.parts]
        if device != "cpu":  # the files of the parts may be missing
            files = [f"{device}.json"]
        link = [f"[`{file}`]({away}/{file})" for file in files]
        command = f"python -m benchmarks --only {' '.join(section.parts)}"
        command += "" if device == "cpu" else " --device cuda"
        chart = section.chart
        drawn = picture(section.parts[0], section.title, chart) if chart else ""
        about = " · ".join([_machine(parts[section.parts[0]]), *link, f"`{command}`"])
        own = (f"### {section.title}\n", section.text + "\n", drawn, section.table, section.more)
        blocks += [block for block in (*own, about + "\n") if block]
    return "\n".join(blocks), charts


def sections(parts: dict[str, Json]) -> list[Section]:
    """Return the sections of all measured parts, in the order of the questions."""
    with_results = [name for name in SECTIONS if parts.get(name, {}).get("workloads")]
    found = [SECTIONS[name](parts[name]) for name in with_results]
    found += [gpu(parts["gpu"])] if "gpu" in parts else []
    return found + [study(parts) for needs, study in STUDIES.items() if parts.keys() >= set(needs)]


def _machine(part: Json) -> str:
    """Describe the machine, the date and the number of rounds of a part."""
    facts = part["machine"]
    contests = part.get("workloads", [])
    days = sorted({measured["date"][:10] for measured in contests or [facts]})
    rounds = sorted({measured["rounds"] for measured in contests or [part] if "rounds" in measured})
    said = [facts["device_name"], _threads(facts["threads"]), f"torch {facts['torch']}"]
    said += [f"CUDA {facts['cuda']}"] if "cuda" in facts else []
    tf32 = [name for name in ("matmul", "convolution") if facts.get(f"tf32_{name}")]
    said += [f"TF32 in {' and '.join(tf32)}"] if tf32 else []
    said += [f"load {facts['load']:.1f}"] if "load" in facts else []
    said += [f"{_reach(rounds)} rounds"] if rounds else []
    said += [_reach(days)] + (
        ["**a quick run: its times mean nothing**"] if part.get("quick") else []
    )
    return ", ".join(said)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _reach(values: list[Any]) -> str:
    return f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"


def summary(parts: dict[str, Json]) -> Dots | None:
    """Chart the time of every contender over plain, on models that both parts measured."""
    rows, samples = (
        {c["model"]: c for c in parts.get(name, {}).get("workloads", [])[::-1]}
        for name in ("fused_vs_looped", "per_sample")
    )  # [::-1]: of several sizes the first is used
    drawn = [
        Panel(model["title"], _everybody(rows[name], model))
        for name, model in reversed(samples.items())
        if name in rows
    ]
    return Dots(drawn, 2, over("plain")) if drawn else None


def _everybody(rows: Json, samples: Json) -> list[Dot]:
    m, b = rows["microbatches"], rows["samples_per_microbatch"]
    dots = [Dot(f"{m} rows of {b} samples, filtered", None, note="")]
    for name, cell in rows["results"].items():
        if name != "plain":
            ours = name.startswith("fused")
            dots.append(_tables.dot(f"gradfilter, {name}" if ours else name, cell, ours))
    for question in ("norms", "consensus", "rows"):
        dots.append(Dot(f"single samples: {question}", None, note=""))
        for name, cell in samples["results"].items():
            library, _, asked = name.partition(": ")
            if asked == question:
                dots.append(_tables.dot(library, cell, library == "gradfilter"))
    return dots
