"""What a step over sharded parameters sends and holds, next to an ordinary step of FSDP2."""

import json

import pytest
import torch
import torch.distributed as dist
from benchmarks._wire import Wire

from benchmarks import _sharded as sharded

M = sharded.M


def bytes_sent(sizes, samples):
    found = {}
    for name, step in sharded.steps(sizes, samples):
        step()  # which also compares the ranks
        with Wire(dist.get_world_size()) as wire:
            step()
        found[name] = wire.sent
    return found


def rows_of_layers(width, length, words, layers, size):
    """The bytes of the Gram's exchange by rows: M · P (W − 1)/W numbers."""
    with torch.device("meta"):
        parameters = sum(
            p.numel() for p in sharded.Language(width, length, words, layers).parameters()
        )
    return 8 * M * parameters * (size - 1) / size, 8 * parameters * (size - 1) / size


def test_the_bytes_of_a_step(two):
    sizes, samples = (32, 8, 50, 2), 2
    for sent in two.run(bytes_sent, sizes, samples):
        exchanged, once = rows_of_layers(*sizes, 2)
        few = 4000  # losses, norms and the notes that ranks compare
        plain = sent["ordinary"]
        assert plain > 2 * once
        assert sent["mean"] <= plain + few
        assert sent["norms"] <= plain + few
        assert sent["consensus"] <= plain + 2 * once + few
        assert sent["gram"] <= plain + exchanged + few


def test_a_gram_sends_what_is_smaller_of_each_layer(two):
    """One short sample per row: inputs and output gradients are smaller than the rows."""
    sizes = (64, 2, 50, 1)
    for sent in two.run(bytes_sent, sizes, 1):
        exchanged, _ = rows_of_layers(*sizes, 2)
        assert sent["gram"] < sent["ordinary"] + exchanged / 3


@pytest.mark.slow
def test_the_memory_of_a_step(tmp_path):
    sharded.main(["--rounds", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "sharded-cpu.json").read_text())["steps"]
    most = 1.3 * found["ordinary"]["peak_bytes"]
    assert {
        name: row["peak_bytes"] for name, row in found.items() if row["peak_bytes"] > most
    } == {}
