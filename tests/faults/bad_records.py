"""Bad records among good ones: do they all become dead letters, and do the good ones notice?

`python -m tests.faults.bad_records --records 100000 --share 0.5 --seed 1 --json OUT` plays a
generated shop with so many bad records mixed in to one shop on a real Kafka and Valkey, and to
another all that keeps the contract. Ends with 1 when anything differs.

Topics are played one after the other, each to its end: how the topics of one partition are merged
hangs on when records arrive, and so do predictions. Item states are left out for the same reason.
"""

import argparse
import sys
import tempfile
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from random import Random

import orjson

from schemas import archive
from schemas.codec import encode
from schemas.records import Behavior, Review
from starcast.shop import shop as generated_shop
from streams.dead_letters import read_letters
from streams.producer import Outgoing
from streams.tail import read_topic
from tests.faults.spoiling import Value, accepted, spoilt
from tests.servers import servers
from tests.shops import Shop, Workers, make_shop

NO_USER = b"\xff"  # a key that is no user's id
TOPICS = ("reviews", "behavior")
END = datetime(2026, 1, 1, tzinfo=UTC)
STALL_SECONDS = 60.0  # workers that do nothing for so long will not end
EXAMPLES = 5

Place = tuple[str, int, int]  # topic, partition, offset


@dataclass
class Report:
    """What was played, and all that is not as it should be."""

    seed: int
    good: int = 0
    spoilt: dict[str, int] = field(default_factory=dict[str, int])  # by how they were made
    still_good: int = 0  # of the spoilt ones, by accident
    letters: int = 0
    reasons: dict[str, int] = field(default_factory=dict[str, int])
    predictions: int = 0
    seconds_without: float = 0.0  # to read all that keeps the contract
    seconds_with: float = 0.0  # to read that and the bad ones
    differences: dict[str, int] = field(default_factory=dict[str, int])
    examples: list[str] = field(default_factory=list[str])

    def differs(self, what: str, example: str = "") -> None:
        self.differences[what] = self.differences.get(what, 0) + 1
        if self.differences[what] <= EXAMPLES and example:
            self.examples.append(f"{what}: {example}")


@dataclass(frozen=True)
class Played:
    """One topic's records for both shops."""

    topic: str
    mixed: list[Outgoing]
    kept: list[Outgoing]  # those of `mixed` that keep the contract


def run(
    kafka: str, store: str, folder: Path, records: int, share: float = 0.5, seed: int = 1
) -> Report:
    """Play `records` bad records that are `share` of all, and compare."""
    report = Report(seed)
    phases = _phases(report, records, round(records / share) - records, seed)
    plain, mixed = (_shop(kafka, store, folder / name) for name in ("plain", "mixed"))
    report.seconds_without = _work(plain, phases, report, spoil=False)
    report.seconds_with = _work(mixed, phases, report, spoil=True)
    _check_letters(mixed, report)
    _check_predictions(plain, mixed, report)
    if any(True for _ in read_letters(plain.settings.kafka)):
        report.differs("a dead letter of a record that keeps the contract")
    return report


def _phases(report: Report, bad: int, good: int, seed: int) -> list[Played]:
    now = time.time() * 1_000
    by_topic: dict[str, list[Outgoing]] = {topic: [] for topic in TOPICS}
    for topic, record in generated_shop(
        seed=seed, users=max(good // 60, 20), items=500, events=good, end=END
    ):
        if isinstance(record, Review | Behavior):
            by_topic[topic].append(Outgoing(topic, record.user_id.encode(), encode(record)))
    report.good = sum(map(len, by_topic.values()))
    phases: list[Played] = []
    kinds = Counter[str]()
    for number, (topic, records) in enumerate(by_topic.items()):
        random = Random(seed + number)
        mine = bad // 2 if number == 0 else bad - bad // 2
        keys = [each.key for each in records]
        strays = [
            # Under a user's key a null value is a good one, which erases the user.
            Outgoing(topic, NO_USER if value is None else random.choice(keys), value)
            for value in _values(records, mine, seed + number, kinds)
        ]
        # Each stray lies before a good record of its own choice.
        places = sorted((random.randrange(len(records)), at) for at in range(mine))
        mixed: list[Outgoing] = []
        begin = 0
        for place, at in places:
            mixed += records[begin:place]
            mixed.append(strays[at])
            begin = place
        mixed += records[begin:]
        kept = [each for each in mixed if accepted(topic, each.value, now)]
        report.still_good += len(kept) - len(records)
        phases.append(Played(topic, mixed, kept))
    report.spoilt = dict(kinds)
    return phases


def _values(records: list[Outgoing], count: int, seed: int, kinds: Counter[str]) -> Iterator[Value]:
    for kind, value in spoilt([each.value or b"" for each in records], count, seed):
        kinds[kind] += 1
        yield value


def _shop(kafka: str, store: str, folder: Path) -> Shop:
    settings = make_shop(kafka, store, folder).settings
    scorer = settings.scorer.model_copy(update={"batch_events": 2_000})
    return Shop(settings.model_copy(update={"scorer": scorer}))


def _work(shop: Shop, phases: list[Played], report: Report, spoil: bool) -> float:
    """Play all topics and let the workers do all of it; the seconds that the scorer took."""
    predicted = letters = 0
    seconds = 0.0
    with shop.workers("scorer", "archiver") as workers:
        for each in phases:
            predicted += len(each.kept)
            letters += len(each.mixed) - len(each.kept) if spoil else 0
            started = time.monotonic()
            shop.play(each.mixed if spoil else each.kept)
            _until_done(workers, predicted, letters)
            seconds += time.monotonic() - started
        _until_archived(shop, workers)
        deadline = time.monotonic() + STALL_SECONDS
        for name, loop in workers.loops.items():
            # On a busy machine the group may have left it out for the moment.
            while not loop.live and time.monotonic() < deadline and not workers.errors:
                time.sleep(0.1)
            if not loop.live:
                report.differs("a processor that has ended", name)
        for error in workers.errors:
            report.differs("an error that ended a processor", repr(error))
        workers.errors.clear()
    return round(seconds, 1)


def _until_done(workers: Workers, predicted: int, letters: int) -> None:
    """Wait until so much has been committed, or nothing more comes; what is missing shows later."""

    def done() -> tuple[float, float]:
        counts = Counter[str]()
        for metric in (workers.metrics.events, workers.metrics.dead_letters):
            for family in metric.collect():
                for sample in family.samples:
                    if sample.labels["processor"] == "scorer":
                        counts[sample.name] += sample.value
        return counts["starcast_events_total"], counts["starcast_dead_letters_total"]

    last, moved = done(), time.monotonic()
    while last[0] < predicted or last[1] < letters:
        if workers.errors or time.monotonic() - moved > STALL_SECONDS:
            return
        time.sleep(0.1)
        if (now := done()) != last:
            last, moved = now, time.monotonic()


def _until_archived(shop: Shop, workers: Workers) -> None:
    """Wait until the archive has all dead letters, or nothing more comes."""
    ends = shop.ends("dead-letters")
    deadline = time.monotonic() + STALL_SECONDS
    while archive.positions(shop.settings.archive.url, "dead-letters") != ends:
        if time.monotonic() > deadline or workers.errors:
            return
        time.sleep(0.2)


def _check_letters(shop: Shop, report: Report) -> None:
    """Each record that breaks the contract has one letter with its bytes, and no other has any."""
    kafka = shop.settings.kafka
    expected: dict[Place, tuple[bytes | str | None, Value]] = {}
    for topic in TOPICS:
        for batch in read_topic(kafka, topic):
            for each in batch:
                if not accepted(topic, each.value(), each.timestamp()[1]):
                    place = topic, each.partition() or 0, each.offset() or 0
                    expected[place] = each.key(), each.value()
    met = Counter[Place]()
    for found in read_letters(kafka):
        source = found.letter.source
        place = source.topic, source.partition, source.offset
        met[place] += 1
        reason = found.letter.reason.split(":")[0].split(" (got")[0]
        report.reasons[reason] = report.reasons.get(reason, 0) + 1
        if place not in expected:
            report.differs("a dead letter of a record that keeps the contract", str(found))
        elif expected[place] != (_bytes(found.letter.key), _bytes(found.letter.value)):
            report.differs("a dead letter with other bytes", str(place))
    report.letters = met.total()
    for place, count in met.items():
        if count > 1:
            report.differs("a dead letter that came twice", str(place))
    for place in expected.keys() - met.keys():
        report.differs("a bad record without a dead letter", f"{place} {expected[place]}"[:300])
    if len(expected) != sum(report.spoilt.values()) - report.still_good:
        report.differs("a bad record that Kafka did not get", str(len(expected)))
    archived = archive.read(shop.settings.archive.url, "dead-letters", columns=["reason"]).collect()
    if archived["reason"].is_not_null().sum() != report.letters:
        report.differs("dead letters that are not archived", str(len(archived)))


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else b64decode(text)


def _check_predictions(plain: Shop, mixed: Shop, report: Report) -> None:
    """What was predicted, partition by partition in order, is the same in both shops."""
    ours, theirs = _predictions(plain), _predictions(mixed)
    report.predictions = sum(map(len, theirs.values()))
    for partition in sorted(ours.keys() | theirs.keys()):
        pairs = zip_longest(ours.get(partition, []), theirs.get(partition, []))
        for at, (one, other) in enumerate(pairs):
            if one != other or one[0] != at:
                report.differs("a prediction", f"partition {partition}: {one}, {other}")


def _predictions(shop: Shop) -> dict[int, list[tuple[int, str, str]]]:
    """Of each user partition: seq, event and a digest of what was predicted, in order."""
    found: dict[int, list[tuple[int, str, str]]] = {}
    for batch in read_topic(shop.settings.kafka, "predicted-ratings"):
        for each in batch:
            record = orjson.loads(each.value() or b"")
            said = [record[name] for name in ("rating", "distribution", "interval", "tier")]
            digest = blake2b(orjson.dumps(said), digest_size=8).hexdigest()
            # A record under another user's key: its prediction may lie in another partition.
            found.setdefault(record["source"]["partition"], []).append(
                (record["seq"], record["event_id"], digest)
            )
    return {partition: sorted(rows) for partition, rows in found.items()}


def summary(report: Report) -> str:
    """The report for people."""
    made = ", ".join(f"{count} {kind}" for kind, count in report.spoilt.items())
    lines = [
        f"seed {report.seed}: {report.good} good records and {sum(report.spoilt.values())} spoilt "
        f"ones ({made}), of which {report.still_good} still keep the contract",
        f"{report.letters} dead letters; {report.predictions} predictions",
        f"{report.seconds_without} s without the bad records, {report.seconds_with} s with them",
        *(f"  {count:>7} {reason}" for reason, count in Counter(report.reasons).most_common(12)),
        *(f"DIFFERS {count:>7} {what}" for what, count in report.differences.items()),
        *(f"  {each}" for each in report.examples),
        "all as it should be" if not report.differences else "something differs",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run it on servers of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.bad_records", description=__doc__)
    parser.add_argument("--records", type=int, default=100_000, help="bad records")
    parser.add_argument("--share", type=float, default=0.5, help="of bad records among all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="starcast-bad-records-") as name:
        folder = Path(name)
        with servers(folder / "servers") as endpoints:
            report = run(
                endpoints.bootstrap_servers,
                endpoints.redis_url,
                folder,
                options.records,
                options.share,
                options.seed,
            )
    print(summary(report))
    if options.json:
        options.json.write_bytes(orjson.dumps(asdict(report), option=orjson.OPT_INDENT_2))
    return 1 if report.differences else 0


if __name__ == "__main__":
    sys.exit(main())
