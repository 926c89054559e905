"""A table and a chart of measured workloads."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks._results import Result, Workload

MB = 1e6


def table(
    workloads: list[Workload], plans: tuple[str, ...], about: str, console: Console | None = None
) -> None:
    """Print one row per workload: time over plain with its quartiles, milliseconds, memory."""
    grid = Table(title="Over one plain forward and backward pass", caption=about, show_lines=True)
    grid.add_column("model (M, B)")
    for name in ("plain", *plans):
        grid.add_column(name, justify="right")
    for workload in workloads:
        cells = [_cell(workload.results[name], name != "plain") for name in ("plain", *plans)]
        grid.add_row(workload.label, *cells)
    (console or Console()).print(grid)


def _cell(result: Result, compared: bool) -> str:
    if result.seconds is None or result.peak_bytes is None:
        return f"[red]{escape(str(result.failure))}[/red]"
    lines = [f"{result.seconds.median * 1e3:.1f} ms", f"{result.peak_bytes / MB:.0f} MB"]
    if compared and result.ratio is not None:
        low, high = _short(result.ratio.lower_quartile), _short(result.ratio.upper_quartile)
        lines.insert(0, f"[bold]{_short(result.ratio.median)}x[/bold] ({low}, {high})")
    return "\n".join(lines)


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def chart(workloads: list[Workload], plans: tuple[str, ...], about: str, path: Path) -> None:
    """Draw time and memory over plain, on a log scale, bars growing from 1."""
    # Without pyplot there is no window system to choose, and no figure to close.
    figure = Figure(figsize=(10, 1.2 + 0.28 * len(workloads) * (len(plans) + 1)), dpi=120)
    FigureCanvasAgg(figure)
    time, memory = figure.subplots(1, 2, sharey=True)
    _bars(time, workloads, plans, _time_ratio)
    _bars(memory, workloads, plans, _memory_ratio)
    time.set_xlabel("time over plain (median and quartiles)")
    memory.set_xlabel("peak memory over plain")
    time.set_yticks(range(len(workloads)), [workload.label for workload in workloads])
    time.invert_yaxis()
    figure.legend(
        *time.get_legend_handles_labels(), loc="upper right", ncols=len(plans), frameon=False
    )
    figure.suptitle("Microbatch gradients: model (M, B)", x=0.01, ha="left", fontsize=11)
    figure.supxlabel(about, fontsize=7, color="0.4")
    figure.tight_layout()
    figure.savefig(path)


Value = tuple[float, float, float]  # lower end, middle, upper end


def _time_ratio(workload: Workload, plan: str) -> Value | None:
    ratio = workload.results[plan].ratio
    return ratio and (ratio.lower_quartile, ratio.median, ratio.upper_quartile)


def _memory_ratio(workload: Workload, plan: str) -> Value | None:
    own, plain = workload.results[plan].peak_bytes, workload.results["plain"].peak_bytes
    return None if own is None or not plain else (own / plain,) * 3


def _bars(
    axes: Axes,
    workloads: list[Workload],
    plans: tuple[str, ...],
    value: Callable[[Workload, str], Value | None],
) -> None:
    height = 0.8 / len(plans)
    for index, plan in enumerate(plans):
        values = [value(workload, plan) for workload in workloads]
        places = [row + (index - (len(plans) - 1) / 2) * height for row in range(len(workloads))]
        drawn = [(y, v) for y, v in zip(places, values, strict=True) if v is not None]
        middles = [v[1] for _, v in drawn]
        axes.barh(
            [y for y, _ in drawn],
            [middle - 1 for middle in middles],
            height,
            left=1,
            xerr=[[v[1] - v[0] for _, v in drawn], [v[2] - v[1] for _, v in drawn]],
            error_kw={"ecolor": "0.3", "elinewidth": 0.8},
            color=f"C{index}",
            label=plan,
        )
        for y, v in zip(places, values, strict=True):
            text = _short(v[1]) if v else "none, see the table"
            end = max(v[2], 1) if v else 1
            axes.annotate(
                text, (end, y), (4, 0), textcoords="offset points", va="center", fontsize=7
            )
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.axvline(1, color="0.3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
