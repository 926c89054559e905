"""Train the example of fine-tuning in float64 and save its parameters; torchrun may start it.

python _finetune_run.py FOLDER loop|trainer RULE FILE
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist


def main(folder, kind, rule, file):
    """Run six steps of made-up texts, and save what each process has."""
    sys.path.insert(0, folder)
    from loop import train
    from setting import Setting

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    sizes = {"steps": 6, "every": 3, "batch": 8, "length": 10, "words": 200}
    setting = Setting(rule=rule, data="made-up", wrong=0.3, **sizes)
    data = setting.load()
    model = setting.model(data)
    if kind == "loop":
        if "RANK" in os.environ:
            dist.init_process_group("gloo")
        *_, (_, params) = train(setting, data, model)
    else:
        from trainer import trainer_of

        with tempfile.TemporaryDirectory() as out:
            trainer_of(setting, data, model, out).train()
        params = {name: p.detach() for name, p in model.named_parameters()}
    torch.save(params, Path(file).with_suffix(f".{os.environ.get('RANK', 0)}"))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
