"""Label noise: the number of wrong labels, their samples and values; labels from files."""

import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradfilter.lab._usage import UsageError
from gradfilter.lab.data._load import corrupted, human_labels

KINDS = ("symmetric", "pairflip", "class-concentrated")


@st.composite
def label_sets(draw):
    """Ragged, unsorted labels; a class may be empty."""
    classes = draw(st.integers(2, 12))
    n = draw(st.integers(1, 300))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    weights = random.dirichlet(np.ones(classes))
    return random.choice(classes, n, p=weights), classes


@given(label_sets(), st.floats(0, 0.99), st.sampled_from(KINDS), st.integers(0, 2**40))
def test_exactly_m_labels_change_and_none_onto_the_truth(labels, noise, kind, seed):
    clean, classes = labels
    before, count = clean.copy(), round(noise * len(clean))
    most = sum(int(np.sum(clean == c)) * 4 // 5 for c in range(classes))
    if kind == "class-concentrated" and count > most:
        with pytest.raises(UsageError, match=f"at most {most} of {len(clean)} labels wrong"):
            corrupted(clean, noise, kind, classes=classes, seed=seed)
        return
    noisy = corrupted(clean, noise, kind, classes=classes, seed=seed)
    assert (noisy != clean).sum() == count
    assert noisy.min() >= 0 and noisy.max() < classes and noisy.dtype == np.int64
    np.testing.assert_array_equal(clean, before)
    again = corrupted(clean, noise, kind, classes=classes, seed=seed)
    np.testing.assert_array_equal(noisy, again)


@given(label_sets(), st.floats(0, 0.99), st.integers(0, 99))
def test_pairflip_goes_to_the_next_class(labels, noise, seed):
    clean, classes = labels
    noisy = corrupted(clean, noise, "pairflip", classes=classes, seed=seed)
    wrong = noisy != clean
    np.testing.assert_array_equal(noisy[wrong], (clean[wrong] + 1) % classes)


@given(label_sets(), st.floats(0, 0.8), st.integers(0, 99))
def test_concentrated_noise_fills_class_after_class(labels, noise, seed):
    clean, classes = labels
    left = round(noise * len(clean))
    try:
        noisy = corrupted(clean, noise, "class-concentrated", classes=classes, seed=seed)
    except UsageError:
        return
    for label in range(classes):
        expected = min(left, int(np.sum(clean == label)) * 4 // 5)
        assert np.sum((noisy != clean) & (clean == label)) == expected
        left -= expected


@pytest.mark.parametrize("kind", ["symmetric", "class-concentrated"])
def test_wrong_classes_are_all_alike(kind):
    clean = np.repeat(np.arange(5), 4000)
    noisy = corrupted(clean, 0.5, kind, classes=5, seed=1)
    offsets = np.bincount((noisy - clean)[noisy != clean] % 5, minlength=5)
    # 2 500 of each expected, with a standard deviation of 43.
    assert offsets[0] == 0 and (abs(offsets[1:] - 2500) < 200).all()


def test_samples_are_chosen_from_all_alike_and_by_the_seed_alone():
    clean = np.arange(2000) % 10
    times = sum(corrupted(clean, 0.3, "symmetric", classes=10, seed=s) != clean for s in range(50))
    # 15 of 50 expected for every sample; the halves of the set have as many.
    assert abs(times[:1000].sum() - times[1000:].sum()) < 600
    assert times.min() >= 2 and times.max() <= 33
    torch.manual_seed(1), np.random.seed(1)
    first = corrupted(clean, 0.3, "symmetric", classes=10, seed=7)
    torch.manual_seed(2), np.random.seed(2)
    np.testing.assert_array_equal(first, corrupted(clean, 0.3, "symmetric", classes=10, seed=7))
    assert (first != corrupted(clean, 0.3, "symmetric", classes=10, seed=8)).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": 1.5}, r"--label-noise: expected a fraction in \[0, 1\), found 1.5"),
        ({"noise": 1.0}, "--label-noise"),
        ({"noise": -0.1}, "--label-noise"),
        ({"noise": float("nan")}, "--label-noise"),
        ({"kind": "asymmetric"}, "--noise-type: expected one of symmetric, pairflip, class-con"),
        ({"seed": -1}, "--label-seed"),
        ({"classes": 1}, "--label-noise: expected 0 for one class"),
        ({"kind": "class-concentrated", "noise": 0.9}, "at most 8 of 10 labels wrong"),
    ],
)
def test_bad_values_are_refused_in_one_line(change, message):
    values = {"noise": 0.3, "kind": "symmetric", "classes": 2, "seed": 0} | change
    clean = np.arange(10) % values["classes"]
    with pytest.raises(UsageError, match=message) as caught:
        corrupted(clean, values.pop("noise"), values.pop("kind"), **values)
    assert "\n" not in str(caught.value)


CLEAN = np.array([3, 1, 4, 1, 5, 9, 2, 6])
NOISY = np.array([3, 1, 4, 7, 5, 9, 0, 6])


def saved(path, labels, clean=CLEAN):
    """The labels in the form that the name asks for."""
    if path.suffix == ".npy":
        np.save(path, labels)
    elif path.suffix == ".npz":
        np.savez(path, noisy_label=labels, clean_label=clean)
    elif path.suffix == ".txt":
        np.savetxt(path, labels, fmt="%d")
    else:
        torch.save({"noisy_label": labels, "clean_label": clean, "more": np.arange(2)}, path)
    return path


@pytest.mark.parametrize("name", ["human.pt", "human.npy", "human.npz", "human.txt"])
def test_labels_that_people_gave_are_read(tmp_path, name):
    found = human_labels(saved(tmp_path / name, NOISY), CLEAN, classes=10)
    np.testing.assert_array_equal(found, NOISY)
    assert found.dtype == np.int64


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.ndarray.tolist, torch.tensor])
def test_torch_files_of_any_integers_are_read(tmp_path, kind):
    convert = (lambda x: x.astype(kind)) if isinstance(kind, type) else kind
    path = saved(tmp_path / "human.pt", convert(NOISY), convert(CLEAN))
    np.testing.assert_array_equal(human_labels(path, CLEAN, classes=10), NOISY)


def test_arrays_pickled_by_numpy_1_are_read(tmp_path):
    path = tmp_path / "human.pt"
    # The old file format is the bare pickle, in which the module's old name has its old length.
    torch.save(
        {"noisy_label": NOISY, "clean_label": CLEAN}, path, _use_new_zipfile_serialization=False
    )
    old = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old
    path.write_bytes(old)
    np.testing.assert_array_equal(human_labels(path, CLEAN, classes=10), NOISY)


class Mark:
    """Executed when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_foreign_pickle_is_not_executed(tmp_path):
    mark = tmp_path / "mark"
    hostile = {"noisy_label": Mark(mark)}
    files = {name: tmp_path / name for name in ("a.pt", "b.pt", "c.npy", "d.npz")}
    torch.save(hostile, files["a.pt"])
    files["b.pt"].write_bytes(pickle.dumps(hostile))
    array = np.array([Mark(mark)], dtype=object)
    np.save(files["c.npy"], array, allow_pickle=True)
    np.savez(files["d.npz"], noisy_label=array)
    for path in files.values():
        with pytest.raises(UsageError, match="--noise-file") as caught:
            human_labels(path, CLEAN, classes=10)
        assert "\n" not in str(caught.value)
        assert not mark.exists()
    with pytest.raises(UsageError, match="which was not executed"):
        human_labels(files["a.pt"], CLEAN, classes=10)
    torch.load(io.BytesIO(files["a.pt"].read_bytes()), weights_only=False)["noisy_label"].close()
    assert mark.exists()  # it would have been


def test_the_allowed_names_are_taken_back(tmp_path):
    human_labels(saved(tmp_path / "human.pt", NOISY), CLEAN, classes=10)
    assert np.ndarray not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", {"noisy_label": NOISY, "clean_label": NOISY}, "the data set's own true labels"),
        ("a.pt", {"noisy_label": NOISY[1:], "clean_label": CLEAN}, "8 labels, found 7 labels in n"),
        ("a.pt", {"noisy_label": NOISY, "clean_label": CLEAN[1:]}, "found 7 labels in clean_label"),
        ("a.pt", {"clean_label": CLEAN}, "no 'noisy_label'"),
        ("a.pt", {"noisy_label": NOISY / 1.0}, "a pickle of something else"),
        ("a.pt", {"noisy_label": [[1], [1, 2]]}, "'noisy_label' of another form"),
        ("a.pt", {"noisy_label": NOISY + 1}, r"expected labels 0 .. 9, found 1 .. 10"),
        ("a.pt", {"noisy_label": "no"}, "'noisy_label' of type"),
        ("a.pt", b"", "a file that cannot be read"),
        ("a.npy", b"nothing", "a file that cannot be read"),
        ("a.npz", b"PK\3\4 nothing", "a file that cannot be read"),
        ("a.txt", b"1\ntwo\n", "a file that cannot be read"),
        ("a.txt", b"1\n", "8 labels, found 1 labels"),
        ("missing.pt", None, "--noise-file: expected a file, found"),
    ],
    ids=range(14),
)
def test_other_files_are_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UsageError, match=message) as caught:
        human_labels(path, CLEAN, classes=10)
    assert "\n" not in str(caught.value)
