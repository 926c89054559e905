"""Several trainings: their groups, means and bands, and figures that are readable."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from _report_runs import evaluation, make_run
from gradfilter.lab.report._figures import facets, shortlist
from gradfilter.lab.report._runs import DEFAULTS, RecordedRun, read_runs
from gradfilter.lab.report._settings import (
    at_time,
    band,
    differing,
    grouped_by_all_but,
    groups_of,
    mean_and_sd,
    points,
)

NUMBER = st.floats(-10, 10)


def run_of(**columns):
    return RecordedRun(None, "finished", DEFAULTS, math.nan, {}, pd.DataFrame(columns), ())


def groups_in(*dirs):
    runs, skipped = read_runs(dirs)
    assert not skipped
    return groups_of(runs)


# Numbers


@given(st.lists(NUMBER, max_size=6))
def test_spread_is_mean_and_sample_deviation_of_what_is_finite(values):
    found = mean_and_sd([*values, math.nan, math.inf])
    assert found.runs == len(values)
    if values:
        assert found.mean == pytest.approx(statistics.fmean(values))
    else:
        assert math.isnan(found.mean)
    if len(values) > 1:
        assert found.sd == pytest.approx(statistics.stdev(values), abs=1e-12)
    else:
        assert math.isnan(found.sd)


@given(st.lists(st.lists(NUMBER, min_size=4, max_size=4), min_size=1, max_size=5))
def test_a_band_at_equal_places_interpolates_nothing(values):
    x = [0.0, 1.0, 5.0, 6.0]
    found = band([run_of(samples=x, y=own) for own in values], "samples", "y")
    assert found["x"].tolist() == x
    np.testing.assert_allclose(found["mean"], np.mean(values, axis=0), atol=1e-12)
    if len(values) > 1:
        np.testing.assert_allclose(found["sd"], np.std(values, axis=0, ddof=1), atol=1e-12)
    else:
        assert found["sd"].isna().all()
    assert (found["runs"] == len(values)).all()


def test_a_band_goes_over_the_places_that_all_runs_have():
    one = run_of(seconds=[1.0, 3.0, 4.0], y=[0.0, 2.0, 9.0])
    two = run_of(seconds=[0.0, 2.0, 3.5], y=[10.0, 12.0, math.nan])  # ends at 2
    found = band([one, two, run_of(seconds=[1.0], y=[math.nan])], "seconds", "y")
    assert found["x"].tolist() == [1.0, 2.0]
    assert found["mean"].tolist() == [(0 + 11) / 2, (1 + 12) / 2]
    assert found["runs"].tolist() == [2, 2]
    apart = run_of(seconds=[7.0], y=[1.0])
    assert not len(band([one, apart], "seconds", "y"))
    assert not len(band([run_of(seconds=[1.0], y=[math.nan])], "seconds", "y"))


@given(st.lists(st.floats(0, 5), min_size=1, max_size=6, unique=True), st.floats(0, 5))
def test_at_equal_time_the_last_evaluation_counts_that_was_made_by_then(seconds, limit):
    seconds = sorted(seconds)
    run = run_of(seconds=seconds, y=[10.0 + i for i in range(len(seconds))])
    by_then = [i for i, second in enumerate(seconds) if second <= limit]
    found = at_time(run, limit, "y")
    assert found == 10.0 + by_then[-1] if by_then else math.isnan(found)


# Groups


def test_runs_that_differ_in_seeds_are_one_group_and_others_are_not(tmp_path):
    for seed in range(3):
        make_run(tmp_path, seed=seed, model="mlp_16")
        make_run(tmp_path, seed=seed, model="mlp_8", agree=0.9)
    make_run(tmp_path, seed=0, label_seed=7, data_split_seed=3, model="mlp_16")
    make_run(tmp_path, seed=9, model="mlp_16", status="interrupted")
    groups, doubles = groups_in(tmp_path)
    assert not doubles
    assert [(group.label(), len(group.runs)) for group in groups] == [
        ("mlp_8, agree 0.9", 3),
        ("mlp_16", 4),
        ("mlp_16 (unfinished)", 1),
    ]
    assert differing(groups) == ["model", "agree"]
    assert groups[0].label(["model"]) == "mlp_8"
    assert groups[1].label(["agree"]) == "plain"


def test_how_a_run_was_watched_does_not_matter_but_its_device_does(tmp_path):
    make_run(tmp_path, seed=0)
    make_run(tmp_path, seed=1, eval_every=2.0, workers=2, resume=True, tensorboard=True)
    make_run(tmp_path, seed=2, device="cuda:1")
    groups, _ = groups_in(tmp_path)
    assert [[run.settings["seed"] for run in group.runs] for group in groups] == [[0, 1], [2]]


def test_a_name_tells_only_those_apart_that_are_otherwise_the_same(tmp_path):
    make_run(tmp_path / "a", name="trial-1", seed=0)
    make_run(tmp_path / "a", name="trial-2", seed=1)
    assert len(groups_in(tmp_path / "a")[0]) == 1
    make_run(tmp_path / "a", name="again", seed=1)
    groups, doubles = groups_in(tmp_path / "a")
    assert not doubles
    assert sorted(group.label() for group in groups) == [
        "name again",
        "name trial-1",
        "name trial-2",
    ]


def test_a_run_counts_once_and_a_copy_of_it_is_named(tmp_path):
    first = make_run(tmp_path / "a", seed=0)
    copy = make_run(tmp_path / "b", seed=0)
    groups, doubles = groups_in(tmp_path, tmp_path / "a", tmp_path)
    assert [len(group.runs) for group in groups] == [1]
    assert len(doubles) == 1 and str(first) in doubles[0] and str(copy) in doubles[0]


def test_groups_come_in_the_order_of_their_numbers(tmp_path):
    for batch_size in (1024, 32, 256):
        make_run(tmp_path, batch_size=batch_size, agc=0.1)
        make_run(tmp_path, batch_size=batch_size)
    groups, _ = groups_in(tmp_path)
    assert [group.label() for group in groups] == [
        f"batch size {n}{agc}" for n in (32, 256, 1024) for agc in ("", ", AGC 0.1")
    ]
    pairs = grouped_by_all_but(groups, "agc")
    assert [[group.settings["agc"] for group in pair] for pair in pairs] == [[None, 0.1]] * 3


def test_points_are_in_order_and_without_holes(tmp_path):
    for size, accuracy in ((64, 0.5), (32, 0.25), (128, math.nan)):
        for seed in (0, 1):
            make_run(
                tmp_path,
                seed=seed,
                batch_size=size,
                evaluations=[evaluation(1, test_accuracy=accuracy + 0.1 * seed)],
            )
    groups, _ = groups_in(tmp_path)
    found = points(groups, lambda g: g.settings["batch_size"], lambda r: r.last("test_accuracy"))
    assert found["x"].tolist() == [32, 64]
    assert found["mean"].tolist() == pytest.approx([0.3, 0.55])
    assert found["sd"].tolist() == pytest.approx([math.sqrt(0.005)] * 2)


# Figures that can be read


@given(
    st.lists(
        st.fixed_dictionaries({"model": st.sampled_from("abc"), "agc": st.integers(0, 9)}),
        max_size=30,
    ),
    st.integers(1, 8),
)
def test_every_curve_is_in_exactly_one_figure_and_none_has_too_many(settings, most):
    found = facets(settings, most)
    members = [member for facet in found for member in facet.members]
    assert sorted(members) == list(range(len(settings)))
    assert all(len(facet.members) <= most for facet in found)
    assert len({facet.suffix for facet in found}) == len(found)
    for facet in found:
        for name in ("model", "agc"):
            values = {settings[member][name] for member in facet.members}
            assert (name in facet.names) == (len(values) > 1)


def test_a_family_of_single_curves_shares_a_figure():
    family = [{"model": f"mlp_{2**i}"} for i in range(7)]
    assert len(facets(family)) == 1
    rules = [{"noise": noise, "rule": rule} for noise in (0, 0.2, 0.4) for rule in range(3)]
    assert [facet.members for facet in facets(rules)] == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
    uneven = [{"noise": 0, "rule": 0}]
    uneven += [{"noise": noise, "rule": rule} for noise in (1, 2) for rule in range(5)]
    assert [len(facet.members) for facet in facets(uneven)] == [1, 5, 5]


def test_of_too_many_curves_those_are_drawn_that_validation_prefers(tmp_path):
    for place, accuracy in enumerate((0.1, 0.3, 0.2)):
        made = [evaluation(1, val_accuracy=accuracy, test_accuracy=1 - accuracy)]
        make_run(tmp_path, learning_rate=0.1 + place, evaluations=made)
    groups, _ = groups_in(tmp_path)
    assert shortlist(groups, most=3) == (groups, [])
    kept, why = shortlist(groups, most=2)
    assert kept == groups[1:] and why[0].startswith("Not drawn: 1 more settings")
    make_run(tmp_path, learning_rate=9.0, evaluations=[evaluation(1, val_accuracy=math.nan)])
    groups, _ = groups_in(tmp_path)
    assert shortlist(groups, most=2)[0] == groups[:2]


def test_no_number_is_told_from_zero():
    assert mean_and_sd([]).shown() == "–"
    assert mean_and_sd([0.0]).shown(digits=2) == "0.00"
    assert replace(run_of(step=[1.0]), status="running").finished is False
