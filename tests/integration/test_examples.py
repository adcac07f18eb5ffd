"""The programs in the docs, as they stand there, do what the docs say."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from model.ids import hash_ids, partitions_of
from schemas.files import read_records
from schemas.records import Review
from streams.clients import topic_name
from tests.shops import PARTITIONS, Shop, make_shop

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def shop(kafka: str, store_server: str, tmp_path: Path) -> Shop:
    return make_shop(kafka, store_server, tmp_path)


def examples(page: str) -> list[str]:
    """The Python of a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def run(shop: Shop, *programs: str, show: Callable[..., None] = print) -> None:
    """Run programs, one after another in one module, at a shop's servers and topics."""
    held: dict[str, Any] = {"print": show}
    for program in programs:
        for said, meant in [
            ("127.0.0.1:9092", shop.settings.kafka.bootstrap_servers),
            (".starcast/archive", shop.settings.archive.url),
            *(
                (f'"{topic}", json', f'"{topic_name(shop.settings.kafka, topic)}", json')
                for topic in ("reviews", "score-requests")
            ),
            ('"deadline_ms": 200', '"deadline_ms": 60_000'),  # a slow machine is no matter here
            ('["predicted', f'["{topic_name(shop.settings.kafka, "predicted")}'),
        ]:
            program = program.replace(said, meant)
        exec(compile(program, "example", "exec"), held)


class _EnoughError(Exception):
    pass


def test_what_is_sent_is_predicted_read_and_archived(shop: Shop) -> None:
    review, request, _ = examples("produce.md")
    follow, query = examples("consume.md")
    shown: list[str] = []

    def follower(*words: object) -> None:
        shown.append(" ".join(map(str, words)))
        if len(shown) == 2 * 4:
            raise _EnoughError

    tables: list[pl.DataFrame] = []
    with shop.workers("scorer", "answers", "archiver"):
        run(shop, review, request)
        shop.until_predicted(1)
        answers = shop.until_predicted(3, "request")
        with pytest.raises(_EnoughError):
            run(shop, follow, show=follower)
        run(shop, review)  # again, which is no second rating
        shop.until_predicted(2)
        shop.until_archived()
        run(shop, query, show=tables.append)
    assert shop.letters() == []
    # Events and requests of a user meet in the partition whose states are looked up.
    (partition,) = partitions_of(hash_ids(["u-204"]), PARTITIONS).tolist()
    assert {each.source.partition for each in (*answers, *shop.predictions())} == {partition}
    assert sorted(each.rank or 0 for each in answers) == [1, 2, 3]
    assert {*shown[::2]} == {"interaction u-204 i-31", *(f"request u-204 {i}" for i in IDS)}
    ((version, tier, ratings, rmse),) = tables[0].rows()
    predicted, _ = shop.predictions()
    assert (version, tier, ratings) == ("ladder", "global", 1)
    assert rmse == pytest.approx(abs((predicted.rating or 0) - 4))


IDS = ("i-31", "i-7", "i-90")


def test_a_csv_becomes_a_record_file(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ratings.csv").write_text(
        "user,item,stars,seconds,title,text\n"
        'ann,Été,4.5,1767225601.5,"Said ""well"", twice",\n'
        "bob,b,1,1767225600,,Broke\n",
        encoding="utf-8-sig",
    )
    run(shop, examples("produce.md")[2])
    found = [each.record for each in read_records(tmp_path / "history.jsonl.gz")]
    reviews = [each for each in found if isinstance(each, Review)]
    assert [(each.user_id, each.item_id, each.rating) for each in reviews] == [
        ("bob", "b", 1),
        ("ann", "Été", 4.5),
    ]
    assert reviews[1].title == 'Said "well", twice'
