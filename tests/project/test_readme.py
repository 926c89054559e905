"""The README is short, its loop runs, and its test command is that of CI."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import gradfilter as gf

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TRANSFORMS = (ROOT / "docs" / "transforms.md").read_text()


def test_the_readme_is_read_in_a_minute():
    assert len(README.splitlines()) <= 120
    assert len(README.split()) <= 1000


def loop(sign):
    """Return the loop before (``-``) or after (``+``) the change that the README shows."""
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    return "".join(line[1:] for line in diff.splitlines(True) if line[0] in (" ", sign))


def trained(code):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    loader = [(torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 3) for _ in range(4)]
    scope = {"__name__": __name__, "torch": torch, "model": model, "loader": loader}
    scope["criterion"] = nn.functional.cross_entropy
    exec(compile(code, "README.md", "exec"), scope)
    return [p.detach() for p in model.parameters()], scope


def test_the_loop_is_an_ordinary_one_before_the_change():
    assert "gf" not in trained(loop("-"))[1]
    same = loop("+").replace("gf.budget_clip()", "gf.clip_per_row(1e9)")  # bounds nothing
    torch.testing.assert_close(trained(same)[0], trained(loop("-"))[0])


def test_the_loop_is_filtered_after_the_change():
    after, scope = trained(loop("+"))
    info = scope["filtered"].step(*scope["loader"][0]).info
    assert info["budget_clip/norm"].shape == (12,)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(after, trained(loop("-"))[0])


def test_the_change_is_as_small_as_its_heading_says():
    (diff,) = re.findall(r"## Four lines for three\n.*?```diff\n(.*?)```", README, re.DOTALL)
    signs = [line[0] for line in diff.splitlines()]
    assert (signs.count("+"), signs.count("-")) == (4, 3)


def test_every_transform_is_in_the_table():
    names = {
        name
        for name, thing in ((name, getattr(gf, name)) for name in gf.__all__)
        if inspect.isfunction(thing) and inspect.signature(thing).return_annotation == "Transform"
    }
    table = "\n".join(line for line in TRANSFORMS.splitlines() if line.startswith("| "))
    missing = {name for name in names if not re.search(rf"`{name}\b", table)}
    assert missing == {"chain"}  # which the table is about
    assert "(docs/transforms.md)" in README


def test_every_transform_of_the_families_exists():
    table = README.split("## Transforms")[1].split("## When not")[0]
    known = {*dir(gf), *dir(gf.distributed), "torch.optim"}
    assert set(re.findall(r"`([\w.]+)`", table)) <= known


def test_the_two_commands_are_there_and_ci_runs_the_second():
    first, second = re.findall(r"^```\n(pip install .*)\n```$", README, re.MULTILINE)
    assert first == 'pip install -e ".[lab]" && gradfilter demo'
    assert second == 'pip install -e ".[dev]" && pytest -n auto'
    gate = (ROOT / ".ci" / "run").read_text()
    assert f"\n{{ {second}; }} 2>&1 | tee" in gate  # as it is, not cut out of this file
    assert "README.md" not in gate


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        if not target.startswith("../../actions/"):  # the page of the workflow is not a file
            assert (ROOT / target).exists(), target


def test_links_to_headings_lead_somewhere():
    for page, anchor in re.findall(r"\]\(([^)#]+\.md)#([^)]+)\)", README):
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
        assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, anchor
