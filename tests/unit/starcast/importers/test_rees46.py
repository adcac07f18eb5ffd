from pathlib import Path

from starcast.importers import import_rees46
from tests.unit.starcast.importers.sets import REES46, packed, read, values


def test_rees46_with_items_as_they_change(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    report = import_rees46([packed(tmp_path / "log.csv.gz", REES46)], out)
    assert report.counts == {"items": 3, "behavior": 5}
    records = read(out)
    assert [topic for topic, _ in records] == [
        "items", "behavior", "behavior", "behavior", "items", "behavior", "items", "behavior",
    ]  # fmt: skip
    actions = [value["action"] for value in values(records, "behavior")]
    assert actions == ["view", "cart", "remove_from_cart", "view", "purchase"]
    first, bare, dearer = values(records, "items")
    assert first == {
        "item_id": "11",
        "event_time": "2019-10-01T00:00:00.000Z",
        "brand": "ox",
        "category": ["home", "kitchen"],
        "price": 10.0,
    }
    assert bare == {"item_id": "12", "event_time": "2019-10-01T00:00:07.000Z", "price": 0.0}
    assert (dearer["item_id"], dearer["price"]) == ("11", 9.5)
    event = values(records, "behavior")[0]
    assert (event["user_id"], event["session_id"], event["price"]) == ("501", "s-1", 10.0)
    assert "session_id" not in values(records, "behavior")[3]
