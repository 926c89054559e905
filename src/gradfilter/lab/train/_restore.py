"""Restore a checkpoint: model, data and settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from gradfilter.lab._run_files import ForeignError, reading
from gradfilter.lab._usage import UsageError
from gradfilter.lab.data._samples import Data
from gradfilter.lab.train._archive import ARCHIVE, Checkpoint, read_tensors
from gradfilter.lab.train._build_training import data_of, model_of
from gradfilter.lab.train._record import check_same_data
from gradfilter.lab.train._run_place import config_of, read_config
from gradfilter.lab.train._train_config import TrainConfig


@dataclass(frozen=True)
class Restored:
    """A model at a checkpoint of its training, in evaluation mode.

    Attributes:
        model: The model, on the device.
        data: The data set, with the labels that the run was trained on.
        config: The settings of the run.
        checkpoint: The checkpoint that was read.
        run: The run directory.
    """

    model: nn.Module
    data: Data
    config: TrainConfig
    checkpoint: Checkpoint
    run: Path


def restored(
    run: Path,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    data_dir: Path | None = None,
    data: Data | None = None,
) -> Restored:
    """Read a checkpoint and load its data set again.

    Args:
        run: The run directory.
        checkpoint: One of `checkpoints`.
        device: The device to load to.
        data_dir: Directory of the data set, if it has moved since the training.
        data: The data set, if another checkpoint of the run has been read before.

    Raises:
        UsageError: Something is missing or damaged, or the data set has changed.
    """
    config = config_of(read_config(run)["settings"], f"the run in {str(run)!r}")
    # A measurement does not download, even if the run was started with --download.
    config = replace(config, download=False, data_dir=data_dir or config.data_dir)
    if data is None:
        data = data_of(config, device)
        check_same_data(run, data)
    flat = read_tensors(run / ARCHIVE, checkpoint)
    model = model_of(config, data).to(dtype=getattr(torch, config.dtype))
    with reading(run / ARCHIVE, f"checkpoint {checkpoint.entry!r} in", "Choose another."):
        if any(tensor.is_complex() for tensor in flat.values()):
            raise ForeignError("it has complex numbers")
        named = {name.partition(".")[2]: tensor for name, tensor in flat.items()}
        try:
            missing = {*model.load_state_dict(named, strict=False).missing_keys}
        except RuntimeError as error:
            missing = {str(error).splitlines()[-1].strip()}
    if missing:
        raise UsageError(
            f"checkpoint {checkpoint.entry!r} in {str(run)!r} does not fit {config.model}: "
            f"{', '.join(sorted(missing))}."
        )
    return Restored(model.to(device).eval(), data, config, checkpoint, run)
