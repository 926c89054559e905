"""One colour and one dash pattern per setting on the whole page, one legend, and ordered tables."""

import html
import math
import re

import numpy as np
import pytest
from matplotlib import colors
from matplotlib import image as mpl_image

from _report_page import Page, read
from _report_runs import evaluation, make_run
from gradfilter.lab.report._legend import COLOURS, Legend, Line, style_number
from gradfilter.lab.report._parts import Column, Row, table
from gradfilter.lab.report._report import report
from gradfilter.lab.report._report_config import ReportConfig

SWATCH = (
    r'<svg class="swatch".*?(?:stroke|fill)="(#\w+)"(?:.*?stroke-dasharray="([^"]*)")?.*?</svg>'
)


def written(folder):
    assert report(ReportConfig((folder,))) == 0
    return (folder / "report" / "index.html").read_text()


def legend_of(text):
    """Colour and dashes by label, for every line of the legend."""
    (legend,) = re.findall(r'<details class="legend".*?</details>', text, re.DOTALL)
    found = re.findall(rf"<li title=\"[^\"]*\">{SWATCH}(.*?)</li>", legend, re.DOTALL)
    looks = {html.unescape(label): (colour, dashes) for colour, dashes, label in found}
    assert len(looks) == len(found) == legend.count("<li ")
    return looks


def colours_in(path):
    """The colours of the legend that a picture contains, without the black of its text."""
    pixels = np.unique(mpl_image.imread(path)[..., :3].reshape(-1, 3), axis=0)
    return {
        c for c in COLOURS[:-1] if (abs(pixels - np.array(colors.to_rgb(c))) < 2e-3).all(1).any()
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four settings, of which two filter, and two of which are measured less."""
    root = tmp_path_factory.mktemp("runs")
    for noise in (0.0, 0.2):
        for agree in (None, 0.9):
            level = 0.9 if agree else 0.4
            numbers = {"accepted": level - noise, "memorised": level if noise else math.nan}
            numbers["test_accuracy"] = level + noise / 2
            made = [evaluation(step, **numbers) for step in range(3)]
            make_run(root, label_noise=noise, agree=agree, microbatches=8, evaluations=made)
    return root


@pytest.fixture(scope="module")
def text(runs):
    return written(runs)


def test_the_page_has_one_legend_with_every_line_once(text):
    looks = legend_of(text)
    settings = [f"label noise {noise}{rule}" for noise in ("0", "0.2") for rule in RULES]
    assert list(looks) == [*settings, "plain", "agree 0.9"]
    assert len(set(looks.values())) == len(looks)
    assert Page(text).legends == 1


RULES = ("", ", agree 0.9")


def test_a_setting_has_one_colour_in_all_figures(runs, text):
    looks = legend_of(text)
    wanted = {
        # The filters alone, and the settings with wrong labels alone: not the first colours.
        "accepted-by-samples": {"label noise 0, agree 0.9", "label noise 0.2, agree 0.9"},
        "memorised-by-samples": {"label noise 0.2", "label noise 0.2, agree 0.9"},
        "test-accuracy-by-seconds": {f"label noise {n}{r}" for n in ("0", "0.2") for r in RULES},
        "accuracy-by-noise": {"plain", "agree 0.9"},
    }
    for name, labels in wanted.items():
        drawn = colours_in(runs / "report" / f"{name}.png")
        assert drawn == {looks[label][0] for label in labels}, name
    assert colours_in(runs / "report" / "legend.png") == {colour for colour, _ in looks.values()}


def test_the_rows_of_tables_have_the_swatch_of_the_legend(text):
    looks = legend_of(text)
    for name, column in (("accuracy", 0), ("runs", 0), ("label-noise", 0)):
        (part,) = re.findall(rf'<figure id="table-{name}">.*?</figure>', text, re.DOTALL)
        found = re.findall(rf'<span class="named">{SWATCH}(.*?)</span>', part, re.DOTALL)
        labels = [row[column] for row in Page(text).tables[f"table-{name}"][1:]]
        assert [label for _, _, label in found] == labels
        assert all(looks[label] == (colour, dashes) for colour, dashes, label in found)


def test_figures_have_one_size_because_they_hold_no_legend(text):
    assert len({(found["width"], found["height"]) for found in Page(text).images.values()}) == 1


def test_dashes_of_widths_mean_the_split_and_the_note_says_so(tmp_path):
    for width in (4, 8, 16):
        accuracy = {"train_accuracy": 1.0 if width == 16 else 0.5}
        make_run(tmp_path, model=f"mlp_{width}", evaluations=[evaluation(4, **accuracy)])
    text = written(tmp_path)
    assert "Solid: test error. Dashed: train error." in text
    assert "Vertical line: interpolation threshold at 16." in text
    looks = legend_of(text)
    assert list(looks)[-1] == "mlp_K" and not looks["mlp_K"][1]
    assert looks["mlp_K"][0] in colours_in(tmp_path / "report" / "width-mlp-error.png")


def test_the_first_196_styles_differ_and_the_first_seven_in_colour_and_in_dashes():
    styles = [style_number(number) for number in range(196)]
    assert len(set(styles)) == 196
    assert len({style.colour for style in styles[:7]}) == 7
    assert len({style.dashes for style in styles[:7]}) == 7


def test_a_line_keeps_its_style_whoever_asks_and_has_none_before():
    legend, lines = Legend(), [Line(number, str(number)) for number in range(3)]
    assert legend.drawn(lines[1]) is None and legend.drawn(None) is None
    assert legend.style(lines[1]) == style_number(0)
    assert legend.style(lines[0]) == style_number(1)
    assert legend.style(Line(1, "another label")) == legend.drawn(lines[1]) == style_number(0)
    assert legend.drawn(lines[2]) is None


# Order of tables, and the best


def accuracies(test, validation, **more):
    return evaluation(4, test_accuracy=test, val_accuracy=validation, **more)


def test_tables_are_ordered_by_validation_and_mark_the_best_of_every_column(tmp_path):
    made = {0.1: (0.5, 0.8, 0.3), 0.2: (0.9, 0.6, 0.1), 0.3: (0.7, 0.7, 0.2)}
    for rate, (test, validation, memorised) in made.items():
        found = [accuracies(test, validation, memorised=memorised)]
        make_run(tmp_path, learning_rate=rate, label_noise=0.2, evaluations=found)
    page = Page(written(tmp_path))
    heading, *rows = page.tables["table-accuracy"]
    assert [row[0] for row in rows] == [f"learning rate {rate}" for rate in (0.1, 0.3, 0.2)]
    assert list(read(tmp_path / "report", "accuracy")["learning_rate"]) == [0.1, 0.3, 0.2]
    best = {heading[column]: rows[row - 1][0] for row, column in page.best["table-accuracy"]}
    assert best == {
        "final test %": "learning rate 0.2",
        "validation %": "learning rate 0.1",
        "memorised %": "learning rate 0.2",  # the lowest
    }  # nothing of the oracle, and nothing of columns where all are equal
    assert "Ordered by validation %. Bold: the best of a column." in page.text


def test_without_validation_everywhere_the_order_is_that_of_the_test_split(tmp_path):
    for rate, test, validation in ((0.1, 0.5, 0.8), (0.2, 0.9, math.nan), (0.3, 0.7, 0.7)):
        make_run(tmp_path, learning_rate=rate, evaluations=[accuracies(test, validation)])
    page = Page(written(tmp_path))
    assert [row[0][-3:] for row in page.tables["table-accuracy"][1:]] == ["0.2", "0.3", "0.1"]
    assert "Ordered by final test %." in page.text


def test_what_is_unfinished_or_diverged_is_last_and_never_the_best(tmp_path):
    make_run(tmp_path, agree=0.9, microbatches=2, evaluations=[accuracies(0.5, 0.5)])
    make_run(tmp_path, microbatches=2, evaluations=[accuracies(0.4, 0.4)])
    make_run(tmp_path, agree=0.8, microbatches=2, status="running", evaluations=[accuracies(1, 1)])
    for seed, found in enumerate((0.95, math.nan)):
        made = [accuracies(found, found)]
        make_run(tmp_path, agree=0.7, microbatches=2, seed=seed, evaluations=made)
    page = Page(written(tmp_path))
    labels = [row[0] for row in page.tables["table-accuracy"][1:]]
    assert labels == ["agree 0.9", "plain", "agree 0.7", "agree 0.8 (unfinished)"]
    assert {row for row, _ in page.best["table-accuracy"]} == {1}


def test_settings_of_different_noise_do_not_compete(tmp_path):
    for noise, agree, accuracy in (
        (0.0, None, 0.9),
        (0.0, 0.9, 0.8),
        (0.2, None, 0.5),
        (0.2, 0.9, 0.6),
    ):
        found = [accuracies(accuracy, accuracy)]
        make_run(tmp_path, label_noise=noise, agree=agree, microbatches=2, evaluations=found)
    page = Page(written(tmp_path))
    labels = [row[0] for row in page.tables["table-accuracy"][1:]]
    assert labels == [
        *("label noise 0", "label noise 0, agree 0.9"),
        *("label noise 0.2, agree 0.9", "label noise 0.2"),
    ]
    assert {row for row, _ in page.best["table-accuracy"]} == {1, 3}
    assert "within each data set and label noise" in page.text


def best_cells(page, name):
    """The first cell and the heading of every cell of a table that is marked as the best."""
    heading, *rows = page.tables[name]
    return {(rows[row - 1][0], heading[column]) for row, column in page.best[name]}


def test_rules_of_different_data_sets_do_not_compete_over_label_noise(tmp_path):
    made = {"digits": {None: 0.9, 0.9: 0.8}, "moons": {None: 0.5, 0.9: 0.6}}
    for data, rules in made.items():
        for agree, accuracy in rules.items():
            for noise in (0.0, 0.2):
                found = [accuracies(accuracy - noise, accuracy)]
                rule = {"data": data, "agree": agree, "label_noise": noise, "microbatches": 2}
                make_run(tmp_path, evaluations=found, **rule)
    page = Page(written(tmp_path))
    labels = [row[0] for row in page.tables["table-label-noise"][1:]]
    assert labels == ["digits", "digits, agree 0.9", "moons, agree 0.9", "moons"]
    columns = ("0 % wrong", "20 % wrong")
    wanted = {(rule, column) for rule in (labels[0], labels[2]) for column in columns}
    assert best_cells(page, "table-label-noise") == wanted
    assert (
        "Ordered by the mean of the columns within each data set. "
        "Bold: the best of a column within each data set."
    ) in page.text


def test_rules_of_one_data_set_are_ordered_over_the_whole_table(text):
    page = Page(text)
    assert [row[0] for row in page.tables["table-label-noise"][1:]] == ["agree 0.9", "plain"]
    assert "Ordered by the mean of the columns. Bold: the best of a column." in page.text


def test_a_training_that_diverged_is_last_and_never_the_best(tmp_path):
    # A network of NaN predicts the first class: no wrong label is memorised, and on few images the
    # accuracy may be the highest.
    made = {0.1: (0.5, 0.4, 0.3), 0.2: (0.6, 0.3, 0.4), 90.0: (0.7, 0.0, math.nan)}
    for rate, (accuracy, memorised, last) in made.items():
        found = [accuracies(accuracy, accuracy, memorised=memorised, train_loss=last)]
        make_run(tmp_path, learning_rate=rate, label_noise=0.2, evaluations=found)
    page = Page(written(tmp_path))
    for name in ("accuracy", "equal-time"):
        labels = [row[0] for row in page.tables[f"table-{name}"][1:]]
        assert labels == [f"learning rate {rate}" for rate in (0.2, 0.1, 90)], name
        assert {label for label, _ in best_cells(page, f"table-{name}")} == {labels[0]}, name


def test_a_rule_that_diverged_at_one_noise_is_not_the_best_there(tmp_path):
    for agree, high, last in ((None, 0.5, 1.0), (0.8, 0.4, 1.0), (0.9, 0.8, math.nan)):
        for noise, accuracy, loss in ((0.0, 0.9 if agree == 0.9 else 0.6, 1.0), (0.2, high, last)):
            found = [accuracies(accuracy, accuracy, train_loss=loss)]
            rule = {"agree": agree, "label_noise": noise, "microbatches": 2}
            make_run(tmp_path, evaluations=found, **rule)
    page = Page(written(tmp_path))
    labels = [row[0] for row in page.tables["table-label-noise"][1:]]
    assert labels == ["plain", "agree 0.8", "agree 0.9"]
    wanted = {("agree 0.9", "0 % wrong"), ("plain", "20 % wrong")}
    assert best_cells(page, "table-label-noise") == wanted


def test_the_shortest_training_is_not_the_best_because_it_has_fewer_steps(tmp_path):
    for epochs in (1, 2):
        found = [accuracies(epochs / 4, epochs / 4, epoch=float(epochs), seconds=float(epochs))]
        make_run(tmp_path, epochs=epochs, sam=0.1, evaluations=found)
    page = Page(written(tmp_path))
    for name in ("accuracy", "sharpness"):
        assert "seconds" in page.tables[f"table-{name}"][0]
        headings = {heading for _, heading in best_cells(page, f"table-{name}")}
        assert "final test %" in headings and "seconds" not in headings, name


def test_a_training_without_a_step_is_not_the_best_at_equal_time(tmp_path):
    for rate, seconds, first in ((0.1, 1.0, 0.1), (0.2, 1.0, 0.2), (0.3, 4.0, 0.3)):
        # The slow one was evaluated before its first step and at its end alone.
        made = [
            evaluation(0, test_accuracy=first, val_accuracy=first, seconds=0.0),
            accuracies(rate / 2, rate / 2, seconds=seconds),
        ]
        make_run(tmp_path, learning_rate=rate, evaluations=made)
    page = Page(written(tmp_path))
    heading, *rows = page.tables["table-equal-time"]
    assert [row[0] for row in rows] == [f"learning rate {rate}" for rate in (0.2, 0.1, 0.3)]
    assert [row[heading.index("samples seen")] for row in rows] == ["400", "400", "0"]
    best = best_cells(page, "table-equal-time")
    assert ("learning rate 0.2", "test %") in best
    assert "learning rate 0.3" not in {label for label, _ in best}


def test_one_line_and_equal_lines_have_no_best():
    column = Column("y", "y", 1.0, better="lowest")
    for values in ([[1.0]], [[1.0], [1.0]]):
        shown = table("t", "T", [column], [Row("r", {}, [v]) for v in values])
        assert all(not row.best for row in shown.rows)
    shown = table("t", "T", [column], [Row("r", {}, [[v]]) for v in (3.0, 1.0, 2.0)])
    assert [set(row.best) for row in shown.rows] == [set(), {1}, set()]


# Hover text


def test_the_hover_text_has_all_options_and_the_name_only_those_that_differ(text):
    page = Page(text)
    (hover,) = {h for h in page.hover["table-accuracy"] if "0.2" in h and "agree" in h}
    assert hover == (
        "digits, mlp_256, label noise 0.2, epochs 50, batch size 80, microbatches 8, sgd, "
        "learning rate 0.05, agree 0.9; seeds: 0"
    )
    assert "label noise 0.2, agree 0.9" in {row[0] for row in page.tables["table-accuracy"]}


def test_hostile_names_are_text_in_the_hover_text_too(tmp_path):
    hostile = '"><script>alert(1)</script><b title="'
    for data in (f"folder:{hostile}", "digits"):
        make_run(tmp_path, data=data, evaluations=[evaluation(1)])
    text = written(tmp_path)
    assert hostile not in text and "<script" not in text
    page = Page(text)
    assert any(hostile in hover for hover in page.hover["table-accuracy"])
    assert any(hostile in hover for hover in page.hover[None])  # of the legend
    assert f"folder:{hostile}" in {row[0] for row in page.tables["table-accuracy"]}
