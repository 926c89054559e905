"""The sections of the page about learning: label noise and double descent."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks._dots import Dot, Dots, Line, Lines, Panel
from benchmarks._section import Section
from benchmarks._tables import markdown

Json = dict[str, Any]
SAME, TIMED = "equal_samples", "equal_time"


def percent(numbers: Json | None) -> str:
    """Format a mean and a standard deviation in per cent: 94.4 ± 1.2."""
    return f"{100 * numbers['mean']:.1f} ± {100 * numbers['sd']:.1f}" if numbers else ""


def _compared(part: Json) -> str:
    """Return the table of rules that were trained with one fraction of wrong labels."""
    (noise,) = part["noises"]
    rows = [
        [
            rule["rule"],
            f"{rule['learning_rate']:g}",
            percent(found[SAME]["final"]),
            percent(found[SAME]["memorised"]),
            percent(found[TIMED]["final"]),
            f"{rule['milliseconds_per_step']:.1f}",
        ]
        for rule in part["rules"]
        for found in (rule["noise"][str(noise)],)
    ]
    head = ["rule", "rate", "test %", "memorised %", "test % at equal time", "ms per step"]
    return markdown(head, rows)


def label_noise(parts: dict[str, Json]) -> Section:
    part = parts["label_noise"]
    (noise,) = part["noises"]
    lines = [(rule, rule["noise"][str(noise)]) for rule in part["rules"]]
    drawn = [
        Panel(title, [_accuracy(rule, found[at]) for rule, found in lines])
        for title, at in (
            ("after the same samples, at the best rate of each rule", SAME),
            ("after the same time, at the best rate of each rule", TIMED),
        )
    ]
    return Section(
        "Which rules help against wrong labels?",
        ("label_noise",),
        f"Digits with {100 * noise:g} % wrong labels, a small MLP, {part['steps']} steps. Every "
        "rule is trained at its own best learning rate, which a validation split selects for this "
        "fraction of wrong labels. The table shows the test accuracy after the last step, as mean "
        f"± standard deviation over {len(part['seeds'])} other seeds. Blue: rules that use a row "
        "per sample.",
        _compared(part),
        Dots(drawn, 2, "test accuracy in %", log=False, mark=None, digits=".1f"),
    )


def _accuracy(rule: Json, found: Json) -> Dot:
    mean, sd = (100 * found["final"][key] for key in ("mean", "sd"))
    return Dot(rule["rule"], (mean - sd, mean, mean + sd), "per_sample" in rule["settings"])


def one_sam(parts: dict[str, Json]) -> Section:
    return Section(
        "SAM along every sample against wrong labels",
        ("one_sam",),
        "1-SAM is `sam_perturb(rho, per_microbatch=True)` with one row per sample. Everything else "
        "is as in the section before: data, network, rates, seeds and the selection of the rate. "
        "Two radii were tried.",
        _compared(parts["one_sam"]),
    )


def default_rule(parts: dict[str, Json]) -> Section:
    part = parts["default_rule"]
    noises, rules = part["noises"], list(part["rules"])
    named = [(rule["rule"], rule) for rule in rules]
    if "clean_labels" in parts:
        named.insert(0, ("plain, for right labels", parts["clean_labels"]["rules"][0]))
    rows = [
        [name, f"{r['learning_rate']:g}"]
        + [percent(r["noise"].get(str(n), {}).get(at, {}).get("final")) for n in noises
           for at in (SAME, TIMED)]
        for name, r in named
    ]  # fmt: skip
    head = ["rule", "rate", *(f"{100 * n:g} % wrong{t}" for n in noises for t in ("", ", timed"))]
    drawn = [
        Panel(f"{100 * n:g} % wrong labels", [_accuracy(rule, rule["noise"][str(n)][SAME])
                                              for rule in rules])
        for n in noises
    ]  # fmt: skip
    return Section(
        "One rule for right and wrong labels",
        ("default_rule", *(["clean_labels"] if "clean_labels" in parts else [])),
        "The same network. Every rule is trained at its own best single learning rate for all "
        "three fractions of wrong labels; a validation split selects it. The table shows the test "
        "accuracy after the last step in %, as mean ± standard deviation over "
        f"{len(part['seeds'])} other seeds. *timed*: training stops when plain training has "
        "finished. *averaged* is `ema_params(0.99)`, and *budget 0.3, power 3* is `budget_clip()`. "
        "*plain, for right labels* is plain training at its best rate for right labels alone.",
        markdown(head, rows),
        Dots(drawn, 3, "test accuracy in %", log=False, mark=None, digits=".1f"),
    )


def rule_search(parts: dict[str, Json]) -> Section:
    part = parts["rule_search"]
    reached = [rule for rule in part["rules"] if rule["reaches_all_three"]]
    noises = part["noises"]
    rows = [
        [rule["rule"], f"{rule['learning_rate']:g}", f"{rule['average']:g}"]
        + [f"{100 * rule['noise'][str(n)]['final']['mean']:.1f}" for n in noises]
        for rule in reached
    ]
    head = ["rule", "rate", "average", *(f"test %, {100 * n:g} % wrong" for n in noises)]
    wanted = part["wanted"]
    return Section(
        "The search for this rule",
        ("rule_search",),
        f"{len(part['rules'])} settings, each with {len(part['seeds'])} seeds and at the learning "
        "rate in the table. The aims: a loss of at most "
        f"{100 * wanted['cost_on_clean_labels']:.1f} points on right labels, "
        + " and ".join(
            f"at least {100 * wanted[str(n)]:g} % at {100 * n:g} % wrong labels"
            for n in noises
            if n
        )
        + f". {len(reached)} settings reach all aims. They were selected by these test accuracies, "
        "so this table is not a result. The section before it is the result, with other seeds.",
        markdown(head, rows),
    )


def double_descent(parts: dict[str, Json]) -> Section:
    features, widths = parts["double_descent_features"], parts["double_descent_widths"]
    halves = (
        (features, "features", "random features p", {"p = n": features["samples"]}),
        (widths, "width", "width h", _fits(widths)),
    )
    drawn, marks = [], []
    for part, size, title, mark in halves:
        drawn += [
            (f"Errors, {title}", _lines(part, size, ("test_error", "train_error"))),
            (f"Lipschitz constant, {title}", _lines(part, size, ("lipschitz",))),
        ]
        marks += [mark, mark]
    head = ["width", "parameters", "training error %", "test error %", "Lipschitz constant"]
    rows = [
        [f"{p['width']}", f"{p['parameters']}", *_errors(p), f"{p['lipschitz']:.2f}"]
        for p in widths["means"]
    ]
    return Section(
        "Double descent",
        ("double_descent_features", "double_descent_widths"),
        f"Digits with {100 * widths['noise']:g} % wrong training labels. The numbers are means "
        f"over {len(widths['seeds'])} seeds; the files contain the values of every seed. In "
        f"theory, ridgeless regression on p random features of n = {features['samples']} images "
        f"has its peak at p = n. The measured peak of the test error is at "
        f"{features['peaks']['test_error']}, and that of the empirical Lipschitz constant at "
        f"{features['peaks']['lipschitz']}. For two hidden layers of h units the peaks are at "
        f"{widths['peaks']['test_error']} and {widths['peaks']['lipschitz']}. The first width that "
        f"learns all training labels is {widths['first_without_train_error']}.",
        markdown(head, rows),
        Lines(drawn, "size of the model, logarithmic", marks),
    )


def _errors(point: Json) -> list[str]:
    return [f"{100 * point[name]:.1f}" for name in ("train_error", "test_error")]


def _fits(part: Json) -> dict[str, float]:
    first = part["first_without_train_error"]
    return {"fits all labels": first} if first else {}


def _lines(part: Json, size: str, names: Sequence[str]) -> list[Line]:
    x = [point[size] for point in part["means"]]
    return [Line(n.replace("_", " "), x, [p[n] for p in part["means"]]) for n in names]


# The keys are the parts that a section needs.
STUDIES: dict[tuple[str, ...], Callable[[dict[str, Json]], Section]] = {
    ("label_noise",): label_noise,
    ("one_sam",): one_sam,
    ("default_rule",): default_rule,
    ("rule_search",): rule_search,
    ("double_descent_features", "double_descent_widths"): double_descent,
}
