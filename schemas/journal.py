"""The journal: what a transaction applied to one user partition, in order, as Arrow.

A Kafka value is two Arrow IPC streams, one after the other: `rows`, one row an event, and
`recents`, the versions read of the users' recent items. A transaction whose rows do not fit into
512 KB is cut into pieces; each can be read alone, and says which of how many it is.

Arrays hold what `model` calls an event, a header of a partition and a feature row; here they are
bytes and numbers, since `schemas` knows no model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.exceptions import ContractError

TOPICS = ("reviews", "behavior", "text-features")  # `topics` holds indices into this
LARGEST_PIECE = 512 * 1024  # bytes before compression; half of what Kafka takes unasked
FORMAT = "1"


@dataclass(frozen=True, slots=True)
class Journal:
    """The rows of one transaction and user partition, n events in the order they were applied.

    Row columns are (n,), features (n, F). Versions tell what was read for the row's own item and
    user, 0 when there was nothing. `recents` has a row for each distinct recent item of the
    batch: item hash, hash of the text whose vector was read, version of its attributes.
    """

    topics: NDArray[np.uint8]
    offsets: NDArray[np.int64]  # of the source record, in the partition of the journal's number
    steps: NDArray[np.uint64]  # dense over all rows of the partition
    seqs: NDArray[np.uint64]  # dense over predictions; 0 for text features
    events: NDArray[np.void]  # raw bytes: `.view(EVENT)`
    duplicates: NDArray[np.bool_]
    features: NDArray[np.float32]
    item_versions: NDArray[np.uint64]
    item_attributes_versions: NDArray[np.uint64]
    user_attributes_versions: NDArray[np.uint64]
    item_vectors: NDArray[np.uint64]  # hash of the item's text whose vector was read
    recents: NDArray[np.uint64]  # (m, 3)
    feature_hash: str
    layout_hash: str
    encoder: str  # hash of the text encoder, empty for none
    partition_state: bytes  # the partition's header as the batch began
    ends: tuple[int, ...]  # by TOPICS: next offset to read after this transaction; -1: none read

    def __len__(self) -> int:
        return len(self.offsets)


@dataclass(frozen=True, slots=True)
class Piece:
    """The `index`-th of `count` pieces of a transaction's journal."""

    index: int
    count: int
    journal: Journal


@dataclass(frozen=True, slots=True)
class Transaction:
    """A transaction's journal, and the offsets of its first and last piece."""

    first_offset: int
    last_offset: int
    journal: Journal


_ROW_TYPES: dict[str, pa.DataType] = {
    "topics": pa.uint8(),
    "offsets": pa.int64(),
    "steps": pa.uint64(),
    "seqs": pa.uint64(),
    "duplicates": pa.bool_(),
    "item_versions": pa.uint64(),
    "item_attributes_versions": pa.uint64(),
    "user_attributes_versions": pa.uint64(),
    "item_vectors": pa.uint64(),
}
_ROW_ARRAYS = (*_ROW_TYPES, "events", "features")
_RECENTS = pa.schema([(name, pa.uint64()) for name in ("item", "text", "attributes")])
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream: Arrow, "IPC Streaming Format"


def encode(journal: Journal) -> list[bytes]:
    """Kafka values of a transaction's rows, in order; one at least."""
    return encode_all([journal])[0]


def encode_all(journals: Sequence[Journal]) -> list[list[bytes]]:
    """The same for several partitions whose features are of one width.

    Arrow takes as long to make a small array as a large one: so they are made once, and cut.
    """
    rows, recents = _rows_of(journals), _recents_of(journals)
    row_bytes = rows.nbytes / max(len(rows), 1)
    values: list[list[bytes]] = []
    begin = begun = 0
    for journal in journals:
        end, ended = begin + len(journal), begun + len(journal.recents)
        whole = len(journal) * row_bytes + journal.recents.nbytes
        count = max(1, ceil(whole / LARGEST_PIECE))
        heads = (_metadata(journal, index, count) for index in range(count))
        parts, read = _cut(rows, begin, end, count), _cut(recents, begun, ended, count)
        values.append(list(map(_stream, parts, read, heads)))
        begin, begun = end, ended
    return values


def decode(value: bytes) -> Piece:
    """The piece that a Kafka value holds. Raises ContractError when it holds none."""
    try:
        source = pa.BufferReader(value)
        rows = pa.ipc.open_stream(source).read_all()
        recents = pa.ipc.open_stream(source).read_all()
        metadata = {
            key.decode(): found.decode() for key, found in (rows.schema.metadata or {}).items()
        }
        if metadata.get("format") != FORMAT:
            raise ContractError(
                f"a journal value has format {metadata.get('format')}, this version reads {FORMAT}"
            )
        return Piece(
            int(metadata["piece"]),
            int(metadata["pieces"]),
            Journal(
                **{name: _to_numpy(rows[name]) for name in _ROW_TYPES},
                events=_fixed_bytes(rows["events"]),
                features=_matrix(rows["features"]),
                recents=np.stack([_to_numpy(recents[name]) for name in _RECENTS.names], axis=1),
                feature_hash=metadata["feature_hash"],
                layout_hash=metadata["layout_hash"],
                encoder=metadata["encoder"],
                partition_state=bytes.fromhex(metadata["partition_state"]),
                ends=tuple(map(int, metadata["ends"].split())),
            ),
        )
    except (pa.ArrowException, OSError, LookupError, ValueError) as error:
        raise ContractError(
            f"a journal value of {len(value)} bytes is not the Arrow that was written: {error}"
        ) from error


def encode_piece(piece: Piece) -> bytes:
    """The Kafka value of a piece, which stays one however its rows have changed."""
    journal = piece.journal
    head = _metadata(journal, piece.index, piece.count)
    return _stream(_rows_of([journal]), _recents_of([journal]), head)


def part(journal: Journal, rows: slice) -> Journal:
    """Some rows of a journal; what is said of all of them stays."""
    return replace(journal, **{name: getattr(journal, name)[rows] for name in _ROW_ARRAYS})


def join(pieces: Sequence[Journal]) -> Journal:
    """One journal of consecutive pieces of one transaction."""
    return replace(
        pieces[0],
        **{
            name: np.concatenate([getattr(piece, name) for piece in pieces])
            for name in (*_ROW_ARRAYS, "recents")
        },
    )


class TornError(ContractError):
    """A transaction of which a journal has not all pieces."""


OnTorn = Callable[[TornError], object]
"""Told of a transaction that is not there in whole, which is left out then."""


class Joiner:
    """Puts the pieces of one journal partition's transactions together, as they are read."""

    def __init__(self, on_torn: OnTorn | None = None) -> None:
        self._on_torn = on_torn
        self._offsets: list[int] = []
        self._pieces: list[Journal] = []

    def add(self, offset: int, value: bytes) -> Transaction | None:
        """The transaction that the next value ends, if it does.

        Raises TornError when a piece is missing, unless `on_torn` is told: pieces of a transaction
        stand together, since one transaction wrote them. Raises ContractError when the value holds
        none.
        """
        piece = decode(value)
        if piece.index != len(self._pieces):
            error = TornError(
                f"the journal has piece {piece.index} of {piece.count} at offset {offset} where "
                f"piece {len(self._pieces)} was due: part of a transaction is missing"
            )
            if self._on_torn is None:
                raise error
            self._on_torn(error)
            self._offsets, self._pieces = [], []
            if piece.index:
                return None
        self._offsets.append(offset)
        self._pieces.append(piece.journal)
        if len(self._pieces) < piece.count:
            return None
        offsets, pieces = self._offsets, self._pieces
        self._offsets, self._pieces = [], []
        return Transaction(offsets[0], offsets[-1], join(pieces))

    def end(self) -> None:
        """Raise ContractError when the last transaction has more pieces than were added."""
        if self._pieces:
            raise ContractError(
                f"the journal ends at offset {self._offsets[-1]}, after {len(self._pieces)} pieces "
                "of a transaction that has more"
            )


def decode_all(
    values: Iterable[tuple[int, bytes]],
    *,
    growing: bool = False,
    on_torn: OnTorn | None = None,
) -> Iterator[Transaction]:
    """The transactions of consecutive values of one journal partition, each with its offset.

    Where the values are `growing`, a last transaction that is still to be completed is left out.
    Raises TornError when a piece is missing, or tells it to `on_torn` and goes on.
    """
    joiner = Joiner(on_torn)
    for offset, value in values:
        transaction = joiner.add(offset, value)
        if transaction is not None:
            yield transaction
    if not growing:
        joiner.end()


def _rows_of(journals: Sequence[Journal]) -> pa.RecordBatch:
    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(journal, name) for journal in journals])

    columns = {name: _column(joined(name), kind) for name, kind in _ROW_TYPES.items()}
    events, features = joined("events"), joined("features")
    columns["events"] = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(events.dtype.itemsize), len(events), [None, pa.py_buffer(events)]
    )
    columns["features"] = pa.FixedSizeListArray.from_arrays(
        _column(features.reshape(-1), pa.float32()), features.shape[1]
    )
    return pa.record_batch(columns)


def _recents_of(journals: Sequence[Journal]) -> pa.RecordBatch:
    recents = np.concatenate([journal.recents for journal in journals])
    columns = [_column(column, pa.uint64()) for column in recents.T]
    return pa.record_batch(columns, schema=_RECENTS)


def _column(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    """A column over the array's own memory; `pa.array` would load pandas to look at it."""
    held = np.ascontiguousarray(values, kind.to_pandas_dtype())
    bits = np.packbits(held, bitorder="little") if pa.types.is_boolean(kind) else held
    return pa.Array.from_buffers(kind, len(held), [None, pa.py_buffer(bits)])


def _metadata(journal: Journal, index: int, count: int) -> dict[str, str]:
    return {
        "format": FORMAT,
        "piece": str(index),
        "pieces": str(count),
        "feature_hash": journal.feature_hash,
        "layout_hash": journal.layout_hash,
        "encoder": journal.encoder,
        "partition_state": journal.partition_state.hex(),
        "ends": " ".join(map(str, journal.ends)),
    }


def _cut(batch: pa.RecordBatch, begin: int, end: int, count: int) -> list[pa.RecordBatch]:
    """`count` slices, of about one length, of the rows from `begin` to `end`."""
    cuts = [begin + (end - begin) * number // count for number in range(count + 1)]
    return [batch.slice(first, last - first) for first, last in pairwise(cuts)]


def _stream(rows: pa.RecordBatch, recents: pa.RecordBatch, head: dict[str, str]) -> bytes:
    """Two streams of Arrow's, one after the other, the first with `head` in its schema.

    They are put together from their messages: a writer for each costs more than most journals.
    """
    first = [rows.schema.with_metadata(head).serialize(), rows.serialize(), _END]
    return b"".join([*first, recents.schema.serialize(), recents.serialize(), _END])


def _to_numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    return column.combine_chunks().to_numpy(zero_copy_only=False)


def _fixed_bytes(column: pa.ChunkedArray) -> NDArray[np.void]:
    array = column.combine_chunks()
    width = array.type.byte_width
    data = array.buffers()[1] if len(array) else pa.py_buffer(b"")
    return np.frombuffer(data, np.dtype(f"V{width}"), len(array), array.offset * width)


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    array = column.combine_chunks()
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)
