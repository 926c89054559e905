"""Build the sections training curves, and agreement of rows."""

from __future__ import annotations

from collections.abc import Sequence

from gradfilter.lab.report._figures import Curve, PlotAxis, facets, plot, shortlist
from gradfilter.lab.report._legend import Legend, line_of
from gradfilter.lab.report._parts import Plot, Section
from gradfilter.lab.report._settings import Setting, band

# --- Curves against samples seen and against time ---


SAMPLES = PlotAxis("training samples seen", "samples")
SECONDS = PlotAxis("seconds of training steps", "seconds")
QUANTITIES = {
    "test_accuracy": ("Test accuracy", PlotAxis("test accuracy (%)", "test_accuracy", 100)),
    "train_loss": ("Training loss", PlotAxis("loss on the training images", "train_loss")),
    "memorised": (
        "Memorised wrong labels",
        PlotAxis("wrong training labels memorised (%)", "memorised", 100),
    ),
}
NOTE = (
    "Lines: mean over seeds; bands: one standard deviation to each side. A line ends where the "
    "first of its runs ends. The first tenth may exceed the range of a figure."
)


def curves(groups: Sequence[Setting], legend: Legend) -> Section:
    """Draw test accuracy, loss and memorisation during the training."""
    parts: list[Plot] = []
    groups, left_out = shortlist(groups)
    for name, (title, axis) in QUANTITIES.items():
        drawn = [
            figure
            for x, by, against in (
                (SAMPLES, "by-samples", "against samples seen"),
                (SECONDS, "by-seconds", "against time"),
            )
            for figure in draw_against(groups, name, title, axis, x, by, against, legend=legend)
        ]
        parts += drawn
        if not drawn:
            left_out.append(f"{title}: not measured in any run{_reason_for_omission(name)}.")
    return Section("curves", "Curves", NOTE, parts, left_out)


def draw_against(
    groups: Sequence[Setting],
    name: str,
    title: str,
    y: PlotAxis,
    x: PlotAxis,
    by: str,
    against: str,
    *,
    legend: Legend,
    said: Sequence[str] = (),
) -> list[Plot]:
    """Draw a quantity against samples or time; several figures if there are many groups.

    Args:
        groups: Groups of runs; those without the quantity are omitted.
        name: Name of the quantity in the metrics.
        title: Name of the quantity in titles.
        y: Axis of the quantity.
        x: Axis of samples or seconds.
        by: Part of the file name.
        against: Part of the title.
        legend: The lines of the page.
        said: Settings that are part of every label, even if all lines share them.
    """
    bands = [band(group.runs, x.name, name) for group in groups]
    if y.log is not None:  # a logarithmic axis holds only positive numbers
        bands = [data[data["mean"] > 0] for data in bands]
    shown = [i for i, data in enumerate(bands) if len(data)]
    found = []
    for facet in facets([groups[i].settings for i in shown]):
        lines = []
        for member in facet.members:
            group = groups[shown[member]]
            label = group.label([n for n in group.settings if n in (*said, *facet.names)])
            data = bands[shown[member]]
            count = len(group.runs)
            lines.append(Curve(label, data, line_of(group), group.settings, runs=count))
        file = f"{name.replace('_', '-')}-{by}{facet.suffix}"
        heading = facet.titled(f"{title} {against}")
        found.append(plot(file, heading, lines, x, y, legend=legend, focus=True))
    return found


def _reason_for_omission(name: str) -> str:
    return ", because no label is wrong" if name == "memorised" else ""


# --- Agreement of rows, and how many are accepted ---


LEAD = (
    "Measured on one batch per evaluation. The noise scale is the batch size at which the "
    "gradient's noise equals the gradient; estimates that are not positive are omitted."
)


def agreement(groups: Sequence[Setting], legend: Legend) -> Section:
    """Draw cosine, noise scale and accepted rows over the training."""
    several, left_out = shortlist([group for group in groups if _has_rows(group)])
    filtering = [group for group in several if _filters(group)]
    if not several:
        why = "Needs runs with several rows per batch (--microbatches or --per-sample)."
        return Section("agreement", "Agreement of the rows", LEAD, left_out=[why])
    parts: list[Plot] = []
    for name, title, axis, chosen, why in (
        ("cosine", "Cosine of the rows", PlotAxis("mean pairwise cosine", "cosine"), several, ""),
        (
            "accepted",
            "Accepted rows",
            PlotAxis("rows accepted (%)", "accepted", 100),
            filtering,
            "needs runs with a filter (--agree or --consensus)",
        ),
        (
            "noise_scale",
            "Noise scale",
            PlotAxis("simple noise scale (samples)", "noise_scale", log=10),
            several,
            "",
        ),
    ):
        by, against = "by-samples", "over the training"
        drawn = draw_against(chosen, name, title, axis, SAMPLES, by, against, legend=legend)
        parts += drawn
        if not drawn:
            left_out.append(f"{title}: {why or 'not measured in these runs'}.")
    return Section("agreement", "Agreement of the rows", LEAD, parts, left_out)


def _has_rows(group: Setting) -> bool:
    settings = group.runs[0].settings
    return bool(settings["microbatches"] > 1 or settings["per_sample"])


def _filters(group: Setting) -> bool:
    settings = group.runs[0].settings
    return settings["agree"] is not None or settings["consensus"] is not None
