"""The files of a measurement: their names, their content, and how parts are joined."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradfilter.lab._usage import UsageError
from gradfilter.lab.stats._measurement import missing, share
from gradfilter.lab.stats._stats_config import StatsConfig
from gradfilter.lab.stats._stats_files import (
    StatsRecord,
    appending,
    count_missing,
    document,
    finished,
    join_ranges,
    join_records,
    means,
    origin_of,
    part_path,
    parts,
    read,
    records_of,
    stem,
    with_range,
    without_nan,
    write,
)

ORIGIN = {"settings": {"metric": "jacobian"}, "checkpoint": {"id": 3}}
NAN, INF = float("nan"), float("inf")


def record(start, stop, residual=None):
    places = list(range(start, stop))
    return StatsRecord(
        start,
        stop,
        [10 * place for place in places],
        [place % 3 for place in places],
        [place % 2 for place in places],
        [place + 0.5 for place in places],
        residual=residual,
    )


# Names


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "crossentropy-train-checkpoint-2"),
        ({"outname": "run7", "dataset_split": "test"}, "run7-crossentropy-test-checkpoint-2"),
        ({"restored_targets": True}, "crossentropy-train-restored-targets-checkpoint-2"),
        ({"gen_strategy": "4px-shifts"}, "crossentropy-train-4px-shifts-checkpoint-2"),
        (
            {"gen_strategy": "svd-path", "num_directions": 4, "cumulative": True},
            "crossentropy-train-svd-path-num-directions-4-cumulative-checkpoint-2",
        ),
        (
            {"metric": "jacobian", "normalization": "softmax", "target_logit_only": True},
            "jacobian-train-softmax-target-logit-only-checkpoint-2",
        ),
        (
            {"metric": "jacobian_operator_norm", "method": "power", "num_power_iters": 9},
            "jacobian_operator_norm-train-power-num-power-iters-9-checkpoint-2",
        ),
        (
            {"metric": "tangent_jacobian", "legacy_scale": True, "mc_sample_seed": 5},
            "tangent_jacobian-train-legacy-scale-mc-sample-seed-5-checkpoint-2",
        ),
        (
            {"metric": "sharpness", "rho": 0.1, "batch_size": 32},
            "sharpness-train-batch-size-32-rho-0.1-checkpoint-2",
        ),
    ],
)
def test_name_says_every_setting_that_changes_the_numbers(settings, expected):
    assert stem(StatsConfig(**settings), 2) == expected


def test_what_changes_nothing_is_not_in_the_name():
    settings = {"mc_sample_seed": 4, "num_power_iters": 3, "batch_size": 7, "bigmem": True}
    assert stem(StatsConfig(**settings, num_directions=3), 0) == "crossentropy-train-checkpoint-0"


def test_a_part_of_the_split_says_which():
    assert with_range("a", 0, 10, 10) == "a"
    assert with_range("a", 0, 5, 10) == "a-id-0-5"
    assert with_range("a", 5, 10, 10) == "a-id-5-10"


# Numbers


def test_what_is_no_number_becomes_null_and_is_counted():
    plain = without_nan([[1.0, NAN], [INF, -INF], [2.0, 3.0]])
    assert plain == [[1.0, None], [None, None], [2.0, 3.0]]
    assert count_missing(plain) == 3


def test_means_are_over_the_numbers_that_there_are():
    rows = [[3.0, None, None], [4.0, 2.0, None]]
    assert means(rows) == [3.5, 2.0, None]
    assert means(rows, square=True) == [pytest.approx(12.5**0.5), 2.0, None]
    assert means([[[1.0], [2.0]], [[3.0], [4.0]]]) == [[2.0], [3.0]]


def test_document_has_columns_and_metadata():
    bad = StatsRecord(2, 3, [20], [1], [0], [None], residual=1e-3)
    found = document([record(0, 2, residual=1e-5), bad], ORIGIN)
    assert list(found) == ["sample_ids", "targets", "ground_truths", "stats", "metadata"]
    assert found["sample_ids"] == [0, 10, 20] and found["stats"] == [0.5, 1.5, None]
    metadata = found["metadata"]
    assert metadata["aggregate"] == {"mean": 1.0}
    assert (metadata["nulls"], metadata["largest_residual"]) == (1, 1e-3)
    assert metadata["checkpoint"] == {"id": 3} and metadata["samples"] == [0, 3]


def test_operator_norms_have_a_lipschitz_constant():
    origin = {"settings": {"metric": "jacobian_operator_norm"}}
    aggregate = document([record(0, 4)], origin)["metadata"]["aggregate"]
    assert aggregate["mean"] == 2.0
    assert aggregate["lipschitz"] == pytest.approx((21 / 4) ** 0.5)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0.5, 1.0, 8.0, 3.0], [0.1, None, 4.0, 1.0]], 2 * 6 / 2),  # not a mean of quotients
        ([[0.5, None, 8.0, -3.0], [0.1, None, 4.0, 1.0]], None),  # drowned
        ([[None] * 4], None),
    ],
)
def test_noise_scale_of_all_batches_is_one_quotient(rows, expected):
    origin = {"settings": {"metric": "agreement", "batch_size": 8, "microbatches": 4}}
    batches = [
        StatsRecord(4 * i, 4 * i + 4, [4 * i], [0], [0], [row]) for i, row in enumerate(rows)
    ]
    aggregate = document(batches, origin)["metadata"]["aggregate"]
    assert aggregate["simple_noise_scale"] == expected
    assert aggregate["mean"][0] == (None if rows[0][0] is None else pytest.approx(0.3))


def test_document_round_trips(tmp_path):
    path = tmp_path / "a.json"
    whole = document([record(0, 2), record(2, 5)], ORIGIN)
    write(path, whole)
    assert json.loads(path.read_text()) == whole == read(path)
    again = document(records_of(whole), origin_of(whole))
    assert again == whole


OLD = {**ORIGIN, "axes": ["sample", "column"]}
"""What versions wrote that had a list of one number per sample."""


def test_an_older_file_is_read_as_it_would_be_written_now(tmp_path):
    now = document([record(0, 3)], {**ORIGIN, "axes": ["sample"]})
    aggregate = {"aggregate": {"mean": [now["metadata"]["aggregate"]["mean"]]}}
    old = {
        **now,
        "stats": [[number] for number in now["stats"]],
        "metadata": {**now["metadata"], "axes": OLD["axes"], **aggregate},
    }
    write(tmp_path / "a.json", old)
    assert read(tmp_path / "a.json") == now


def test_an_older_part_goes_on(tmp_path):
    path = part_path(tmp_path, "a", 0)
    with appending(path, OLD) as append:
        append(replace(record(0, 4), stats=[[number] for number in record(0, 4).stats]))
    facts = {**ORIGIN, "axes": ["sample"]}
    with appending(path, facts) as append:
        append(record(4, 8))
    assert finished(path, facts) == [record(0, 4), record(4, 8)]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"metadata": {}}', "\x00"])
def test_another_file_in_the_place_is_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UsageError, match="not a file of numbers"):
        read(path)


# Shards


@given(
    start=st.integers(0, 5),
    length=st.integers(1, 30),
    batch_size=st.integers(1, 8),
    size=st.integers(1, 4),
    done=st.sets(st.integers(0, 30)),
)
def test_shards_are_disjoint_complete_and_keep_their_batches(start, length, batch_size, size, done):
    stop = start + length
    everything = missing(start, stop, [], batch_size)
    assert [place for a, b in everything for place in range(a, b)] == [*range(start, stop)]
    assert all(b - a == batch_size for a, b in everything[:-1])
    before = [record(a, b) for i, (a, b) in enumerate(everything) if i in done]
    rest = missing(start, stop, before, batch_size)
    assert rest == [batch for i, batch in enumerate(everything) if i not in done]
    shares = [share(rest, rank, size) for rank in range(size)]
    assert [batch for part in shares for batch in part] == rest
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    whole = join_records(
        [*(record(a, b) for part in shares[::-1] for a, b in part), *before], start, stop
    )
    assert [r.start for r in whole] == [a for a, _ in everything]


@pytest.mark.parametrize(
    ("ranges", "what"),
    [
        ([(0, 4), (6, 10)], "4 to 5 are missing"),
        ([(2, 10)], "0 to 1 are missing"),
        ([(0, 9)], "9 to 9 are missing"),
        ([(0, 6), (4, 10)], "4 is there twice"),
        ([(0, 10), (0, 10)], "0 is there twice"),
        ([], "0 to 9 are missing"),
    ],
)
def test_parts_that_do_not_fit_are_refused(ranges, what):
    with pytest.raises(UsageError, match=what):
        join_records([record(a, b) for a, b in ranges], 0, 10)


def test_a_sample_under_two_places_is_refused():
    twice = StatsRecord(2, 3, [10], [0], [0], [1.0])
    with pytest.raises(UsageError, match="id is there twice"):
        join_records([record(0, 2), twice], 0, 3)


# Parts


def test_parts_go_on_where_they_were(tmp_path):
    path = part_path(tmp_path, "a", 0)
    with appending(path, ORIGIN) as append:
        append(record(0, 4))
    with appending(path, ORIGIN) as append:
        append(record(4, 8, residual=0.1))
    assert finished(path, ORIGIN) == [record(0, 4), record(4, 8, residual=0.1)]


@pytest.mark.parametrize("cut", range(1, 260, 7))
def test_half_a_line_does_not_count_and_is_written_again(tmp_path, cut):
    path = part_path(tmp_path, "a", 0)
    with appending(path, ORIGIN) as append:
        append(record(0, 4))
        append(record(4, 8))
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    done = finished(path, ORIGIN)
    assert done == [record(0, 4), record(4, 8)][: len(done)] and len(done) < 2
    with appending(path, ORIGIN) as append:
        for batch in [record(0, 4), record(4, 8)][len(done) :]:
            append(batch)
    assert path.read_bytes() == content


def test_a_part_of_another_measurement_is_refused(tmp_path):
    path = part_path(tmp_path, "a", 0)
    with appending(path, ORIGIN):
        pass
    with pytest.raises(UsageError, match="other checkpoint"):
        finished(path, {**ORIGIN, "checkpoint": {"id": 4}})
    path.write_text('{"settings": 1}\nnonsense\n')
    with pytest.raises(UsageError, match="is not JSON"):
        finished(path, ORIGIN)


def test_parts_of_other_measurements_are_not_found(tmp_path):
    for name in ("a-id-0.jsonl", "a-id-12.jsonl", "a-id-0-5-id-0.jsonl", "b-a-id-0.jsonl"):
        (tmp_path / name).touch()
    assert [path.name for path in parts(tmp_path, "a")] == ["a-id-0.jsonl", "a-id-12.jsonl"]


# Ranges by hand


def ranges(folder, *pairs, origin=ORIGIN):
    for a, b in pairs:
        write(folder / f"a-id-{a}-{b}.json", document([record(a, b)], origin))


def test_ranges_are_joined_once_they_cover_the_split(tmp_path):
    ranges(tmp_path, (0, 4), (6, 10))
    assert join_ranges(tmp_path, "a", 10) is None
    ranges(tmp_path, (4, 6), (4, 5))
    (tmp_path / "a-id-0.json").touch()  # whatever it is, it is no range
    assert join_ranges(tmp_path, "a", 10) == tmp_path / "a.json"
    assert read(tmp_path / "a.json") == document([record(0, 10)], ORIGIN)


def test_ranges_do_not_replace_a_whole_file(tmp_path):
    ranges(tmp_path, (0, 4), (4, 10))
    (tmp_path / "a.json").write_text("mine")
    assert join_ranges(tmp_path, "a", 10) is None
    assert (tmp_path / "a.json").read_text() == "mine"


def test_ranges_that_were_measured_differently_are_not_joined(tmp_path):
    ranges(tmp_path, (0, 4))
    ranges(tmp_path, (4, 10), origin={**ORIGIN, "checkpoint": {"id": 4}})
    assert join_ranges(tmp_path, "a", 10) is None
    assert not (tmp_path / "a.json").exists()
