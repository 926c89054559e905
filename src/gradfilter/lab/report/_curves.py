"""How the trainings went, against samples seen and against time."""

from __future__ import annotations

from collections.abc import Sequence

from gradfilter.lab.report._facets import facets
from gradfilter.lab.report._figure import Axis, Curve, plot
from gradfilter.lab.report._groups import Group
from gradfilter.lab.report._most import shortlist
from gradfilter.lab.report._parts import Plot, Section
from gradfilter.lab.report._spread import band

SAMPLES = Axis("training samples seen", "samples")
SECONDS = Axis("seconds of training steps", "seconds")
QUANTITIES = {
    "test_accuracy": ("Test accuracy", Axis("test accuracy (%)", "test_accuracy", 100)),
    "train_loss": ("Training loss", Axis("loss on the training images", "train_loss")),
    "memorised": (
        "Memorised wrong labels",
        Axis("wrong training labels memorised (%)", "memorised", 100),
    ),
}
NOTE = (
    "Lines: mean over seeds; bands: one standard deviation to each side. A line ends where the "
    "first of its runs does. The first tenth may reach beyond a figure."
)


def curves(groups: Sequence[Group]) -> Section:
    """Test accuracy, loss and memorisation on the way."""
    parts: list[Plot] = []
    groups, left_out = shortlist(groups)
    for name, (title, axis) in QUANTITIES.items():
        drawn = [
            *over(groups, name, title, axis, SAMPLES, "by-samples", "against samples seen"),
            *over(groups, name, title, axis, SECONDS, "by-seconds", "against time"),
        ]
        parts += drawn
        if not drawn:
            left_out.append(f"{title}: not measured in any run{_because(name)}.")
    return Section("curves", "Curves", NOTE, parts, left_out)


def over(
    groups: Sequence[Group],
    name: str,
    title: str,
    y: Axis,
    x: Axis,
    by: str,
    against: str,
    said: Sequence[str] = (),
) -> list[Plot]:
    """A quantity of the metrics against samples or time; several figures if there are many groups.

    Args:
        groups: Those without the quantity are left out.
        name: Of the quantity in the metrics.
        title: What it is called.
        y: Its axis.
        x: The axis of samples or seconds.
        by: For the file's name.
        against: For the title.
        said: Settings that are said of every line, also where all have the same.
    """
    bands = [band(group.runs, x.name, name) for group in groups]
    if y.log is not None:  # which has no place for what is not positive
        bands = [data[data["mean"] > 0] for data in bands]
    shown = [i for i, data in enumerate(bands) if len(data)]
    found = []
    for facet in facets([groups[i].settings for i in shown]):
        lines = []
        for place, member in enumerate(facet.members):
            group = groups[shown[member]]
            label = group.label([n for n in group.settings if n in (*said, *facet.names)])
            data = bands[shown[member]]
            lines.append(Curve(label, data, group.settings, place, runs=len(group.runs)))
        file = f"{name.replace('_', '-')}-{by}{facet.suffix}"
        found.append(plot(file, facet.titled(f"{title} {against}"), lines, x, y, focus=True))
    return found


def _because(name: str) -> str:
    return ", for no label is wrong" if name == "memorised" else ""
