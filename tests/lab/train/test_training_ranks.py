"""Several processes of one training: they take equal decisions, and resume equally."""

import pytest
import torch

from gradfilter.distributed._ranks import Ranks
from gradfilter.lab.train._build_training import build_training
from gradfilter.lab.train._record import resume, write_point
from gradfilter.lab.train._train import Watch, train_to_the_end
from gradfilter.lab.train._train_command import parse_train

BASE = (
    "--model resnet18_1 --model-additions batchnorm --train-split 200 --val-split 100 "
    "--microbatches 2 --batch-size 20 --dtype float64"
)


def begun(options):
    torch.set_num_threads(1)
    config = parse_train([*BASE.split(), *options.split()]).settings
    return build_training(config, torch.device("cpu"), Ranks.of(None))


def flat(run):
    leaves = {**run.state["params"], **run.state["buffers"]}
    return {"done": run.done, **{name: leaf.tolist() for name, leaf in leaves.items()}}


def told(line):
    # As text: NaN is not equal to itself.
    return [repr(value) for value in (line.step, line.loss, line.lr, line.val_loss)]


def trained(options):
    run, lines = begun(options), []
    assert train_to_the_end(run, Watch(evaluated=lines.append), lambda: False)
    return flat(run), [told(line) for line in lines]


@pytest.mark.slow
def test_ranks_with_statistics_of_their_own_drop_the_rate_and_stop_together(two):
    plateau = "--schedule plateau --lr-patience 0 --lr-decay-rate 0.7 --epochs 6"
    first, second = two.run(trained, plateau)
    assert first == second
    assert len({line[2] for line in first[1][1:]}) > 1  # the rate has dropped
    first, second = two.run(trained, "--epochs 8 --early-exit-accuracy 0.13")
    assert first == second and first[0]["done"] < 80


def interrupted(options, folder, after):
    """Leave at a step, and go on from the point that rank 0 wrote."""
    from pathlib import Path

    import torch.distributed as dist

    place = Path(folder)
    run = begun(options)

    def point(run):
        if dist.get_rank() == 0:
            write_point(place, run)

    assert not train_to_the_end(run, Watch(point=point), lambda: run.done == after)
    dist.barrier()
    again = begun(options)
    resume(place, again)
    lines = []
    assert train_to_the_end(again, Watch(evaluated=lines.append), lambda: False)
    return flat(again), [told(line) for line in lines]


@pytest.mark.slow
def test_ranks_go_on_from_one_point_as_if_they_had_not_stopped(two, tmp_path):
    options = "--agree 0.99 --schedule plateau --lr-patience 0 --epochs 4"
    whole, _ = two.run(trained, options)
    first, second = two.run(interrupted, options, str(tmp_path), 25)
    assert first == second
    names = [name for name in whole[0] if "running" not in name]
    assert {name: first[0][name] for name in names} == {name: whole[0][name] for name in names}
    assert first[1][-1][:3] == whole[1][-1][:3]
