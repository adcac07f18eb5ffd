"""Tiny made-up files in public formats; no row of a real data set stands here."""

import gzip
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from schemas.files import read_records
from starcast.importers import ImportReport
from starcast.importers.movielens import GENRES

Importer = Callable[[Sequence[Path], Path], ImportReport]

AMAZON_HEADER = (
    "reviewerID,asin,reviewerName,helpful,reviewText,overall,summary,unixReviewTime,reviewTime"
)
AMAZON_ITEMS = [
    {"asin": "A1", "title": "Salt &amp; <b>pepper</b>", "brand": "Ox", "price": "$1,025.00",
     "category": ["Home", "Kitchen", "x" * 300], "description": ["One.", "Two.<br>"]},
    {"asin": "A2", "title": "var x = getTime();", "brand": "", "price": ".a{color:red}",
     "category": [], "description": []},
    {"asin": "A1", "title": "Again"},
    {"asin": "A9", "title": "Never reviewed", "price": "$5.00 - $15.00"},
]  # fmt: skip
REES46_HEADER = (
    "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session"
)
REES46 = f"""{REES46_HEADER}
2019-10-01 00:00:00 UTC,view,11,1,home.kitchen,ox,10.00,501,s-1
2019-10-01 00:00:05 UTC,cart,11,1,home.kitchen,ox,10.00,501,s-1
2019-10-01 00:00:07 UTC,view,12,2,,,0.00,502,
2019-10-01 00:00:07 UTC,purchase,11,1,home.kitchen,ox,9.50,501,s-1
2019-10-01 00:00:06 UTC,remove_from_cart,11,1,home.kitchen,ox,10.00,501,s-1
"""
U_DATA = "1\t10\t3\t881250949\n2\t20\t5\t881250900\n1\t20\t4\t881250999\n"
FLAGS = "|".join("1" if name in ("Comedy", "Drama") else "0" for name in GENRES)
U_ITEM = f"10|Caf\u00e9 (1995)|01-Jan-1995||url|{FLAGS}\n20|Void (1996)|||url|{'0|' * 18}0\n"
U_USER = "1|24|M|technician|85711\n2|53|F|other|94043\n"
MOVIELENS: dict[str, dict[str, str]] = {
    "100k": {"u.data": U_DATA, "u.item": U_ITEM, "u.user": U_USER},
    "1m": {
        "ratings.dat": U_DATA.replace("\t", "::"),
        "movies.dat": "10::Caf\u00e9 (1995)::Comedy|Drama\n20::Void (1996)::\n",
        "users.dat": "1::M::24::10::48067\n2::F::53::16::70072\n",
    },
    "recbole": {
        "ml.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + U_DATA,
        "ml.item": (
            "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
            "10\tCaf\u00e9 (1995)\t1995\tComedy Drama\n20\tVoid (1996)\t1996\t\n"
        ),
        "ml.user": (
            "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
            + U_USER.replace("|", "\t")
        ),
    },
    "latest": {
        "ratings.csv": "userId,movieId,rating,timestamp\n" + U_DATA.replace("\t", ","),
        "movies.csv": (
            'movieId,title,genres\n10,"Caf\u00e9 (1995)",Comedy|Drama\n'
            "20,Void (1996),(no genres listed)\n"
        ),
    },
}
LATIN = ("u.item", "movies.dat")


def movielens_files(folder: Path, texts: dict[str, str]) -> list[Path]:
    return [
        packed(folder / name, text, "latin-1" if name in LATIN else "utf-8")
        for name, text in texts.items()
    ]


def packed(path: Path, text: str, encoding: str = "utf-8") -> Path:
    """Writes a text as the suffix of its path says."""
    data = text.encode(encoding)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("__MACOSX/._x", b"\0")
            archive.writestr(path.stem, data)
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Topic and present fields of each record; every record keeps the contract."""
    return [
        (found.topic, found.record.model_dump(mode="json", exclude_none=True))
        for found in read_records(path)
    ]


def values(records: list[tuple[str, dict[str, Any]]], topic: str) -> list[dict[str, Any]]:
    return [value for name, value in records if name == topic]
