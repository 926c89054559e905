"""Print tables and draw a chart of measured workloads."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks._results import Contest, Result, Workload

MB = 1e6
NO_RESULT = Result(failure="-")


def table(
    contests: Sequence[Contest],
    names: Sequence[str],
    about: str,
    console: Console | None = None,
    *,
    base: str = "plain",
    title: str = "Over one plain forward and backward pass",
) -> None:
    """Print one row per contest: time over the base with its quartiles, milliseconds, memory."""
    grid = Table(title=title, caption=about, show_lines=True)
    grid.add_column("model (M, B)")
    for name in (base, *names):
        grid.add_column(name, justify="right")
    for contest in contests:
        label = "\n".join([contest.label, *_also(contest)])
        grid.add_row(label, *[_cell(contest, name, base) for name in (base, *names)])
    (console or Console()).print(grid)


def by_contender(
    contests: Sequence[Contest],
    about: str,
    console: Console | None = None,
    *,
    base: str = "plain",
    title: str = "Over one plain forward and backward pass",
) -> None:
    """Print one column per contest and one row per contender, for many contenders."""
    grid = Table(title=title, caption=about)
    grid.add_column("")
    for contest in contests:
        grid.add_column("\n".join([contest.label, *_also(contest)]), justify="right")
    for name in dict.fromkeys(name for contest in contests for name in contest.results):
        grid.add_row(name, *[_line(contest, name, base) for contest in contests])
    (console or Console()).print(grid)


def _also(contest: Contest) -> list[str]:
    return [f"{pair}: {_short(ratio.median)}" for pair, ratio in contest.ratios.items()]


def _cell(contest: Contest, name: str, base: str) -> str:
    return "\n".join(_parts(contest.results.get(name, NO_RESULT), name != base))


def _line(contest: Contest, name: str, base: str) -> str:
    ratio_or_time, *_, memory = _parts(contest.results.get(name, NO_RESULT), name != base)
    return f"{ratio_or_time}  {memory}"


def _parts(result: Result, compared: bool) -> list[str]:
    """Return the ratio if there is one, the time and the memory, or the reason of a failure."""
    if result.seconds is None or result.peak_bytes is None:
        return [f"[red]{escape(str(result.failure))}[/red]", ""]
    parts = [f"{result.seconds.median * 1e3:.1f} ms", f"{result.peak_bytes / MB:.0f} MB"]
    if compared and result.ratio is not None:
        low, high = _short(result.ratio.lower_quartile), _short(result.ratio.upper_quartile)
        parts.insert(0, f"[bold]{_short(result.ratio.median)}x[/bold] ({low}, {high})")
    return parts


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def chart(workloads: Sequence[Workload], plans: Sequence[str], about: str, path: Path) -> None:
    """Draw time and memory over plain on a logarithmic axis, with bars that start at 1."""
    # Without pyplot, no window system is needed and no figure has to be closed.
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
    ratio = workload.results.get(plan, NO_RESULT).ratio
    return ratio and (ratio.lower_quartile, ratio.median, ratio.upper_quartile)


def _memory_ratio(workload: Workload, plan: str) -> Value | None:
    own = workload.results.get(plan, NO_RESULT).peak_bytes
    plain = workload.results["plain"].peak_bytes
    return None if own is None or not plain else (own / plain,) * 3


def _bars(
    axes: Axes,
    workloads: Sequence[Workload],
    plans: Sequence[str],
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
