import dataclasses
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.exceptions import ContractError
from schemas.journal import (
    LARGEST_PIECE,
    Journal,
    TornError,
    decode,
    decode_all,
    encode,
    encode_all,
    join,
)

EVENT = np.dtype([("user", "<u8"), ("time", "<i8"), ("rating", "<f4"), ("action", "u1")])


def make(rows: int, width: int = 60, recents: int = 40, seed: int = 0) -> Journal:
    random = np.random.default_rng(seed)

    def hashes(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
        return random.integers(0, 2**64, shape or rows, np.uint64)

    features = random.normal(size=(rows, width)).astype(np.float32)
    features[random.random(features.shape) < 0.3] = np.nan
    events = np.frombuffer(random.bytes(rows * EVENT.itemsize), EVENT)
    return Journal(
        topics=random.integers(0, 3, rows).astype(np.uint8),
        offsets=np.arange(rows) + 1000,
        steps=np.arange(rows, dtype=np.uint64) + 77,
        seqs=np.arange(rows, dtype=np.uint64),
        events=events.view(f"V{EVENT.itemsize}"),
        duplicates=random.random(rows) < 0.1,
        features=features,
        item_versions=hashes(),
        item_attributes_versions=hashes(),
        user_attributes_versions=hashes(),
        item_vectors=hashes(),
        recents=hashes(recents, 3),
        feature_hash="0badcafe",
        layout_hash="12345678",
        encoder="",
        partition_state=random.bytes(48),
        ends=(1000 + rows, -1, 7),
    )


def assert_same(left: Journal, right: Journal) -> None:
    for field in dataclasses.fields(Journal):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), field.name
        else:
            assert a == b, field.name


@settings(max_examples=30)
@given(
    rows=st.integers(0, 30),
    width=st.integers(1, 70),
    recents=st.integers(0, 20),
    seed=st.integers(0, 2**32),
)
def test_what_is_encoded_is_decoded(rows: int, width: int, recents: int, seed: int) -> None:
    journal = make(rows, width, recents, seed)
    (value,) = encode(journal)
    piece = decode(value)
    assert (piece.index, piece.count, len(piece.journal)) == (0, 1, rows)
    assert_same(piece.journal, journal)


def test_a_workers_first_journal_does_not_load_pandas() -> None:
    code = (
        "import sys\n"
        "from schemas.journal import TornError, encode\n"
        "from tests.unit.schemas.test_journal import make\n"
        "encode(make(3))\n"
        "sys.exit('pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    assert done.returncode == 0


def test_events_are_viewed_as_what_they_were() -> None:
    journal = make(5)
    assert (decode(encode(journal)[0]).journal.events.view(EVENT)["user"] > 0).all()


def test_a_long_transaction_is_cut_and_joined() -> None:
    journal = make(4_000, recents=9_000)
    values = encode(journal)
    assert len(values) > 2
    assert all(len(value) <= LARGEST_PIECE for value in values)
    pieces = [decode(value) for value in values]
    assert [piece.index for piece in pieces] == list(range(len(values)))
    assert_same(join([piece.journal for piece in pieces]), journal)


def test_partitions_that_are_encoded_together_are_as_each_alone() -> None:
    journals = [make(5), make(4_000, recents=9_000, seed=1), make(3, recents=0, seed=2)]
    together = encode_all(journals)
    assert [len(values) > 1 for values in together] == [False, True, False]
    for values, journal in zip(together, journals, strict=True):
        assert_same(join([decode(value).journal for value in values]), journal)


def test_recents_alone_are_cut_too() -> None:
    values = encode(make(1, recents=60_000))
    assert len(values) > 1
    assert all(len(value) <= LARGEST_PIECE + 4096 for value in values)


def test_transactions_are_read_one_after_another() -> None:
    long, short = make(3_000), make(2, seed=1)
    values = [*encode(long), *encode(short)]
    offsets = [*range(10, 10 + len(values) - 1), 90]  # a commit marker takes an offset
    first, second = decode_all(zip(offsets, values, strict=True))
    assert (first.first_offset, first.last_offset) == (10, 10 + len(values) - 2)
    assert (second.first_offset, second.last_offset) == (90, 90)
    assert_same(first.journal, long)
    assert_same(second.journal, short)


@pytest.mark.parametrize("missing", [0, 1, -1])
def test_a_missing_piece_is_an_error(missing: int) -> None:
    values = dict(enumerate(encode(make(4_000))))
    del values[missing % len(values)]
    with pytest.raises(ContractError, match=r"part of a transaction is missing|that has more"):
        list(decode_all(values.items()))


@pytest.mark.parametrize("missing", [0, 1, -1])
def test_what_comes_after_a_missing_piece_is_read_where_it_may_be_missing(missing: int) -> None:
    first, torn, last = (encode(make(4_000, seed=seed)) for seed in range(3))
    values = dict(enumerate([*first, *torn, *last]))
    del values[len(first) + missing % len(torn)]
    told: list[TornError] = []
    whole = list(decode_all(values.items(), on_torn=told.append))
    assert [each.first_offset for each in whole] == [0, len(first) + len(torn)]
    assert_same(whole[1].journal, make(4_000, seed=2))
    assert told


@pytest.mark.parametrize("damage", [b"", b"{}", encode(make(3))[0][:-40], encode(make(3))[0][:900]])
def test_what_is_no_journal_is_refused(damage: bytes) -> None:
    with pytest.raises(ContractError, match="journal"):
        decode(damage)


def test_a_journal_of_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("schemas.journal.FORMAT", "2")
        (value,) = encode(make(3))
    with pytest.raises(ContractError, match="format 2, this version reads 1"):
        decode(value)


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1))
def test_damage_is_refused_or_harmless(changes: list[tuple[float, int]]) -> None:
    """Arrow has many errors of its own; none of them comes out."""
    value = bytearray(encode(make(3, width=4, recents=2))[0])
    for where, byte in changes:
        value[int(where * len(value))] = byte
    with suppress(ContractError):
        assert decode(bytes(value)).journal.features.ndim == 2
