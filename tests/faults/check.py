"""What must hold when the dust has settled: read everything back, and count again.

Nothing here uses the code that made the states: what the events say is counted in `numbered`.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
import polars as pl
from confluent_kafka import KafkaException, TopicPartition
from numpy.typing import NDArray

from model.ids import hash_ids
from model.state import ITEM, USER
from model.state_bytes import from_bytes
from schemas import archive
from schemas.archive import PLACE
from schemas.exceptions import StarcastError
from schemas.journal import Piece
from schemas.journal import decode as decode_journal
from schemas.topics import BY_NAME, TOPICS
from streams.clients import reader
from streams.config import KafkaConfig
from streams.reader import ITEM_STATE, USER_KIND, USER_STATE, store_keys
from streams.tail import read_topic
from streams.verify import verify_replay
from tests.faults.forgotten import (
    EITHER,
    EMPTIED,
    ERASED,
    WHOLE,
    Forgotten,
    archived_pieces,
    blank_rows,
    emptied,
    files_left,
    nobodys_in,
    read_forgotten,
    rows_in,
)
from tests.faults.numbered import CANDIDATES, recount
from tests.faults.world import PARTITIONS, FaultyShop

INPUTS = ("reviews", "behavior", "text-features")
SOURCE = {"topic": pl.String(), "partition": pl.Int64(), "offset": pl.Int64()}  # of an answer
SETTLED_SECONDS = 120.0  # after the last fault, lag is 0 within this; else something is stuck
OPERATOR_SECONDS = 35.0  # transactions that hang are told from young ones by then
ANSWER_SECONDS = 20.0  # a broker that does not answer is asked again
EXAMPLES = 10
FORGOTTEN = -1  # in place of an event's number
WINDOW = 16  # events of a user within which a repetition is known, as docs/produce.md has it


@dataclass
class Verdict:
    """What was checked of one shop, how often, and what was wrong."""

    checked: dict[str, int] = field(default_factory=dict[str, int])
    wrong: dict[str, int] = field(default_factory=dict[str, int])
    examples: list[str] = field(default_factory=list[str])
    settled_seconds: float = 0.0
    doubled: int = 0  # inputs that Kafka holds twice though they were sent once
    late: int = 0  # repetitions that came too late to be told, and so count again by rule

    @property
    def clean(self) -> bool:
        return not self.wrong

    def note(self, what: str, checked: int, wrong: int, example: str = "") -> None:
        """So many were checked, and so many of them wrong."""
        self.checked[what] = self.checked.get(what, 0) + checked
        if wrong:
            self.wrong[what] = self.wrong.get(what, 0) + wrong
            if len(self.examples) < EXAMPLES:
                self.examples.append(f"{what}: {example}")


def wait_settled(
    shop: FaultyShop,
    verdict: Verdict,
    waiting: Callable[[FaultyShop], dict[str, int]],
    seconds: float = SETTLED_SECONDS,
    operate: Callable[[], None] = lambda: None,
) -> bool:
    """Wait until nothing waits any more; whether it came to that.

    `operate` is called once when it takes long: what an operator then does.
    """
    started, left = time.monotonic(), {"": 1}
    operated = False
    while any(left.values()) and time.monotonic() < started + seconds:
        time.sleep(0.5)
        if not operated and time.monotonic() > started + OPERATOR_SECONDS:
            operate()
            operated = True
        try:
            left = waiting(shop)
        except (KafkaException, StarcastError) as error:  # a server that is not back yet
            left = {str(error): 1}
    verdict.settled_seconds += round(time.monotonic() - started, 1)
    stuck = any(left.values())
    verdict.note("settled", 1, int(stuck), f"after {seconds:.0f} s {left} wait")
    return not stuck


def unscored(shop: FaultyShop) -> dict[str, int]:
    """Records that wait, by processor that scores or keeps states."""
    kafka, left = shop.kafka, {"scorer": 0, "answers": 0, "items": 0}
    for processor, topics in (("scorer", INPUTS), ("answers", ("score-requests",))):
        # Committed offsets are those of a group, and are asked for by a member that never joins.
        with reader(kafka, group_id=f"{kafka.group_id}-{processor}") as member:
            where = [
                TopicPartition(kafka.topic_prefix + topic, partition)
                for topic in topics
                for partition in range(PARTITIONS)
            ]
            for each in member.committed(where, ANSWER_SECONDS):
                _, high = member.get_watermark_offsets(each, ANSWER_SECONDS)
                left[processor] += high - max(each.offset, 0)
    store = shop.store
    for (_, partition), end in ends(kafka, ["item-updates"]).items():
        left["items"] += max(end - int(store.header(ITEM_STATE, partition) or 0), 0)
    store.close()
    return left


def unarchived(shop: FaultyShop) -> dict[str, int]:
    """Records that wait for the archiver, by topic."""
    url, left = shop.settings.archive.url, Counter[str]()
    names = [topic.name for topic in TOPICS]
    found = {name: archive.positions(url, name) for name in names}
    for (name, partition), end in ends(shop.kafka, names).items():
        left[name] += max(end - found[name].get(partition, 0), 0)
    return +left


def ends(kafka: KafkaConfig, topics: Sequence[str]) -> dict[tuple[str, int], int]:
    """The offset after the last record of each partition; 0 where there is none.

    A transaction's marker takes an offset and is no record, so a partition's end does not tell.
    """
    with reader(kafka, fetch_wait_max_ms=20) as consumer:
        marks: dict[tuple[str, int], tuple[int, int]] = {}
        for name in topics:
            for partition in range(BY_NAME[name].partitions(PARTITIONS)):
                where = TopicPartition(kafka.topic_prefix + name, partition)
                marks[name, partition] = consumer.get_watermark_offsets(where, ANSWER_SECONDS)
        last = dict.fromkeys(marks, 0)
        for back in (20, 5_000, 10**9):
            left = {
                (f"{kafka.topic_prefix}{name}", partition): max(high - back, low)
                for (name, partition), (low, high) in marks.items()
                if not last[name, partition] and low < high
            }
            consumer.assign([TopicPartition(*place, start) for place, start in left.items()])
            until = time.monotonic() + ANSWER_SECONDS
            while left and time.monotonic() < until:
                for each in consumer.consume(5_000, 0.2):
                    place = (str(each.topic()), each.partition() or 0)
                    if each.error() is None:
                        name = place[0].removeprefix(kafka.topic_prefix)
                        last[name, place[1]] = (each.offset() or 0) + 1
                    else:
                        left.pop(place, None)
        return last


@dataclass(frozen=True)
class Counts:
    """How often each event counts (n), by its number."""

    items: NDArray[np.int64]
    users: NDArray[np.int64]  # not what came before its user was forgotten


def check_predictions(shop: FaultyShop, verdict: Verdict, forgotten: Forgotten) -> Counts:
    """Every record answered once, in order, numbered without gap or repeat."""
    sent, (answers, asked) = read_inputs(shop), read_predictions(shop)
    expected = shop.played["reviews"] + shop.played["behavior"]
    # Inputs were seen to lie in a topic twice, though each was produced and acknowledged once (seed
    # 9): they are told apart from our doing, and each must be answered as often as it lies there.
    verdict.doubled = max(len(sent) - expected, 0)
    missing = max(expected - len(sent), 0)
    verdict.note("sent", expected, missing, f"{len(sent)} are in the topics")
    lost = len(sent.join(answers, on=[*SOURCE], how="anti"))
    verdict.note("lost", len(sent), lost, "positions that no prediction names")
    twice = len(answers) - answers.select(*SOURCE).n_unique()
    verdict.note("duplicated", len(sent), twice, "positions that several predictions name")
    if shop.all_sent:
        count, least = shop.events.count, shop.events.columns()["sent"]
        came, told = (np.bincount(each["event"], minlength=count) for each in (sent, answers))
        differ = int(((told != came) | (came < least)).sum())
        verdict.note("answers an event", count, differ, "not as often as it came")
    before = pl.col("offset").shift().over("user", "topic")
    disorder = answers.select((pl.col("offset") < before).sum()).item()
    verdict.note("order of a user", len(answers), disorder, "a later event was predicted first")
    numbered = pl.col("seq") == pl.int_range(pl.len()).over("partition")
    gaps = answers.filter(~numbered)["partition"].n_unique()
    partitions = answers["partition"].n_unique()
    verdict.note("seq without gap or repeat", partitions, gaps, "partitions")
    check_requests(shop, verdict, asked)
    if forgotten.nulls:
        named = set(answers.select(*SOURCE).iter_rows())
        answered = sum(each[1:] in named for each in forgotten.nulls)
        verdict.note("null values without an answer", len(forgotten.nulls), answered, "answered")
    counts = Counts(*(np.zeros(shop.events.count, np.int64) for _ in range(2)))
    for mine in answers.partition_by("partition", maintain_order=True):
        users, numbers = mine["user"].to_list(), mine["event"].to_list()
        if forgotten.nulls:
            users, numbers = _with_nulls(verdict, forgotten, mine)
        counted, kept = applied(users, numbers)
        np.add.at(counts.items, counted, 1)
        np.add.at(counts.users, kept, 1)
    verdict.late = int((counts.items > 1).sum())
    return counts


def read_inputs(shop: FaultyShop) -> pl.DataFrame:
    """Where each event lies, and its number; null values apart."""
    rows = [
        (topic, each.partition(), each.offset(), int(value.split(b'"', 4)[3][1:]))
        for topic in ("reviews", "behavior")
        for batch in read_topic(shop.kafka, topic)
        for each in batch
        if (value := each.value()) is not None
    ]
    return pl.DataFrame(rows, {**SOURCE, "event": pl.Int64}, orient="row")


def read_predictions(shop: FaultyShop) -> tuple[pl.DataFrame, Counter[tuple[str, str]]]:
    """Answers to events, in the order of their partitions; and how often each item was ranked."""
    rows: list[tuple[Any, ...]] = []
    asked = Counter[tuple[str, str]]()
    for batch in read_topic(shop.kafka, "predicted-ratings"):
        for each in batch:
            record = orjson.loads(each.value() or b"")
            if record["kind"] == "request":
                asked[record["request_id"], record["item_id"]] += 1
                continue
            source, event = record["source"], int(record["event_id"][1:])
            rows.append(
                (*(source[name] for name in SOURCE), record["seq"], record["user_id"], event)
            )
    more = {"seq": pl.Int64, "user": pl.String, "event": pl.Int64}
    return pl.DataFrame(rows, SOURCE | more, orient="row"), asked


def check_requests(shop: FaultyShop, verdict: Verdict, asked: Counter[tuple[str, str]]) -> None:
    """Every item of every request ranked as often as the request came."""
    requests = Counter(
        orjson.loads(each.value() or b"")["request_id"]
        for batch in read_topic(shop.kafka, "score-requests")
        for each in batch
    )
    wrong = sum(count != requests[request] for (request, _), count in asked.items())
    missing = abs(len(asked) - len(requests) * CANDIDATES)
    missing += max(shop.played["score-requests"] - len(requests), 0)
    verdict.note("requests answered once", len(asked), wrong + missing, f"{missing} missing")


def _with_nulls(
    verdict: Verdict, forgotten: Forgotten, answers: pl.DataFrame
) -> tuple[list[str], list[int]]:
    """Users and numbers of a partition's events and null values in the order of its journal."""
    partition: int = answers["partition"][0]
    nulls, taken = forgotten.of(partition)
    topics = [INPUTS.index(topic) for topic in answers["topic"]]
    steps = forgotten.steps(partition, np.stack([topics, answers["offset"].to_numpy()], axis=1))
    verdict.note("journalled", len(steps), int((steps < 0).sum()), "the archived journal lacks it")
    disorder = int((np.diff(steps) <= 0).sum())
    verdict.note("order of the journal", len(steps), disorder, "predicted in another order")
    users = [*answers["user"], *(each.user for each in nulls)]
    numbers = [*answers["event"], *(FORGOTTEN for _ in nulls)]
    when = np.concatenate([steps, taken])
    forgotten.expect(users, when)
    order = np.argsort(when, kind="stable").tolist()
    return [users[at] for at in order], [numbers[at] for at in order]


def applied(users: Sequence[str], numbers: Sequence[int]) -> tuple[list[int], list[int]]:
    """Of the events of a partition in order, those that count: in all, and still for their users.

    One is left out when it is among the last `WINDOW` of its user that counted. A backlog can
    bring more than that of the other topic between an event and its repetition. For a user who was
    `FORGOTTEN` counts what came later.
    """
    last: dict[str, deque[int]] = {}
    counted: list[int] = []
    kept: dict[str, list[int]] = {}
    for user, number in zip(users, numbers, strict=True):
        if number == FORGOTTEN:
            last.pop(user, None)
            kept.pop(user, None)
            continue
        known = last.setdefault(user, deque(maxlen=WINDOW))
        if number not in known:
            known.append(number)
            counted.append(number)
            kept.setdefault(user, []).append(number)
    return counted, [number for several in kept.values() for number in several]


def check_states(shop: FaultyShop, verdict: Verdict, counts: Counts, forgotten: Forgotten) -> None:
    """Every count and sum of users and items is what the events say."""
    columns = shop.events.columns()
    assert shop.all_sent, "states are checked when all events were sent"
    store = shop.store
    kinds: tuple[tuple[str, str, bytes, np.dtype[Any], NDArray[np.int64]], ...] = (
        ("user", "u", USER_STATE, USER, counts.users),
        ("item", "i", ITEM_STATE, ITEM, counts.items),
    )
    for whose, letter, kind, dtype, times in kinds:
        names = np.unique(columns[whose])
        ids = hash_ids([f"{letter}{name}" for name in names.tolist()])
        stored = from_bytes(store.read(store_keys(store, kind, ids)), dtype)
        wrong = np.zeros(len(names), np.bool_)
        for name, expected in recount(columns, whose, names, times).items():
            if name in (dtype.names or ()):
                same = stored[name] == expected
                wrong |= ~(same if same.ndim == 1 else same.all(axis=1))
        first = f"{letter}{names[np.argmax(wrong)]}" if wrong.any() else ""
        verdict.note(f"{whose} states recounted", len(names), int(wrong.sum()), first)
    if forgotten.last:
        back = {f"u{user}" for user in np.unique(columns["user"][counts.users > 0]).tolist()}
        gone = hash_ids(sorted(forgotten.last.keys() - back))
        for what, kind, ids in (
            ("states of forgotten users", USER_STATE, gone),
            ("attributes of forgotten users", USER_KIND, hash_ids(sorted(forgotten.last))),
        ):
            left = sum(each is not None for each in store.read(store_keys(store, kind, ids)))
            verdict.note(what, len(ids), left, "the store has them")
    store.close()


def check_archive(shop: FaultyShop, verdict: Verdict, forgotten: Forgotten) -> None:
    """Archive rows equal topic rows, but for users who were forgotten; each is there once."""
    url = shop.settings.archive.url
    for name in [topic.name for topic in TOPICS]:
        frame = archive.read(url, name, columns=[*PLACE, "kafka_value"]).collect().sort(PLACE)
        if name not in archive.tables(url):
            continue
        doubled = len(frame) - frame.select(PLACE).n_unique()
        parts = [
            _sums(
                [
                    (each.partition(), each.offset(), each.value(), forgotten.left(name, each))
                    for each in batch
                ],
                frame.schema,
            )
            for batch in read_topic(shop.kafka, name)
        ]
        if not parts:
            continue
        kept = pl.concat(parts)
        rows = frame.with_columns(pl.col("kafka_value").hash().alias("found")).drop("kafka_value")
        first = kept.group_by("kafka_partition").agg(pl.col("kafka_offset").min().alias("low"))
        both = kept.join(rows, on=PLACE)
        held = rows.join(first, on="kafka_partition").filter(
            pl.col("kafka_offset") >= pl.col("low")
        )
        same, left = pl.col("sum") == pl.col("found"), pl.col("left")
        if forgotten.nulls:
            both = both.join(blank_rows(url, name), on=PLACE, how="left")
            blank = pl.col("blank").is_not_null()
            right = (
                ((left == WHOLE) & same & ~blank)
                | ((left == ERASED) & blank)
                | ((left == EMPTIED) & ~same)
                | ((left == EITHER) & (same | blank))
            )
            gone = kept.filter(pl.col("left") == ERASED)
            wrong = gone.join(both.filter(right), on=PLACE, how="anti")
            if len(gone):
                verdict.note("rows of forgotten users", len(gone), len(wrong), name)
            _check_files(url, name, verdict, forgotten, gone.select(PLACE))
            both = both.filter(right)
        else:
            both = both.filter(same)
        missing = len(kept) - len(both)
        surplus = len(held) - len(both)
        verdict.note(
            "archive rows",
            len(kept),
            missing + surplus + doubled,
            f"{name}: {missing} missing, {surplus} surplus, {doubled} doubled",
        )


def _sums(rows: Sequence[Any], schema: pl.Schema) -> pl.DataFrame:
    """Positions, hashes of values, and what has to be left of them."""
    names = {name: schema[name] for name in PLACE}
    frame = pl.DataFrame(rows, {**names, "value": pl.Binary, "left": pl.Int8}, orient="row")
    return frame.with_columns(pl.col("value").hash().alias("sum")).drop("value")


def _check_files(
    url: str, topic: str, verdict: Verdict, forgotten: Forgotten, gone: pl.DataFrame
) -> None:
    """Files that the newest version has no more hold nothing of rows that are erased."""
    for path in files_left(url, topic):
        rows = rows_in(path)
        if topic == "journal":
            theirs = sum(
                forgotten.rows(decode_journal(value).journal).any() for value in rows["kafka_value"]
            )
        else:
            theirs = len(rows.filter(pl.col("kafka_key").is_not_null()).join(gone, on=PLACE))
        verdict.note("files without a table", 1, int(theirs > 0), f"{theirs} rows in {path}")


def check_journal(shop: FaultyShop, verdict: Verdict, forgotten: Forgotten) -> None:
    """Archived journal rows of forgotten users are rows of nobody, and those alone."""
    before: dict[tuple[int, int], Piece] = {}
    for batch in read_topic(shop.kafka, "journal"):
        for each in batch:
            piece = decode_journal(each.value() or b"")
            if forgotten.rows(piece.journal).any():
                before[each.partition() or 0, each.offset() or 0] = piece
    wrong = theirs = nobodys = 0
    for partition in range(PARTITIONS):
        for offset, piece in archived_pieces(shop, partition):
            theirs += int(forgotten.rows(piece.journal).sum())
            nobodys += nobodys_in(piece.journal)
            if (old := before.get((partition, offset))) is not None:
                wrong += not emptied(old, piece, forgotten.rows(old.journal))
    verdict.note("journal values emptied", len(before), wrong, "other than they had to be")
    verdict.note("journal rows erased", forgotten.expected, theirs, "are still of somebody")
    differ = abs(nobodys - forgotten.expected)
    verdict.note("journal rows of nobody", forgotten.expected, differ, f"{nobodys} are")


def check_replay(shop: FaultyShop, verdict: Verdict, forgotten: Forgotten) -> None:
    """verify-replay finds no difference, and passes over forgotten users' rows alone."""
    store = shop.store
    report = verify_replay(shop.settings.archive, shop.settings.models, store)
    store.close()
    for what, count in report.compared.items():
        verdict.note(f"replay: {what}", count, report.differences[what])
    verdict.examples += report.examples[:EXAMPLES]
    notes = report.notes
    if forgotten.nulls:
        differ = abs(report.passed_over - forgotten.expected)
        verdict.note("replay: passed over", forgotten.expected, differ, str(report.passed_over))
        notes = [each for each in notes if not each.startswith(f"{report.passed_over} rows of use")]
    if notes:
        verdict.note("replay: notes", 1, 1, "; ".join(notes[:EXAMPLES]))


def check_all(shop: FaultyShop, verdict: Verdict, say: Callable[[str], None]) -> None:
    """All checks but `wait_settled`, which comes first."""
    forgotten = read_forgotten(shop)

    def predictions_and_states() -> None:
        counts = check_predictions(shop, verdict, forgotten)
        check_states(shop, verdict, counts, forgotten)

    checks: list[tuple[str, Callable[[], None]]] = [
        ("predictions and states", predictions_and_states),
        ("archive", lambda: check_archive(shop, verdict, forgotten)),
        ("replay", lambda: check_replay(shop, verdict, forgotten)),
    ]
    if forgotten.nulls:
        missing = len(forgotten.unapplied)
        verdict.note("null values applied", len(forgotten.nulls), missing, "not in the journal")
        checks.insert(1, ("journal", lambda: check_journal(shop, verdict, forgotten)))
    for name, check in checks:
        started = time.monotonic()
        check()
        say(f"shop {shop.name}: {name} checked in {time.monotonic() - started:.0f} s")
