"""Reprs of public objects, and the public names of the package."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradfilter as gf
from _models import vectors


class Forbidden(TorchDispatchMode):
    """Fails at any use of a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was run")


def shown(thing):
    with Forbidden():
        return repr(thing)


def test_a_transform_shows_its_arguments_by_name_and_a_chain_its_transforms():
    assert shown(gf.agree_filter(0.97)) == "agree_filter(threshold=0.97)"
    assert shown(gf.mean_rows()) == "mean_rows()"
    update = gf.chain(gf.agree_filter(0.97), gf.agc_clip(0.01), gf.sgd(0.1))
    text = "chain(agree_filter(threshold=0.97), agc_clip(clipping=0.01), sgd(lr=0.1))"
    assert shown(update) == str(update) == text
    assert shown(gf.named("head", gf.chain(gf.mean_rows(), gf.sgd(0.1)))) == (
        "named(name='head', transform=chain(mean_rows(), sgd(lr=0.1)))"
    )
    assert shown(gf.partition({"all": gf.adam(betas=(0.8, 0.9))}, starts_with_a)) == (
        "partition(branches={'all': adam(betas=(0.8, 0.9))}, label=starts_with_a)"
    )


def test_schedules_and_what_they_drive_show_their_arguments():
    lr = gf.schedules.cosine(0.1, 1000, warmup_steps=10)
    assert shown(lr) == "cosine(max_value=0.1, total_steps=1000, warmup_steps=10)"
    assert shown(gf.scheduled(gf.agc_clip, clipping=gf.schedules.linear(0.1, 5))) == (
        "scheduled(agc_clip, clipping=linear(max_value=0.1, total_steps=5))"
    )


def test_values_of_tensors_are_not_shown():
    assert shown(gf.sgd(torch.tensor(0.1))) == "sgd(lr=tensor of shape ())"


def test_what_was_changed_since_it_was_made_shows_its_kinds():
    changed = replace(gf.agc_clip(0.01), name="mine")
    assert shown(changed) == "<mine: tree -> tree>"


def starts_with_a(name):
    return "all"


@pytest.mark.parametrize("plan, name", [("fused", "FusedStack"), ("loop", "ComputedDenseStack")])
def test_a_stack_shows_how_much_it_holds(plan, name):
    model, batch = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), vectors(8)
    params, _ = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    rows = gf.microbatch_grads(loss, 8, plan=plan)(params, batch)
    assert shown(rows) == f"{name}(8 rows, 4 leaves)"
    assert shown(rows.first(1)) == f"{name}(1 row, 4 leaves)"
    assert shown(rows.columns(["0.bias"])) == f"{name}(8 rows, 1 leaf)"
    rows.gram()
    rows.release()
    assert shown(rows.scaled(torch.ones(8))) == f"{name}(8 rows, 4 leaves)"
    assert "tensor" not in shown(rows.origin)


PARTS = {"diagnostics", "distributed", "interop", "testing"}


def test_parts_are_imported_when_they_are_first_asked_for():
    code = f"""
import sys
from pathlib import Path
import gradfilter as gf
parts = {sorted(PARTS)}
loaded = lambda: [name for name in parts if "gradfilter." + name in sys.modules]
assert loaded() == [], loaded()
assert set(parts) <= set(dir(gf)) and loaded() == []
assert gf.interop.Filtered and "gradfilter.interop" in sys.modules
assert "interop" in vars(gf)
assert gf.testing.check_laws and gf.diagnostics.hessian_top and gf.distributed.across_ranks
from gradfilter import *
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_nothing_is_imported_before_a_name_is_asked_for():
    code = f"""
import pickle, sys
import gradfilter as gf
assert "torch" not in sys.modules and gf.__version__ and "sgd" in dir(gf)
sgd = gf.sgd
assert "torch" in sys.modules
assert {{*gf.__all__}} - {{*vars(gf)}} <= {PARTS}
assert gf.sgd is sgd and pickle.loads(pickle.dumps(gf.chain)) is gf.chain
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="module 'gradfilter' has no attribute 'agree'"):
        _ = gf.agree
    assert not hasattr(gf, "nonsense")
    assert "import_module" not in dir(gf)


def test_nothing_is_shown_but_the_public_names():
    assert dir(gf) == sorted(gf.__all__) and len(set(gf.__all__)) == len(gf.__all__)
    assert all(hasattr(gf, name) for name in gf.__all__)
    assert not [name for name in dir(gf) if name.startswith("_") and name != "__version__"]
    assert set(dir(gf)) >= PARTS | {"GradStack", "Params", "Plan", "Schedule", "Tree"}
    code = Path(gf.__file__).read_text() + Path(gf.__file__).with_name("_public.py").read_text()
    names = re.findall(r"import \w+ as (\w+)$", code, re.MULTILINE)
    assert sorted([*names, "__version__"]) == sorted([*gf.__all__, "_import_module"])


def test_a_transform_is_made_by_one_function_with_two_names():
    assert gf.transform is gf.link and gf.transform.__name__ == "transform"
