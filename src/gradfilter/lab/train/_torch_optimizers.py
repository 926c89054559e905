"""Read ``--optimizer torch:NAME``: a class of `torch.optim`, and the arguments it gets."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from gradfilter.lab._usage import UsageError, check, did_you_mean, option_name
from gradfilter.lab.train._train_config import OPTIMIZERS, TrainConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer

TORCH = "torch:"
"""How the names of classes of `torch.optim` begin."""
UNFIT: Mapping[str, str] = {
    "LBFGS": "evaluates the loss several times in a step, and filters and clips give it one "
    "gradient. Choose another.",
    "Muon": "takes parameters with two dims alone, and models have others. Give --optimizer muon, "
    "which has adamw for those.",
    "SparseAdam": "takes sparse gradients alone, and those of a training are dense. Give "
    "--optimizer adam.",
}
"""Classes that cannot be used, with the reason."""
HOST = ("torch:Adafactor", "torch:Rprop")
"""Classes that read numbers of a step, which needs a CPU and no compiler."""
RATE_READ_ONCE = "torch:Rprop"
"""The class that reads the learning rate in its first step alone."""

# --- The names ---


def check_optimizer(config: TrainConfig) -> None:
    """Refuse an update rule that does not exist, and what a class of torch refuses.

    Raises:
        UsageError: The name is unknown, the class cannot be used, or an argument is wrong.
    """
    name = config.optimizer
    if name in OPTIMIZERS:
        return
    classes = torch_classes()
    known = f"one of {', '.join(OPTIMIZERS)}, or torch:NAME with a class of torch.optim"
    check(name.startswith(TORCH), "--optimizer", known, repr(name), _nearest(name))
    own = name.removeprefix(TORCH)
    if own in UNFIT:
        raise UsageError(f"--optimizer: {name} {UNFIT[own]}")
    known = f"{TORCH} and one of {', '.join(classes)}"
    check(own in classes, "--optimizer", known, repr(name), _nearest(name))
    reads = name in HOST and (config.compile or config.device.partition(":")[0] != "cpu")
    place = "--compile" if config.compile else f"--device {config.device}"
    if reads:
        raise UsageError(
            f"{place}: torch's {own} reads numbers in every step, which takes a CPU and no "
            "compiler. Give --device cpu without --compile, or another --optimizer."
        )
    _check_arguments(config)


def _nearest(name: str) -> str:
    """Return a sentence with the nearest name; a class of torch may be in other letters."""
    lower = name.removeprefix(TORCH).lower()
    same = [own for own in torch_classes() if own.lower() == lower]
    names = [*OPTIMIZERS, *(f"{TORCH}{own}" for own in torch_classes())]
    return did_you_mean(f"{TORCH}{same[0]}" if same else name, names).lstrip()


@cache
def torch_classes() -> dict[str, type[Optimizer]]:
    """Return the classes of `torch.optim` that can be used, by name."""
    from torch import optim  # importing torch takes a second, which --help does not need

    return {
        name: found
        for name, found in sorted(vars(optim).items())
        if isinstance(found, type)
        and issubclass(found, optim.Optimizer)
        and found is not optim.Optimizer
        and name not in UNFIT
    }


# --- The arguments ---


OPTIONS = ("momentum", "nesterov", "betas", "eps", "alpha", "centered", "weight_decay")
"""Options of train that are arguments of a class of the same name, where they mean the same."""
SET_ELSEWHERE = ("params", "lr", "foreach", "fused", "capturable", "differentiable")
"""Arguments that come from --learning-rate or from `gradfilter.from_torch`."""


def takes(config: TrainConfig, option: str) -> bool:
    """Return whether an option is an argument of the class of torch; False for other rules.

    An argument with another default than the option's means something else, or is scaled in another
    way: eps of Adagrad, alpha of ASGD. It stays as it is in the class. Momentum has no default of
    its own, and the weight decay is always the one of the option, so that no training decays unless
    its settings say so.

    Examples:
        >>> [takes(TrainConfig(optimizer=f"torch:{n}"), "eps") for n in ("RAdam", "Adagrad", "SGD")]
        [True, False, False]
    """
    if not config.optimizer.startswith(TORCH):
        return False
    found = _parameters(config).get(option)
    if option not in OPTIONS or found is None:
        return False
    default = getattr(TrainConfig, option)
    return default is None or option == "weight_decay" or bool(found.default == default)


def torch_class(config: TrainConfig) -> type[Optimizer]:
    """Return the class of a name that passed `check_optimizer`."""
    return torch_classes()[config.optimizer.removeprefix(TORCH)]


def torch_arguments(config: TrainConfig) -> dict[str, Any]:
    """Return the arguments of the class, without the learning rate.

    Raises:
        UsageError: One of --optimizer-arguments is not ``NAME=VALUE``, or no argument to set.

    Examples:
        >>> own = TrainConfig(optimizer="torch:SGD", optimizer_arguments=("dampening=0.1",))
        >>> torch_arguments(own)
        {'nesterov': False, 'weight_decay': 0.0, 'dampening': 0.1}
    """
    given = {name: getattr(config, name) for name in OPTIONS if takes(config, name)}
    arguments = {name: value for name, value in given.items() if value is not None}
    known = [n for n in _parameters(config) if n not in SET_ELSEWHERE and not takes(config, n)]
    for text in config.optimizer_arguments:
        name, equals, value = text.partition("=")
        check(
            bool(equals) and not takes(config, name),
            "--optimizer-arguments",
            "NAME=VALUE" if not equals else f"no {name}, which {option_name(name)} sets",
            repr(text),
            f"{config.optimizer} has {', '.join(known)}.",
        )
        check(
            name in known and name not in arguments,
            "--optimizer-arguments",
            f"arguments of {config.optimizer} among {', '.join(known)}, each once",
            repr(text),
            did_you_mean(name, known).lstrip() if name not in known else "",
        )
        arguments[name] = _value(text, value)
    return arguments


def _parameters(config: TrainConfig) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(torch_class(config)).parameters


WORDS: Mapping[str, Any] = {"true": True, "false": False, "none": None}


def _value(text: str, value: str) -> Any:
    """Read a number, true, false, none, or several of them between commas."""
    parts: list[Any] = []
    for part in value.split(","):
        try:
            read = WORDS[part.lower()] if part.lower() in WORDS else ast.literal_eval(part)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            read = part
        check(
            read is None or isinstance(read, (bool, int, float)),
            "--optimizer-arguments",
            "a number, true, false or none, or several of them, as in etas=0.5,1.2",
            repr(text),
            "",
        )
        parts.append(read)
    return parts[0] if len(parts) == 1 else tuple(parts)


def _check_arguments(config: TrainConfig) -> None:
    """Let the class itself check its arguments."""
    from torch import zeros

    build: Any = torch_class(config)
    arguments = torch_arguments(config)
    try:
        build([zeros(2, 2)], lr=config.learning_rate, **arguments)
    except (ArithmeticError, AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise as_usage_error(config, error) from None


def as_usage_error(config: TrainConfig, error: Exception) -> UsageError:
    """Return an error of a class of torch as one line about the option."""
    said = " ".join(str(error).split()).rstrip(".")
    return UsageError(
        f"--optimizer {config.optimizer}: it refuses its arguments: {said}. Give other values."
    )
