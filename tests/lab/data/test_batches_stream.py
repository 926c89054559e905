"""Augmented batches, and the stream that delivers batch after batch."""

import multiprocessing
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from _lab_data import CPU
from gradfilter.lab._usage import UsageError
from gradfilter.lab.data._batches import augmentation, batches, crop_and_flip, in_order, shuffled
from gradfilter.lab.data._load import load_data
from gradfilter.lab.data._samples import Images, Normalise, Samples

# Augmentation


def one_by_one(images, seed, step, flipped_only):
    """Sample by sample, pixel by pixel, from the same draws."""
    n, _, height, width = images.shape
    random = np.random.default_rng([seed, *b"augment", step])
    result = torch.zeros_like(images)
    for i, (top, left, flip) in enumerate(random.integers(0, (9, 9, 2), (n, 3))):
        if flipped_only and not flip:
            top = left = 4
        for y in range(height):
            for x in range(width):
                from_y, from_x = y + top - 4, (width - 1 - x if flip else x) + left - 4
                if 0 <= from_y < height and 0 <= from_x < width:
                    result[i, :, y, x] = images[i, :, from_y, from_x]
    return result


@pytest.mark.parametrize("flipped_only", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_augmentation_equals_a_loop_over_samples(flipped_only, dtype):
    images = torch.randint(1, 256, (12, 2, 7, 9)).to(dtype)
    before = images.clone()
    for step in (0, 3):
        found = crop_and_flip(images, 5, step, flipped_only=flipped_only)
        expected = one_by_one(images, 5, step, flipped_only)
        assert torch.equal(found, expected) and found.dtype == dtype
    assert torch.equal(images, before)
    torch.manual_seed(1)
    assert torch.equal(found, crop_and_flip(images, 5, 3, flipped_only=flipped_only))
    assert not torch.equal(found, crop_and_flip(images, 6, 3, flipped_only=flipped_only))


def test_shifts_and_flips_are_uniform_and_unflipped_images_may_stay_whole():
    # Rows 1 .. 9, no zero among them, so that the shift of each image can be read off.
    images = torch.arange(1, 10).view(1, 1, 9, 1).expand(4000, 1, 9, 9).contiguous()
    middle = crop_and_flip(images, 0, 0)[:, 0, 4, 4]
    counts = torch.bincount(middle[middle > 0], minlength=10)[1:]
    assert (abs(counts / counts.sum() - 1 / 9) < 0.02).all()
    across = torch.arange(1, 10).view(1, 1, 1, 9).expand(4000, 1, 9, 9).contiguous()
    found = crop_and_flip(across, 0, 0, flipped_only=True)
    whole = (found == across).flatten(1).all(1)
    assert abs(whole.float().mean() - 0.5) < 0.03
    moved = found[~whole][:, 0, 4]  # a whole row, decreasing where it is flipped
    assert (moved[:, 4] > moved[:, 5]).logical_or(moved[:, 5] == 0).all()


def test_parts_are_augmented_as_they_would_be_in_the_whole():
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    whole = crop_and_flip(images, 5, 3)
    parts = [crop_and_flip(part, 5, 3, part=(i, 3)) for i, part in enumerate(images.chunk(3))]
    assert torch.equal(torch.cat(parts), whole)


def test_what_must_not_be_flipped_is_refused():
    with pytest.raises(UsageError, match="--augmentation: expected none for digits"):
        augmentation(load_data("digits", device=CPU))


# Streams


def samples_of(source, resident, dtype=torch.float64):
    mean = torch.tensor([0.4, 0.5, 0.6], dtype=dtype).view(3, 1, 1)
    labels = torch.arange(len(source)) * 7 % 5
    images = Images(source, Normalise(255, mean, mean / 2), resident)
    return Samples(images, labels, labels, torch.arange(len(source)))


def seen(stream):
    return [(x.clone(), y) for x, y in stream]


def same(one, other):
    assert len(one) == len(other)
    for (x, y), (u, v) in zip(one, other, strict=True):
        assert torch.equal(x, u) and (y == v if isinstance(y, slice) else torch.equal(y, v))


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)


def test_the_stream_gives_what_indices_and_augmentation_say(pixels):
    samples = samples_of(pixels, resident=True)
    indices = shuffled(40, batch_size=6, seed=0)
    mean = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64).view(3, 1, 1)
    options = {"augment": crop_and_flip, "seed": 9, "first_step": 4}
    found = seen(batches(samples, indices(4, 7), **options))
    assert len(found) == 3
    for step, (x, y) in zip(range(4, 7), found, strict=True):
        row = indices(step, step + 1)[0]
        # Zeros come in at the border of raw pixels: they are black.
        raw = one_by_one(pixels[row], 9, step, False)
        assert torch.allclose(x, (raw.double() / 255 - mean) / (mean / 2))
        assert torch.equal(y, samples.labels[row])
    plain = seen(batches(samples, indices(4, 7)))
    assert torch.equal(plain[0][0], samples.images.fetch(indices(4, 5)[0]))
    rest = seen(batches(samples, indices(6, 7), **options | {"first_step": 6}))
    same(found[2:], rest)
    assert seen(batches(samples, indices(4, 4), **options)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_do_not_depend_on_workers_or_on_where_images_are(pixels, dtype):
    indices = shuffled(40, batch_size=6, seed=0)(0, 9)
    options = {"augment": crop_and_flip, "seed": 9, "first_step": 2}
    expected = seen(batches(samples_of(pixels, True, dtype), indices, **options))
    assert expected[0][0].dtype == dtype
    before = torch.get_rng_state()
    for workers in (0, 1, 2):
        found = seen(batches(samples_of(pixels, False, dtype), indices, workers=workers, **options))
        same(found, expected)
    same(seen(batches(samples_of(pixels, False, dtype), list(indices), **options)), expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert not multiprocessing.active_children()


def test_workers_end_with_the_iterator(pixels):
    stream = batches(samples_of(pixels, False), torch.arange(40).view(10, 4), workers=2)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert not multiprocessing.active_children()


def test_in_order_gives_everything_once_and_the_last_chunk_too(pixels):
    resident, loaded = samples_of(pixels, True), samples_of(pixels, False)
    expected = resident.images.fetch(torch.arange(40))
    chunks = seen(in_order(resident, 12))
    assert [len(x) for x, _ in chunks] == [12, 12, 12, 4]
    assert torch.equal(torch.cat([x for x, _ in chunks]), expected)
    assert torch.equal(torch.cat([resident.labels[where] for _, where in chunks]), resident.labels)
    same(chunks, seen(in_order(loaded, 12, workers=2)))
    part = seen(in_order(loaded, 12, start=5, stop=30))
    assert [where for _, where in part] == [slice(5, 17), slice(17, 29), slice(29, 30)]
    assert torch.equal(torch.cat([x for x, _ in part]), expected[5:30])
    assert [where for _, where in in_order(resident, 30, start=35, stop=99)] == [slice(35, 40)]
    assert list(in_order(samples_of(pixels[:0], False), 12, workers=2)) == []
    with pytest.raises(UsageError, match="--batch-size"):
        next(in_order(resident, 0))
    with pytest.raises(UsageError, match="--workers: expected at least 0"):
        next(in_order(loaded, 3, workers=-1))


def test_files_are_decoded_by_workers_and_a_broken_one_is_one_line(tmp_path):
    random = np.random.default_rng(0)
    for part, n in (("train", 6), ("val", 1)):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = random.integers(0, 256, (11, 13, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    data = load_data(f"folder:{tmp_path}", image_size=8, device=CPU, label_noise=0.25)
    table = shuffled(12, batch_size=4, seed=0)(0, 6)
    options = {"augment": augmentation(data, flipped_only=True), "seed": 1}
    found = seen(batches(data.train, table, workers=2, **options))
    same(found, seen(batches(data.train, table, **options)))
    counts = Counter(label for _, y in found for label in y.tolist())
    assert counts == Counter(data.train.labels.tolist() * 2)
    (tmp_path / "train" / "a" / "3.png").write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(UsageError, match=r"found .*3.png', which cannot be read") as caught:
            seen(batches(data.train, table, workers=workers))
        assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_gives_the_same_and_the_host_does_not_wait(pixels):
    def there(resident):
        on_host = samples_of(pixels, resident)
        source = pixels.cuda() if resident else pixels
        normalise = Normalise(255, *(t.cuda() for t in (on_host.images.normalise.mean,) * 2))
        labels = on_host.labels.cuda()
        return Samples(Images(source, normalise, resident), labels, labels, labels)

    indices = shuffled(40, batch_size=6, seed=0)(0, 9)
    options = {"augment": crop_and_flip, "seed": 9}
    torch.cuda.set_sync_debug_mode("error")
    try:
        resident = seen(batches(there(True), indices, **options))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for workers in (0, 2):
        same(seen(batches(there(False), indices, workers=workers, **options)), resident)
    mean = samples_of(pixels, True).images.normalise.mean
    host = Images(pixels, Normalise(255, mean, mean), True)
    for x, row in zip((x for x, _ in resident), enumerate(indices), strict=True):
        raw = crop_and_flip(host.source[row[1]], 9, row[0])
        assert torch.allclose(x.cpu(), host.normalise(raw))
