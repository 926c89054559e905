"""Measure training steps of a language model of 124 million parameters; the base is a plain step.

The model is GPT-2 small from its configuration, with random weights, on M = 8 sequences of 256
tokens, one row per sequence. A plain step is forward pass, backward pass and ``torch.optim.SGD``
with momentum; ours is the same with `Filtered` and a chain, plan "fused". The filters reject
nothing, and clipping clips every row. Three settings: all parameters with a memory budget of 2 GB,
the same with activation checkpoints (whose default budget is 0), and LoRA of rank 8 on all linear
layers. In addition to the bytes allocated in one step, the peak of the resident memory is measured
in a fresh process each, with everything in it: torch, the weights, the momentum, and what
malloc keeps after a free. That is for a plain step and for clipping.

    python benchmarks/language.py
"""

import functools
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Without this the memory profiler prints a line at every start. torch reads it when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

if not __package__:  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gradfilter as gf
from benchmarks._command import caption, facts, parser, rounds_of
from benchmarks._race import race
from benchmarks._report import table
from benchmarks._results import Workload, earlier, save
from benchmarks._setting import THRESHOLD
from benchmarks._timing import Contender
from gradfilter.interop import Filtered

NAME = Path(__file__).stem
ROWS, LENGTH, BUDGET, RANK = 8, 256, 2 * 10**9, 8
SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 512}  # with --quick
STEPS = 2  # of a fresh process; both also look for a hidden state
LEARN = 8  # passes; the first, second, fourth and eighth look for a hidden state

CHAINS = {
    "clip_per_row, mean": gf.chain(gf.clip_per_row(1.0), gf.mean_rows()),
    "consensus": gf.consensus_filter(),
    "agreement": gf.agree_filter(THRESHOLD),
}
CLIP = "clip_per_row, mean"
TITLES = {
    "gpt2": "GPT-2 small, 124 M, T = 256",
    "gpt2-checkpoints": "GPT-2 small, activation checkpoints",
    "gpt2-lora": f"GPT-2 small, LoRA of rank {RANK}",
}
CONTENDERS = {
    "gpt2": ("plain", *CHAINS),
    "gpt2-checkpoints": ("plain", CLIP),
    "gpt2-lora": ("plain", *CHAINS),
}


def language_model(name: str, quick: bool) -> nn.Module:
    """Return GPT-2 from its configuration, as one of the three settings wants it."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        **(SMALL if quick else {}),
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model: Any = transformers.GPT2LMHeadModel(config).train()
    if name == "gpt2-checkpoints":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if name == "gpt2-lora":
        import peft

        layers = ["c_attn", "c_proj", "c_fc"]
        lora = peft.LoraConfig(r=RANK, target_modules=layers, fan_in_fan_out=True)
        model = peft.get_peft_model(model, lora)
    return model


def sequences(quick: bool) -> dict[str, Tensor]:
    """Return M sequences of random tokens; the labels are the tokens."""
    torch.manual_seed(1)
    words = SMALL["vocab_size"] if quick else 50257
    ids = torch.randint(words, (ROWS, 16 if quick else LENGTH))
    return {"input_ids": ids, "labels": ids}


Step = Callable[[dict[str, Tensor]], None]


def steps_of(name: str, quick: bool, device: torch.device) -> tuple[dict[str, Step], Any]:
    """Return the steps of all contenders, and a batch.

    The learning rate is 0, so that all of them can share the model and its momentum.
    """
    model = language_model(name, quick).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9)

    def plain(batch: dict[str, Tensor]) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def filtered(chain: gf.Transform, budget: int | None) -> Step:
        wrapper = Filtered(model, None, chain, optimizer, ROWS, plan="fused", memory_budget=budget)

        def step(batch: dict[str, Tensor]) -> None:
            wrapper.step(batch)
            optimizer.zero_grad()

        return step

    given = None if name == "gpt2-checkpoints" else BUDGET
    steps = {each: filtered(chain, given) for each, chain in CHAINS.items()}
    steps["plain"] = plain
    batch = {key: t.to(device) for key, t in sequences(quick).items()}
    return {each: steps[each] for each in CONTENDERS[name]}, batch


def resident_bytes(name: str, each: str, quick: bool) -> int:
    """Return the peak of the resident memory of this process after some steps of a contender."""
    steps, batch = steps_of(name, quick, torch.device("cpu"))
    for _ in range(STEPS):
        steps[each](batch)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def resident_of_both(name: str, quick: bool) -> dict[str, int]:
    """Return the peak of the resident memory of a plain step and of ours, in fresh processes."""
    found = {}
    for each in ("plain", CLIP):
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            found[each] = fresh.apply(resident_bytes, (name, each, quick))
    return found


def measure(name: str, rounds: int, quick: bool, device: torch.device) -> Workload:
    steps, batch = steps_of(name, quick, device)
    short = {key: value[:, :8] for key, value in batch.items()}
    for step in steps.values():
        for _ in range(LEARN):  # on small batches, because they are passes like any others
            step(short)
    entrants: dict[str, Contender] = {
        each: functools.partial(step, batch) for each, step in steps.items()
    }
    results, _ = race(entrants, rounds, device, base="plain", warmup=0)  # they have run
    return Workload(
        model=name,
        title=TITLES[name],
        parameters=sum(p.numel() for p in language_model(name, quick).parameters()),
        results=results,
        microbatches=ROWS,
        samples_per_microbatch=1,
    )


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, TITLES, rounds=5).parse_args(arguments)
    device = torch.device(options.device)
    head = facts(NAME, options)
    target = options.out / f"{NAME}-{device.type}.json"
    workloads = []
    resident = dict(earlier(target, head).get("resident_bytes", {}))
    for name in track(options.models, "Measuring", console=Console(stderr=True)):
        workloads.append(measure(name, rounds_of(options), options.quick, device))
        save(target, {**head, "resident_bytes": resident}, workloads)
        if device.type == "cpu":
            resident[name] = resident_of_both(name, options.quick)
            save(target, {**head, "resident_bytes": resident}, workloads)
    for workload in workloads:
        table([workload], CONTENDERS[workload.model][1:], caption(head), title="Over a plain step")
    for name, found in resident.items():
        for each, size in found.items():
            Console().print(f"{name}, {each}: {size / 1e9:.2f} GB resident at most")


if __name__ == "__main__":
    main()
