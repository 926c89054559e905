"""The command `gradfilter report`: its page, its files, and the numbers in them."""

import base64
import io
import math
import statistics

import pytest
from matplotlib import image as mpl_image

import gradfilter as gf
from _report_page import Page, read
from _report_runs import evaluation, make_run, make_stats
from gradfilter.lab.report._report import report
from gradfilter.lab.report._report_config import ReportConfig

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Something for every section."""
    root = tmp_path_factory.mktemp("runs")
    for seed in SEEDS:
        shift = 0.01 * seed
        for noise in (0.0, 0.2):
            for agree in (None, 0.9):
                make_run(
                    root / "noise",
                    seed=seed,
                    label_noise=noise,
                    agree=agree,
                    microbatches=8,
                    offset=shift - noise,
                )
        for size in (32, 1024):
            for agc in (None, 0.01):
                make_run(
                    root / "agc",
                    seed=seed,
                    model="cnn5_8",
                    batch_size=size,
                    agc=agc,
                    offset=shift + (0.1 if agc else 0),
                )
        for gsam in (None, 0.4):
            make_run(root / "sam", seed=seed, model="lenet", sam=0.05, gsam=gsam)
        make_run(root / "sam", seed=seed, model="lenet")
        for width in (4, 8, 16, 32):
            fits = width >= 16 or (width == 8 and seed == 0)
            place = make_run(
                root / "width",
                seed=seed,
                model=f"mlp_{width}",
                epochs=9.0,
                parameters=100 * width,
                evaluations=[evaluation(1), evaluation(4, train_accuracy=1.0 if fits else 0.5)],
            )
            make_stats(place, "jacobian_operator_norm", [3.0 * width, 4.0 * width + seed])
            make_stats(place, "jacobian", [width + 0.125, width + 0.375])
    return root


@pytest.fixture(scope="module")
def out(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "made" / "here"
    assert report(ReportConfig((runs,), out=out)) == 0
    return out


@pytest.fixture(scope="module")
def page(out):
    return Page((out / "index.html").read_text())


# The page


@pytest.mark.slow
def test_every_figure_and_table_is_on_the_page_and_in_files(out, page):
    figures = {path.stem for path in out.glob("*.png")} - {"legend"}
    tables = {path.stem for path in out.glob("*.csv")} - figures
    assert {f"figure-{name}" for name in figures} == set(page.images)
    assert {f"table-{name}" for name in tables} == set(page.tables)
    numbers = {f"{name}.csv" for name in figures | tables}
    assert numbers | {"legend.png"} == set(page.downloads)
    assert {"accuracy", "equal-time", "label-noise", "batch-size", "sharpness", "runs"} <= tables
    for start in (
        "test-accuracy-by-samples",
        "test-accuracy-by-seconds",
        "train-loss-by-samples",
        "train-loss-by-seconds",
        "memorised-by-samples",
        "memorised-by-seconds",
        "accuracy-by-noise",
        "width-mlp-error",
        "width-mlp-lipschitz",
        "width-mlp-jacobian",
        "parameters-mlp-error",
        "batch-size-digits-cnn5_8-test-accuracy",
        "batch-size-digits-cnn5_8-test-loss",
        "batch-size-digits-cnn5_8-seconds-per-epoch",
        "surrogate-gap-by-samples",
        "cosine-by-samples",
        "accepted-by-samples",
        "noise-scale-by-samples",
    ):
        assert any(name.startswith(start) for name in figures), start


def test_the_page_needs_nothing_else(page):
    assert page.targets
    for target in page.targets:
        assert target.startswith(("#", "data:")), target[:80]
        if target.startswith("#"):
            assert target[1:] in page.ids
    assert len(set(page.ids)) == len(page.ids)


def test_what_is_embedded_is_what_is_in_the_files(out, page):
    for name, found in page.images.items():
        content = base64.b64decode(found["src"].removeprefix("data:image/png;base64,"))
        assert content == (out / f"{name.removeprefix('figure-')}.png").read_bytes()
        height, width, _ = mpl_image.imread(io.BytesIO(content), format="png").shape
        assert abs(width - int(found["width"])) <= 1 and abs(height - int(found["height"])) <= 1
        assert len(found["alt"]) > 60 and "nan" not in found["alt"]
    for name, href in page.downloads.items():
        kind = "image/png" if name == "legend.png" else "text/csv"
        content = base64.b64decode(href.removeprefix(f"data:{kind};base64,"))
        assert content == (out / name).read_bytes()


def test_the_page_is_one_style_for_phones_and_for_dark_rooms(out):
    text = (out / "index.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    assert "url(" not in text and "@import" not in text and "<script" not in text


def test_the_page_says_what_made_it(runs, page, out):
    assert f"gradfilter report {runs} --out {out}" in page.text
    assert f"gradfilter {gf.__version__}" in page.text
    assert "gradfilter 1.2.3, torch 4.5.6" in page.text  # of the runs


# The numbers


def test_accuracies_are_means_over_seeds_in_full_precision(out, page):
    table = read(out, "accuracy")
    chosen = table[(table["label_noise"] == 0.2) & (table["agree"] == 0.9)].iloc[0]
    usual = [evaluation(step)["test_accuracy"] for step in range(5)]
    last = [usual[-1] + 0.01 * seed - 0.2 for seed in SEEDS]
    assert chosen["test_accuracy_mean"] == statistics.fmean(last)
    assert chosen["test_accuracy_sd"] == statistics.stdev(last)
    best = [max(usual) + 0.01 * seed - 0.2 for seed in SEEDS]
    assert chosen["best_test_accuracy_mean"] == pytest.approx(statistics.fmean(best), abs=1e-15)
    assert (chosen["runs"], chosen["seeds"], chosen["status"]) == (2, "0 1", "finished")
    heading, *rows = page.tables["table-accuracy"]
    assert heading[:4] == ["setting", "runs", "final test %", "best test % (oracle)"]
    assert len(rows) == len(table)
    row = next(row for row in rows if row[0] == chosen["setting"])
    assert row[1:3] == [
        "2",
        f"{100 * statistics.fmean(last):.1f} ± {100 * statistics.stdev(last):.1f}",
    ]


def test_label_noise_has_a_line_per_rule_and_a_column_per_noise(out, page):
    table = read(out, "label-noise").set_index("rule")
    last = evaluation(4)["test_accuracy"]
    # Runs of other sections have no second noise level.
    assert sorted(table.index) == ["agree 0.9", "plain"]
    for rule in table.index:
        assert table["noise_0_mean"][rule] == pytest.approx(last + 0.005)
        assert table["noise_0.2_mean"][rule] == pytest.approx(last + 0.005 - 0.2)
    assert page.tables["table-label-noise"][0] == ["rule", "0 % wrong", "20 % wrong"]


def test_the_threshold_is_the_first_width_that_every_run_fits(out, page):
    errors = read(out, "width-mlp-error")
    train = errors[errors["line"] == "train error"].set_index("width")
    assert train["error_mean"].to_dict() == {4: 0.5, 8: 0.25, 16: 0.0, 32: 0.0}
    assert "interpolation threshold: 16." in page.images["figure-width-mlp-error"]["alt"]
    assert "interpolation threshold: 1600." in page.images["figure-parameters-mlp-error"]["alt"]
    assert set(read(out, "parameters-mlp-error")["parameters"]) == {400, 800, 1600, 3200}


def test_lipschitz_constants_are_roots_of_mean_squares(out):
    lipschitz = read(out, "width-mlp-lipschitz").set_index("width")
    expected = [math.sqrt(((3 * 16) ** 2 + (4 * 16 + seed) ** 2) / 2) for seed in SEEDS]
    assert lipschitz["lipschitz_mean"][16] == pytest.approx(statistics.fmean(expected), rel=1e-14)
    assert lipschitz["lipschitz_sd"][16] == pytest.approx(statistics.stdev(expected), rel=1e-9)
    jacobian = read(out, "width-mlp-jacobian").set_index("width")
    assert jacobian["jacobian_mean"].to_dict() == {w: w + 0.25 for w in (4, 8, 16, 32)}


def test_agc_is_compared_at_every_batch_size(out):
    accuracy = read(out, "batch-size-digits-cnn5_8-test-accuracy")
    last = evaluation(4)["test_accuracy"] + 0.005
    for label, expected in (("without AGC", last), ("AGC 0.01", last + 0.1)):
        line = accuracy[accuracy["line"] == label]
        assert line["batch_size"].tolist() == [32, 1024]
        assert line["test_accuracy_mean"].tolist() == pytest.approx([expected] * 2)
    seconds = read(out, "batch-size-digits-cnn5_8-seconds-per-epoch")
    assert seconds["seconds_per_epoch_mean"].tolist() == [0.5] * 4


def test_sam_is_compared_with_what_was_tried_on_the_same_task(out):
    table = read(out, "sharpness")
    assert len(table) == 3 and set(table["model"]) == {"lenet"}
    gap = read(out, "surrogate-gap-by-samples")
    assert set(gap["line"]) == {"SAM 0.05", "SAM 0.05, GSAM 0.4"}
