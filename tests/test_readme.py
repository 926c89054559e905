"""The README's code runs, its table of links is complete, and its commands are what CI runs."""

import inspect
import re
from pathlib import Path

import gradfilter as gf

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_examples_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    scope = {}
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


def test_every_link_is_in_the_table():
    links = {
        name
        for name, thing in vars(gf).items()
        if inspect.isfunction(thing) and inspect.signature(thing).return_annotation == "Transform"
    }
    table = README.split("## Links")[1].split("## Coming from")[0]
    missing = {name for name in links if not re.search(rf"`{name}\b", table)}
    assert missing == set()


def test_the_two_commands_are_there_and_ci_runs_the_second():
    assert 'pip install -e ".[lab]" && gradfilter demo' in README
    assert 'pip install -e ".[dev]" && pytest' in README
    assert r'pip install -e "\.\[dev\]" && pytest' in (ROOT / ".ci" / "run").read_text()


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
