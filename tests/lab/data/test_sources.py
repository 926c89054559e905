"""Data sets on disk: CIFAR in torchvision's layout, folders of images, files of labels."""

import hashlib
import os
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from _lab_data import CPU, everything, refused
from gradfilter.lab._usage import UsageError
from gradfilter.lab.data._load import load_data

EACH = 12  # images in every file of the small CIFAR

# CIFAR


@pytest.fixture(params=["cifar10", "cifar100"])
def small(request, tmp_path, monkeypatch):
    """CIFAR as it lies on disk, with few images in it, for torchvision's own reader."""
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[request.param]
    directory, random = tmp_path / kind.base_folder, np.random.default_rng(0)
    directory.mkdir()
    key, classes = ("labels", 10) if kind is CIFAR10 else ("fine_labels", 100)
    sums, parts = {}, {}

    def write(name, content):
        (directory / name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5((directory / name).read_bytes()).hexdigest()

    for name, _ in (*kind.train_list, *kind.test_list):
        pixels = random.integers(0, 256, (EACH, 3072), dtype=np.uint8)
        labels = [(3 * i + len(parts)) % classes for i in range(EACH)]
        write(name, {"data": pixels, key: labels})
        parts[name] = pixels, labels
    write(kind.meta["filename"], {kind.meta["key"]: [str(i) for i in range(classes)]})
    for which in ("train_list", "test_list"):
        listed = [[name, sums[name]] for name, _ in getattr(kind, which)]
        monkeypatch.setattr(kind, which, listed)
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums[kind.meta["filename"]]})
    return request.param, tmp_path, kind, parts


def test_cifar_is_read_and_normalised_per_channel(small):
    name, path, kind, parts = small
    data = load_data(name, data_dir=path, device=CPU, dtype=torch.float64)
    files = [parts[file] for file, _ in kind.train_list]
    raw = torch.from_numpy(np.concatenate([p for p, _ in files]).reshape(-1, 3, 32, 32)).double()
    mean, std = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023)),
    }[name]
    images = everything(data.train)
    for c in range(3):
        assert torch.allclose(images[:, c], (raw[:, c] / 255 - mean[c]) / std[c])
    assert data.train.labels.tolist() == [label for _, labels in files for label in labels]
    assert data.train.ids.tolist() == list(range(len(raw)))
    assert (data.classes, data.shape) == (10 if name == "cifar10" else 100, (3, 32, 32))
    assert data.train.images.source.dtype == torch.uint8
    held, labels = parts[kind.test_list[0][0]]
    assert data.test.labels.tolist() == labels
    assert torch.equal(data.test.images.source, torch.from_numpy(held.reshape(-1, 3, 32, 32)))


def test_cifar_splits_keep_the_original_indices(small):
    name, path, *_ = small
    whole = load_data(name, data_dir=path, device=CPU)
    data = load_data(name, data_dir=path, val_split=5, label_noise=0.5, device=CPU, resident=False)
    for part in (data.train, data.val):
        assert torch.equal(everything(part), everything(whole.train)[part.ids])
        assert torch.equal(part.clean, whole.train.labels[part.ids])
    assert data.train.wrong.sum() == round(0.5 * len(data.train))


def test_human_labels_follow_their_images_through_the_split(small):
    name, path, *_ = small
    if name == "cifar10":
        refused("--noise-file: expected none for", name, data_dir=path, noise_file=path / "h.pt")
        return
    clean = load_data(name, data_dir=path, device=CPU).train.labels.numpy()
    noisy = np.where(np.arange(EACH) % 3 == 0, (clean + 7) % 100, clean)
    torch.save({"noisy_label": noisy, "clean_label": clean}, path / "human.pt")
    human = "cifar100n-fine"
    data = load_data(human, data_dir=path, val_split=4, noise_file=path / "human.pt", device=CPU)
    assert (data.train.labels.numpy() == noisy[data.train.ids]).all()
    assert torch.equal(data.train.wrong, data.train.ids % 3 == 0)
    assert not data.val.wrong.any() and data.name == human
    by_name = load_data(f"{human}:{path / 'human.pt'}", data_dir=path, val_split=4, device=CPU)
    assert torch.equal(by_name.train.labels, data.train.labels)
    refused("--data: expected a file for cifar100n-fine", human, data_dir=path)
    refused("--label-noise: expected 0", f"{human}:a.pt", data_dir=path, label_noise=0.1)
    refused("--noise-file: expected one", f"{human}:a.pt", data_dir=path, noise_file=path / "b.pt")
    torch.save({"noisy_label": noisy, "clean_label": noisy}, path / "other.pt")
    refused("the data set's own true labels", f"{human}:{path / 'other.pt'}", data_dir=path)


def test_a_damaged_cifar_is_not_read(small):
    name, path, kind, _ = small
    with (path / kind.base_folder / kind.test_list[0][0]).open("ab") as file:
        file.write(b".")
    refused("found none or a damaged one. gradfilter train --download", name, data_dir=path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_missing_cifar_is_one_line_and_fetched_only_when_asked_for(name, tmp_path, monkeypatch):
    asked = []
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]

    def no_network(self):
        asked.append(name)
        raise OSError("no\nroute")

    monkeypatch.setattr(kind, "download", no_network)
    refused(
        rf"--data-dir: .* {kind.base_folder}.*--download.* unpack http", name, data_dir=tmp_path
    )
    assert not asked and not os.listdir(tmp_path)
    refused("found: no route. Fetch http", name, data_dir=tmp_path, download=True)
    assert asked


# Folders


def fill(path, classes=("cat", "dog"), sizes=((40, 20), (20, 30), (8, 8))):
    """Uniformly coloured images, class by class; the colour is the number of the image."""
    for c, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for i, size in enumerate(sizes):
            Image.new("RGB", size, (10 * i, 100 * c, 7)).save(path / name / f"{i}.png")


def test_folders_are_read_resized_and_cropped(tmp_path):
    fill(tmp_path / "train"), fill(tmp_path / "val", sizes=((9, 9),))
    name = f"folder:{tmp_path}"
    data = load_data(name, image_size=16, device=CPU, dtype=torch.float64)
    assert data.name == f"folder-{tmp_path.name}" and data.classes == 2 and data.augmentable
    images = everything(data.train) * data.std + data.mean
    assert images.shape == (6, *data.shape) and data.shape == (3, 16, 16)
    for i in range(6):
        colour = torch.tensor([10 * (i % 3), 100 * (i // 3), 7]) / 255
        assert torch.allclose(images[i], colour.double()[:, None, None].expand(3, 16, 16))
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and len(data.test) == 2
    assert len(data.val) == 0 and not data.train.images.resident
    split_off = load_data(name, image_size=16, val_split=2, device=CPU).val
    raw = data.train.images.source[split_off.ids]
    assert torch.equal(split_off.images.source[torch.arange(2)], raw)
    fill(tmp_path / "test", sizes=((9, 9),) * 2)
    given = load_data(name, image_size=16, device=CPU)
    assert (len(given.train), len(given.val), len(given.test)) == (6, 2, 4)
    refused("--val-split: expected none", name, val_split=2)


def test_the_crop_is_the_centre_of_the_shorter_side_at_eight_sevenths(tmp_path):
    fill(tmp_path / "train"), fill(tmp_path / "val")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    picture = tmp_path / "train" / "cat" / "0.png"
    Image.fromarray(pixels).save(picture)
    data = load_data(f"folder:{tmp_path}", image_size=28, device=CPU)
    found = data.train.images.source[torch.tensor([0])][0]
    # 28 · 8/7 is 32: nothing to resize, rows 2 .. 29 and columns 10 .. 37 are the centre.
    assert (found.permute(1, 2, 0).numpy() == pixels[2:30, 10:38]).all()
    picture.write_bytes(b"not an image")
    with pytest.raises(UsageError, match="--data: expected an image, found"):
        data.train.images.fetch(torch.tensor([0]))


def test_folders_that_lack_something_are_refused(tmp_path):
    refused("'folder'", "folder:")
    refused("--data: expected a folder per class with images in", f"folder:{tmp_path / 'none'}")
    fill(tmp_path / "train")
    refused("val", f"folder:{tmp_path}")
    fill(tmp_path / "val", classes=("cat", "eel"))
    refused(r"others in .*val.*: \['dog', 'eel'\]", f"folder:{tmp_path}")
    (tmp_path / "train" / "ape").mkdir()
    refused("ape", f"folder:{tmp_path}")


def test_without_torchvision_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    refused(r'expected torchvision for cifar10, .* pip install "gradfilter\[lab\]"', "cifar10")
    refused("torchvision", "folder:somewhere")
