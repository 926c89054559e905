"""The command line of the benchmark of several ranks, on small sizes."""

import json

import pytest

from benchmarks import _wire, distributed


@pytest.mark.slow
def test_ranks_are_timed_over_ddp_and_their_bytes_counted(tmp_path, capsys):
    options = ["--quick", "--rounds", "1", "--models", "mlp-0.1M", "--worlds", "2"]
    distributed.main([*options, "--out", str(tmp_path)])
    written = json.loads((tmp_path / "distributed-cpu.json").read_text())
    (contest,) = written["workloads"]
    assert contest["ranks"] == 2 and contest["samples_per_rank"] == 4
    assert contest["results"][distributed.BASE]["ratio"]["median"] == 1
    for name, result in contest["results"].items():
        assert result["failure"] is None and result["seconds"]["median"] > 0, name
    counted, real = contest["counted_bytes"], contest["loopback_bytes"]
    ring = 4 * contest["parameters"]  # 2 P (W - 1)/W float32
    assert counted[distributed.BASE] == ring
    for name in ("mean, M = 1", "agreement, M = 1", "consensus, M = 1", "mean, M = 4"):
        assert ring <= counted[name] <= 1.05 * ring, name
    assert 2.5 * ring <= counted["agreement, M = 4"] <= 2.6 * ring
    # Somebody else on this machine may talk to it as well, so only what must at least be there.
    assert all(real[name] is None or real[name] > 0.95 * sent for name, sent in counted.items())
    assert "agreement, M = 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [("head\n  eth0: 7 1\n    lo: 123 4 0\n", 123), ("head\n  eth0: 7 1\n", None), (None, None)],
)
def test_what_the_loopback_interface_carried(tmp_path, text, expected):
    path = tmp_path / "dev"
    if text is not None:
        path.write_text(text)
    assert _wire.loopback_bytes(path) == expected
