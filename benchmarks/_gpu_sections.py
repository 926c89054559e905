"""The section of the page about measurements that need a GPU."""

from typing import Any

from benchmarks._dots import Dots
from benchmarks._section import Section, over
from benchmarks._tables import by_contender, by_contest, markdown, panels

Json = dict[str, Any]


def gpu(part: Json) -> Section:
    cases = part["cases"]
    plans = [_named(case) for case in cases.values() if "gram_difference" in case]
    steps = ("captured-", "compiled-", "sam-rows-", "checkpointed-")
    captured = [case for name, case in cases.items() if name.startswith(steps)]
    captured = [case for case in captured if "results" in case]
    tables = [by_contest(plans, "plain", _ours)] if plans else []
    tables += [by_contender(captured, "plain", _ours)] if captured else []
    failed = {name: case["failure"] for name, case in cases.items() if "failure" in case}
    tables += [f"- none for {name}: `{why}`\n" for name, why in failed.items()]
    contests = [*plans, *captured]
    return Section(
        "Large models, captured steps, waits and convolutions",
        ("gpu",),
        "Measured: the time of plans and whole steps on large models, in float32 and with bfloat16 "
        "autocast. Also a step of `train_step` that launches every kernel, and the same step as "
        "one CUDA graph (`gradfilter.capture`) and compiled (`gradfilter.compile`), SAM along the "
        "mean gradient and along that of each row, and models with activation checkpointing. The "
        "base is one plain forward and backward pass.",
        "\n".join(tables),
        Dots(panels(contests, "plain", _ours), 2, over("plain")) if contests else None,
        "\n".join(filter(None, [_waits(cases), _convolutions(cases.get("conv", {}))])),
    )


def _ours(name: str) -> bool:
    return name.startswith(("fused", "captured", "compiled", "auto"))


def _named(case: Json) -> Json:
    return {**case, "title": case["title"] + (", bfloat16" if case["bf16"] else "")}


def _waits(cases: Json) -> str:
    """Show whether a step makes the host wait."""
    found = {name: case for name, case in cases.items() if "waits" in case}
    if not found:
        return ""
    rows = [
        [name.removeprefix("waits-"), f"yes, in {case['where']}" if case["waits"] else "no"]
        for name, case in found.items()
    ]
    return markdown(["model", "does a step wait for the device?"], rows)


def _convolutions(case: Json) -> str:
    """Count how often each route to the weight gradients of a convolution is the fastest."""
    found = {key: layers for key, layers in case.items() if isinstance(layers, list)}
    if not found:
        return ""
    routes = list(
        dict.fromkeys(route for ls in found.values() for x in ls for route in x["routes"])
    )
    rows = [
        [key, *(str(sum(layer["fastest"] == route for layer in layers)) for route in routes)]
        for key, layers in found.items()
    ]
    return markdown(["number of convolutions with the fastest route", *routes], rows)
