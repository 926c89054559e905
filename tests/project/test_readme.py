"""The README's code runs, its table of links is complete, and its commands are what CI runs."""

import inspect
import re
from pathlib import Path

import torch
import torch.distributed as dist

import gradfilter as gf
from _world import World

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_examples_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in BLOCKS if not block.startswith("# torchrun")]
    assert len(blocks) == 5
    scope = {"__name__": __name__}  # of this project: their warnings are errors
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert (tmp_path / "run.pt").exists()
    assert {"keep", "loss", "agree_filter/accepted", "agc_clip/clipped_fraction", "sgd/lr"} <= set(
        scope["info"]
    )
    batch = scope["loader"][0]
    _, info = scope["per_sample"](scope["per_sample"].init(scope["model"]), batch)
    assert info["consensus_filter/accepted"].shape == (64,)
    rows = scope["grads_of"](scope["params"], batch)
    sharp = scope["sharp"]
    assert (
        "sam_perturb/surrogate_gap" in sharp(scope["params"], sharp.init(scope["params"]), rows)[2]
    )


def on_ranks(blocks):
    """What a rank of its own would run, where the process group is there already."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(dist.get_rank())  # as under torchrun: another model, other samples
    scope = {"__name__": __name__}  # of this project: their warnings are errors
    for block in blocks:
        code = block.replace("dist.init_process_group()", "assert dist.is_initialized()")
        exec(compile(code, "README.md", "exec"), scope)
    return [p.detach().tolist() for p in scope["model"].parameters()], bool(scope["out"]["keep"])


def test_the_examples_of_several_ranks_run_on_two(tmp_path, monkeypatch):
    first = [block for block in BLOCKS if not block.startswith("# torchrun")]
    blocks = [first[0], first[3], *(block for block in BLOCKS if block not in first)]
    assert len(blocks) == 4
    world = World(2)
    try:
        ours, theirs = world.run(on_ranks, blocks)
    finally:
        world.close()
    assert ours == theirs  # parameters and decision


def test_every_link_is_in_the_table():
    links = {
        name
        for name, thing in vars(gf).items()
        if inspect.isfunction(thing) and inspect.signature(thing).return_annotation == "Transform"
    }
    table = README.split("## Links")[1].split("## Keep your loop")[0]
    missing = {name for name in links if not re.search(rf"`{name}\b", table)}
    assert missing == set()


def test_the_two_commands_are_there_and_ci_runs_the_second():
    assert 'pip install -e ".[lab]" && gradfilter demo' in README
    assert 'pip install -e ".[dev]" && pytest -n auto' in README
    assert r'pip install -e "\.\[dev\]" && pytest -n auto' in (ROOT / ".ci" / "run").read_text()


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        if not target.startswith("../../actions/"):  # the workflow's page, beside the files
            assert (ROOT / target).exists(), target
