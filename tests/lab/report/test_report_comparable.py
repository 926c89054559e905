"""Only comparable trainings are averaged, drawn together, or shown as one number."""

import json
import math

import pytest
from test_settings import run_of

from _report_page import Page, read
from _report_runs import STEPS, evaluation, make_run, make_stats, sparse
from gradfilter.lab.report._curves import draw_against
from gradfilter.lab.report._figures import Curve, Mark, PlotAxis, plot
from gradfilter.lab.report._legend import Legend, Line, style_number
from gradfilter.lab.report._report_config import ReportConfig
from gradfilter.lab.report._runs import read_runs, usual_variant
from gradfilter.lab.report._settings import Setting, band, groups_of, points
from gradfilter.lab.train._run_place import METRICS

ONE = [sparse(STEPS)]


def labels(folder):
    groups, _ = groups_of(read_runs([folder])[0])
    return {group.label(): len(group.runs) for group in groups}


def written(folder):
    assert report_of(folder) == 0
    return Page((folder / "report" / "index.html").read_text())


def report_of(folder):
    from gradfilter.lab.report._report import report

    return report(ReportConfig((folder,)))


# Groups


def test_which_of_several_gpus_it_was_splits_no_seeds(tmp_path):
    for seed in range(4):
        make_run(tmp_path, seed=seed, device=f"cuda:{seed % 2}", evaluations=ONE)
    make_run(tmp_path, seed=0, name="on the processor", evaluations=ONE)
    assert labels(tmp_path) == {"plain": 1, "device cuda": 4}


def test_a_run_begun_again_under_a_name_splits_no_other_setting(tmp_path):
    for model in ("mlp_4", "mlp_8"):
        for seed in range(3):
            make_run(tmp_path, model=model, seed=seed, name=f"night-{seed}", evaluations=ONE)
    make_run(tmp_path, model="mlp_4", seed=0, name="broken", status="interrupted", evaluations=ONE)
    assert labels(tmp_path) == {"mlp_4": 3, "mlp_8": 3, "mlp_4 (unfinished)": 1}
    make_run(tmp_path, model="mlp_4", seed=0, name="again", evaluations=ONE)
    found = labels(tmp_path)
    assert found.pop("mlp_8") == 3 and found.pop("mlp_4 (unfinished)") == 1
    assert found == {
        f"mlp_4, name {name}": 1 for name in ("again", *map("night-{}".format, range(3)))
    }


def test_when_checkpoints_are_saved_is_no_setting(tmp_path):
    make_run(tmp_path, seed=0, save_checkpoint=(1.0,), evaluations=ONE)
    make_run(tmp_path, seed=1, evaluations=ONE)
    assert labels(tmp_path) == {"plain": 2}


def test_the_length_is_said_in_the_unit_it_was_given_in(tmp_path):
    make_run(tmp_path, steps=20, evaluations=ONE)
    text = written(tmp_path).text
    assert "steps 20" in text and "epochs 50" not in text


# Numbers


def test_a_seed_that_diverged_is_counted(tmp_path):
    for seed, loss in enumerate((0.5, math.nan, math.nan)):
        make_run(tmp_path, seed=seed, evaluations=[sparse(STEPS, test_accuracy=loss)])
    assert "50.0 (1 of 3)" in written(tmp_path).text


def test_a_curve_of_fewer_runs_than_the_setting_has_says_so(tmp_path):
    for seed in range(2):
        numbers = {"memorised": math.nan} if seed else {"memorised": 0.5}
        made = [evaluation(step, **numbers) for step in range(3)]
        make_run(tmp_path, seed=seed, label_noise=0.3, evaluations=made)
    assert "Only some runs have this number: plain" in written(tmp_path).text


def test_a_band_has_gaps_where_a_run_was_evaluated_and_had_no_number():
    one = run_of(samples=[0, 100, 200, 300], y=[1.0, math.nan, 3.0, 4.0])
    two = run_of(samples=[0, 100, 200, 300], y=[3.0, 9.0, 5.0, 6.0])
    found = band([one, two], "samples", "y")
    assert found["x"].tolist() == [0, 200, 300]
    assert found["mean"].tolist() == [2, 4, 5]
    late = run_of(samples=[50, 150, 250], y=[0.0, 0.0, 0.0])
    assert band([one, late], "samples", "y")["x"].tolist() == [200, 250]


def test_small_numbers_are_not_shown_as_zero(tmp_path):
    place = make_run(tmp_path, evaluations=ONE)
    make_stats(place, "loss_gradient", [2e-7, 4e-7])
    assert "3e-07" in written(tmp_path).text


def test_noise_scales_are_the_quotient_of_means_that_stats_wrote(tmp_path):
    place = make_run(tmp_path, microbatches=2, evaluations=ONE)
    columns = ["mean_pairwise_cosine", "simple_noise_scale", "noise_trace", "gradient_sq_norm"]
    values = [[0.1, 10.0, 1.0, 0.4], [0.1, None, 3.0, 0.0]]
    settings = {"batch_size": 64, "microbatches": 8}
    make_stats(place, "agreement", values, columns=columns, **settings)
    written(tmp_path)
    table = read(tmp_path / "report", "measurements").set_index("column")
    assert table["mean_mean"]["simple_noise_scale"] == pytest.approx(8 * 2.0 / 0.2)
    assert table["mean_mean"]["noise_trace"] == 2.0


# Measurements


def test_different_steps_are_not_averaged(tmp_path):
    for seed, (step, value) in enumerate(((1, 6.0), (STEPS, 1.5))):
        place = make_run(tmp_path, seed=seed, evaluations=[sparse(0), sparse(1), sparse(STEPS)])
        make_stats(place, "loss_gradient", [value], step=step)
    assert "no step was measured in all of its runs" in written(tmp_path).text
    assert not (tmp_path / "report" / "measurements.csv").exists()


def test_runs_that_ended_early_are_compared_at_their_ends(tmp_path):
    for seed, step in enumerate((2, STEPS)):
        place = make_run(tmp_path, seed=seed, evaluations=[sparse(0), sparse(step)])
        make_stats(place, "loss_gradient", [float(step)], step=step)
    written(tmp_path)
    (mean,) = read(tmp_path / "report", "measurements")["mean_mean"]
    assert mean == (2 + STEPS) / 2


def test_what_was_measured_in_another_way_is_not_mixed_in(tmp_path):
    for seed in range(3):
        place = make_run(tmp_path, seed=seed, sam=0.05, evaluations=ONE)
        own = {"rho": 0.5} if seed == 1 else {}
        columns = ["sharpness", "hessian_top", "hessian_trace"]
        make_stats(place, "sharpness", [[1.0 + 99 * (seed == 1)] * 3], columns=columns, **own)
    runs, _ = read_runs([tmp_path])
    assert usual_variant(runs, "sharpness", "train") == "sharpness-train"
    assert usual_variant(runs, "jacobian", "train") == ""
    text = written(tmp_path).text
    assert "1 ± 0 (2 of 3)" in text
    table = read(tmp_path / "report", "sharpness")
    assert table["sharpness_mean"][0] == 1.0 and table["sharpness_runs"][0] == 2


def test_a_prefix_of_the_files_does_not_join_two_splits(tmp_path):
    place = make_run(tmp_path, evaluations=ONE)
    path = make_stats(place, "loss_gradient", [1.0])
    document = json.loads(path.read_text())
    for split in ("train", "test"):
        document["metadata"]["settings"]["dataset_split"] = split
        stem = f"best-checkpoint-a-loss_gradient-{split}-checkpoint-1-id-0-1"
        path.with_name(f"{stem}.json").write_text(json.dumps(document))
    path.unlink()
    (run,), _ = read_runs([tmp_path])
    assert {measure.split for measure in run.measures} == {"train", "test"}


def test_equal_time_is_that_of_one_model(tmp_path):
    for agc in (None, 0.1):
        for model, last in (("mlp_4", 0.04), ("mlp_64", 400.0)):
            made = [sparse(step, seconds=last * step / STEPS) for step in range(STEPS + 1)]
            make_run(tmp_path, model=model, agc=agc, evaluations=made)
    text = written(tmp_path).text
    assert "At equal time: 0.04 s" in text and "At equal time: 400 s" in text


# Files and figures


def test_two_folders_of_images_have_figures_of_their_own(tmp_path):
    for data in ("folder:/a/$cats^$", "folder:/b/dogs"):
        for size in (32, 64):
            make_run(tmp_path, data=data, batch_size=size, agc=0.1, evaluations=ONE)
            make_run(tmp_path, data=data, batch_size=size, evaluations=ONE)
    assert "folder:/a/$cats^$" in written(tmp_path).text
    figures = {path.stem for path in (tmp_path / "report").glob("batch-size-*.png")}
    assert {name for name in figures if name.endswith("test-loss")} == {
        "batch-size-folder-mlp_256-test-loss",
        "batch-size-folder-2-mlp_256-test-loss",
    }


def test_a_last_line_that_a_kill_cut_off_costs_no_more_than_itself(tmp_path):
    place = make_run(tmp_path, evaluations=[sparse(1), sparse(2)], status="running")
    with (place / METRICS).open("a") as file:
        file.write('{"step": 3, "lo')
    (run,), skipped = read_runs([tmp_path])
    assert run.metrics["step"].tolist() == [1, 2]
    assert len(skipped) == 1 and "last line is cut off" in skipped[0]


def test_metrics_without_a_record_are_missed(tmp_path):
    (make_run(tmp_path, seed=0, evaluations=ONE) / "config.json").unlink()
    make_run(tmp_path, seed=1, evaluations=ONE)
    _, skipped = read_runs([tmp_path])
    assert len(skipped) == 1 and "no config.json" in skipped[0] and "seed-0" in skipped[0]


@pytest.mark.parametrize("content", ['{"metadata": []}', "[]", '{"metadata": {"axes": 1}}'])
def test_numbers_that_are_none_are_named(tmp_path, content):
    place = make_run(tmp_path, evaluations=ONE)
    (place / "stats").mkdir()
    (place / "stats" / "odd.json").write_text(content)
    (run,), skipped = read_runs([tmp_path])
    assert not run.measures and len(skipped) == 1 and "odd.json" in skipped[0]


def test_a_report_that_was_killed_at_once_can_be_made_again(tmp_path):
    make_run(tmp_path, evaluations=ONE)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / ".report.json.part").write_text("{")
    assert report_of(tmp_path) == 0


def test_many_widths_have_ticks_that_can_be_read_and_marks_their_family_s_colour():
    groups = [type("Group", (), {"runs": [run_of(y=[1.0])], "at": w})() for w in range(1, 65)]
    data = points(groups, lambda group: group.at, lambda run: run.last("y"))
    line, legend = Line("one", "one"), Legend()
    drawn = plot(
        "w",
        "W",
        [Curve("one", data, line)],
        PlotAxis("w", "w", log=2),
        PlotAxis("y", "y"),
        legend=legend,
        marks={"m": Mark(8.0, line)},
    )
    assert drawn.png and "m: 8." in drawn.alt and "m at 8" in drawn.note
    assert legend.drawn(line) == style_number(0)


def test_a_quantity_that_is_zero_everywhere_has_no_figure_on_a_logarithmic_axis():
    group = Setting({}, (run_of(samples=[0.0, 1.0, 2.0], y=[0.0, 0.0, 0.0]),), True)
    axes = PlotAxis("y", "y", log=10), PlotAxis("samples", "samples")
    drawn = draw_against([group], "y", "Y", *axes, "by-samples", "over samples", legend=Legend())
    assert drawn == []
