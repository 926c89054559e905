"""What a LightningModule has to be for filtered gradients, in errors that say what to do."""

from __future__ import annotations

from typing import Any

REQUIRED = {
    "transforms": "transforms = gf.agree_filter(0.97)",
    "microbatches": "microbatches = 8 (or None, for one row per sample)",
}


def check_fit(module: Any) -> None:
    """Refuse a fit that would not be filtered, or not rightly.

    Args:
        module: A `LightningModule` with a trainer.

    Raises:
        TypeError: The module is not as it has to be.
        ValueError: The trainer is not.
    """
    name = type(module).__name__
    for attribute, example in REQUIRED.items():
        if not hasattr(module, attribute):
            raise TypeError(
                f"{name}: expected an attribute {attribute!r}, found none. Give the class one: "
                f"{example}."
            )
    if not module.automatic_optimization:
        raise TypeError(
            f"{name}: expected automatic optimization, whose hooks FilteredModule fills, found "
            "automatic_optimization = False. Leave it as it is."
        )
    if module.trainer.world_size > 1:
        raise ValueError(
            f"{name}: expected one process, found {module.trainer.world_size}, which would not "
            "see each other's rows. Use L.Trainer(devices=1)."
        )
    if module.trainer.precision == "16-mixed":
        raise ValueError(
            f'{name}: expected precision "32-true" or "bf16-mixed", found "16-mixed", whose '
            'scaler wants to scale the losses itself. Use "bf16-mixed".'
        )
