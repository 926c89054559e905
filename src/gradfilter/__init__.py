"""Choose which gradients a neural network follows: per-microbatch rows, filtered and applied.

update = chain(agree_filter(0.97), agc_clip(0.01), sgd(lr))
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradfilter import diagnostics as diagnostics
    from gradfilter import distributed as distributed
    from gradfilter import interop as interop
    from gradfilter import schedules as schedules
    from gradfilter import testing as testing
    from gradfilter._public import *

__version__ = "0.1.0"

__all__ = [
    "Captured",
    "CompiledFunction",
    "CompiledStep",
    "ComputedStack",
    "DenseStack",
    "GradFunction",
    "GradStack",
    "Info",
    "ModelLoss",
    "Params",
    "Plan",
    "Quantile",
    "Schedule",
    "TrainState",
    "TrainStep",
    "Transform",
    "Tree",
    "__version__",
    "adam",
    "adamw",
    "agc_clip",
    "aggregate",
    "agree_filter",
    "budget_clip",
    "capture",
    "cautious",
    "centered_clip",
    "chain",
    "clip_by_global_norm",
    "clip_per_row",
    "compile",
    "consensus_filter",
    "coordinate_median",
    "diagnostics",
    "distributed",
    "ema_of",
    "ema_params",
    "evaluated_params",
    "every",
    "export_torch_state",
    "extract",
    "finite_filter",
    "freeze",
    "friendly_sam",
    "from_torch",
    "gate",
    "geometric_median",
    "gsam_decompose",
    "hyperparameters",
    "import_torch_state",
    "insert",
    "interop",
    "late",
    "link",
    "lion",
    "load_state_dict",
    "look_sam",
    "masked",
    "mean_rows",
    "microbatch_grads",
    "model_loss",
    "msam",
    "muon",
    "named",
    "normalize_rows",
    "outlier_filter",
    "partition",
    "per_example_adam",
    "per_sample_grads",
    "quantile",
    "reference_filter",
    "rmsprop",
    "sam_perturb",
    "scalars",
    "schedule_free",
    "scheduled",
    "schedules",
    "select",
    "sgd",
    "sign_agreement",
    "spike_clip",
    "spike_skip",
    "state_dict",
    "testing",
    "train_step",
    "transform",
    "trim_losses",
    "trimmed_mean",
    "watch",
]

_SUBPACKAGES = ("diagnostics", "distributed", "interop", "schedules", "testing")

if not TYPE_CHECKING:  # type checkers would take any name at all for one that this function knows

    def __getattr__(name: str) -> object:
        """Import a public name when the first is asked for: `gradfilter --help` needs no torch."""
        if name in _SUBPACKAGES:
            return _import_module(f"gradfilter.{name}")
        if name in __all__:
            public = _import_module("gradfilter._public")
            globals().update({n: getattr(public, n) for n in __all__ if hasattr(public, n)})
            return getattr(public, name)
        if not name.startswith("_") and hasattr(_import_module("gradfilter.schedules"), name):
            raise AttributeError(
                f"module 'gradfilter' has no attribute {name!r}. Write gf.schedules.{name}."
            )
        raise AttributeError(f"module 'gradfilter' has no attribute {name!r}")

    def __dir__() -> list[str]:
        """List the public names, whether imported already or not."""
        return sorted(__all__)
