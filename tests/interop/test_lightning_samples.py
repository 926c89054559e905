"""`FilteredModule` with ragged batches, weights and groups of samples.

The reference is an ordinary training of the plain module: ``loss.backward()`` for each row.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from gradfilter import interop

L = pytest.importorskip("lightning")
FilteredModule = interop.FilteredModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.usefixtures("float64"),
]

SIZE, M, LIMIT, LR = 8, 4, 0.3, 0.1
NAMES = [(), ("weights",), ("groups",), ("weights", "groups")]


class Net(FilteredModule):
    """Two layers, and batches (x, y, weight, group)."""

    microbatches, uneven = M, True

    def __init__(self, named=(), reduction="none"):
        super().__init__()
        self.transforms = gf.chain(gf.clip_per_row(LIMIT), gf.mean_rows())
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.named, self.reduction, self.losses = named, reduction, []

    def microbatch_loss(self, batch):
        x, y, *_ = batch
        output = self.net(x)
        self.log("right", (output.argmax(1) == y).double().mean())
        return F.cross_entropy(output, y, reduction=self.reduction)

    def sample_weights(self, batch):
        return batch[2] if "weights" in self.named else None

    def sample_groups(self, batch):
        return batch[3] if "groups" in self.named else None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def data(n=2 * SIZE + 6):
    weights = torch.rand(n) + 0.1
    weights[torch.rand(n) < 0.3] = 0
    weights[:2] = 0  # the first row of the first batch is empty
    group = torch.tensor([0, 3, 3, 1, 0, 3])[torch.randint(6, (n,))]  # none in row 2
    return torch.utils.data.TensorDataset(torch.randn(n, 6), torch.randint(3, (n,)), weights, group)


def loader(dataset, size=SIZE):
    return torch.utils.data.DataLoader(dataset, batch_size=size)


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 2, "enable_checkpointing": False} | options
    return L.Trainer(accelerator="cpu", **quiet | options)


def rows_of(batch, named):
    """Return the samples of each row that takes part, and their shares."""
    n, weights = len(batch[0]), batch[2] if "weights" in named else torch.ones(len(batch[0]))
    if "groups" in named:
        rows = [(batch[3] == m).nonzero().flatten().tolist() for m in range(M)]
    else:
        rows = [part.tolist() for part in torch.arange(n).tensor_split(M)]
    totals = [sum(weights[i].item() for i in row) for row in rows]
    return [
        [(i, weights[i].item() / total) for i in row if weights[i] > 0]
        for row, total in zip(rows, totals, strict=True)
        if total > 0
    ]


def by_hand(net, dataset, named, accumulate=1, epochs=2):
    """Train the plain module, and return the losses of the steps."""
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
    params, losses = list(net.parameters()), []
    for _ in range(epochs):
        batches = list(loader(dataset))
        for start in range(0, len(batches), accumulate):
            total, count, values = [torch.zeros_like(p) for p in params], 0, []
            for batch in batches[start : start + accumulate]:
                for row in rows_of(batch, named):
                    loss = torch.zeros(())
                    for i, share in row:
                        each = F.cross_entropy(net.net(batch[0][i : i + 1]), batch[1][i : i + 1])
                        loss = loss + share * each
                    optimizer.zero_grad()
                    loss.backward()
                    norm = torch.cat([p.grad.flatten() for p in params]).norm().item()
                    for whole, p in zip(total, params, strict=True):
                        whole += p.grad * min(1.0, LIMIT / norm)
                    count, values = count + 1, [*values, loss.item()]
            for p, whole in zip(params, total, strict=True):
                p.grad = whole / count
            optimizer.step()
            losses.append(sum(values) / count)
    return losses


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("named", NAMES)
def test_epochs_with_a_ragged_last_batch(named, accumulate):
    net, dataset = Net(named), data()
    plain = copy.deepcopy(net)
    trainer(accumulate_grad_batches=accumulate).fit(net, loader(dataset))
    losses = by_hand(plain, dataset, named, accumulate)
    close(net, plain)
    # Lightning divides the loss of every batch by the number of accumulated ones.
    reported = [accumulate * loss for loss in net.losses]
    ends = [1, 2, 4, 5] if accumulate == 2 else range(6)
    assert [reported[i] for i in ends] == pytest.approx(losses)


@pytest.mark.parametrize("named", [("groups",), ("weights", "groups")])
def test_a_mean_is_a_loss_for_groups(named):
    net, other, dataset = Net(named), Net(named, "mean"), data()
    other.load_state_dict(net.state_dict())
    for module in (net, other):
        trainer().fit(module, loader(dataset))
    close(net, other)


def test_a_mean_is_no_loss_for_weights():
    with pytest.raises(ValueError, match=r'loss per sample with sample_weights=.*reduction="none"'):
        trainer().fit(Net(("weights",), "mean"), loader(data()))


@pytest.mark.parametrize("named", NAMES)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, named):
    def make():
        torch.manual_seed(3)
        net = Net(named)
        net.transforms = gf.chain(net.transforms, gf.spike_clip(warmup=1))
        return net

    dataset, whole, half, rest = data(), make(), make(), make()
    trainer(accumulate_grad_batches=2).fit(whole, loader(dataset))
    first = trainer(accumulate_grad_batches=2, max_epochs=1)
    first.fit(half, loader(dataset))
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer(accumulate_grad_batches=2).fit(rest, loader(dataset), ckpt_path=tmp_path / "half.ckpt")
    close(rest, whole, tolerance=0)
    assert not torch.equal(rest.net[0].weight, half.net[0].weight)


@pytest.mark.parametrize("named", NAMES)
def test_what_the_loss_logs_is_the_mean_over_what_takes_part(named):
    net, dataset = Net(named), data(SIZE)
    plain, (x, y, weights, _) = copy.deepcopy(net), dataset.tensors
    fit = trainer(max_epochs=1)
    fit.fit(net, loader(dataset))
    hits = (plain.net(x).argmax(1) == y).double()
    if "groups" in named:
        expected = hits[weights > 0].mean() if "weights" in named else hits.mean()
    else:
        rows = hits.view(M, -1).mean(1)
        own = weights.view(M, -1).sum(1) > 0
        expected = rows[own].mean() if "weights" in named else rows.mean()
    assert fit.callback_metrics["right"] == pytest.approx(expected.item())


def test_batches_that_cannot_be_cut_are_known_before_the_first():
    class Strict(Net):
        sample_groups = FilteredModule.sample_groups

        def microbatch_loss(self, batch):
            raise AssertionError("a batch was met")

    text = r"at least microbatches=4 samples in every batch, found one of 3.*drop_last=True"
    with pytest.raises(ValueError, match=text):
        trainer().fit(Strict(), loader(data(SIZE + 3)))
    with pytest.raises(ValueError, match=r"found one of 2\. Use fewer microbatches"):
        trainer().fit(Strict(), loader(data(), 2))
    strict = Strict()
    strict.uneven = False
    with pytest.raises(ValueError, match=r"last one of 6 samples .* uneven=True"):
        trainer().fit(strict, loader(data()))
    trainer(limit_train_batches=1).fit(Net(), loader(data(SIZE + 3)))
    net = Net(("groups",))
    net.uneven = False
    trainer().fit(net, loader(data(SIZE + 3)))  # samples of any number belong to the rows


def test_groups_out_of_range_are_refused():
    net = Net(("groups",))
    net.microbatches = 3
    with pytest.raises(ValueError, match="Expected groups from 0 to 2, found 3"):
        trainer().fit(net, loader(data()))
