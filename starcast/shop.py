"""A generated shop: nothing in it is real, and no figure reached on it says anything of real shops.

Users have tastes (departments, shelves, brands, prices), items have a quality and texts that hint
at it. Visits lead to views, clicks, carts and purchases, and those to reviews, whose stars come
from taste and quality plus noise, and whose words say about the same. A model that knows a user's
taste for a department can therefore do clearly better than a user's and an item's mean, and the
noise keeps the best possible root mean squared error near 0.6 stars. `docs/sample.md` gives the
formula. All is drawn from one seed; the words stand in `shop.toml`.
"""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from schemas.exceptions import StarcastError
from schemas.records import EARLIEST_TIME, LATEST_TIME, Action, Behavior, Item, Record, Review, User

SPAN = timedelta(days=21)  # from the first record to the last

MEAN = 3.5  # stars
# Standard deviations of what stars are made of, in stars.
LENIENCY = 0.35  # of a user
QUALITY = 0.45  # of an item
DEPARTMENT_TASTE = 0.85  # of a user for a department
SHELF_TASTE = 0.35  # of a user for a shelf within it
BRAND_TASTE = 0.3
PRICE_TASTE = 0.8  # of a user, from the cheapest item of a shelf to the dearest
NOISE = 0.5
WORDING = 0.25  # of what a review's words say, around what its stars say

CHOICE = 0.5  # how much more often a shelf is visited for each star of taste: exp(0.5)

# What a meeting of a user with an item consists of, in order, with seconds after the first step.
STEPS: tuple[tuple[str, float], ...] = (
    ("view", 0),
    ("click", 20),
    ("wishlist", 45),
    ("share", 60),
    ("cart", 90),
    ("remove_from_cart", 200),
    ("purchase", 300),
    ("review", 20_000),
)
REVIEW = len(STEPS) - 1
_PRICED = ("cart", "remove_from_cart", "purchase")

# Relative activity by hour of the day, UTC.
_HOURS = (3, 2, 1, 1, 1, 2, 4, 6, 7, 8, 8, 8, 9, 9, 8, 8, 9, 10, 12, 14, 14, 12, 8, 5)


class _Shelf(BaseModel):
    department: str
    shelf: str
    price: float
    nouns: list[str]
    parts: list[str]


class _Words(BaseModel):
    """What `shop.toml` holds; lists of lists go from the worst to the best."""

    brands: list[str]
    models: list[str]
    regions: list[str]
    genders: list[str]
    openings: list[list[str]]
    verdicts: list[list[str]]
    closings: list[list[str]]
    titles: list[list[str]]
    makings: list[list[str]]
    shelves: list[_Shelf]

    def departments(self) -> NDArray[np.int64]:
        """The number of each shelf's department, (shelves)."""
        names = [shelf.department for shelf in self.shelves]
        order = list(dict.fromkeys(names))
        return np.array([order.index(name) for name in names])


@dataclass(frozen=True)
class _Users:
    """What users are like; arrays of (users) or (users, departments, shelves or brands)."""

    leniency: NDArray[np.float64]
    department_taste: NDArray[np.float64]
    shelf_taste: NDArray[np.float64]
    brand_taste: NDArray[np.float64]
    price_taste: NDArray[np.float64]
    activity: NDArray[np.float64]  # relative number of visits
    joined: NDArray[np.float64]  # share of the span
    records: list[User]


@dataclass(frozen=True)
class _Items:
    """What items are like; arrays of (items)."""

    shelf: NDArray[np.int64]
    brand: NDArray[np.int64]
    quality: NDArray[np.float64]
    price: NDArray[np.float64]
    price_rank: NDArray[np.float64]  # 0 the cheapest of its shelf, 1 the dearest
    popularity: NDArray[np.float64]
    launched: NDArray[np.float64]  # share of the span
    records: list[Item]


@dataclass(frozen=True)
class _Meetings:
    """Users meet items; arrays of (meetings)."""

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    when: NDArray[np.float64]  # share of the span
    liking: NDArray[np.float64]  # stars before rounding
    steps: NDArray[np.bool_]  # (meetings, STEPS)


def shop(
    seed: int = 7,
    users: int = 300,
    items: int = 240,
    events: int = 20_000,
    end: datetime | None = None,
) -> Iterator[tuple[str, Record]]:
    """The records of a generated shop: users, items, then `events` events in order of time.

    The last event is at `end` (now). About three in ten events are reviews with stars. The same
    arguments give the same records.
    """
    if min(users, items, events) < 1:
        raise StarcastError("A generated shop needs at least one user, one item and one event.")
    end = end or datetime.now(UTC)
    if not EARLIEST_TIME + SPAN <= end <= LATEST_TIME:
        raise StarcastError(
            f"A generated shop cannot end at {end.date()}: its records would not keep the "
            f"contract. Choose from {(EARLIEST_TIME + SPAN).date()} to {LATEST_TIME.date()}."
        )
    start = end - SPAN
    random = np.random.default_rng(seed)
    text = files("starcast").joinpath("shop.toml").read_text(encoding="utf-8")
    words = _Words.model_validate(tomllib.loads(text))
    people = _make_users(random, words, users, start)
    goods = _make_items(random, words, items, start)
    yield from (("users", record) for record in people.records)
    yield from (("items", record) for record in goods.records)
    met = _meet(random, words, people, goods, events)
    yield from _events(random, words, people, goods, met, events, (start, end))


def _make_users(random: np.random.Generator, words: _Words, count: int, start: datetime) -> _Users:
    departments = int(words.departments().max()) + 1
    gender = random.choice(len(words.genders), count, p=(0.49, 0.46, 0.05))
    age = np.clip(random.normal(41, 15, count), 16, 90).round()
    region = random.choice(len(words.regions), count, p=(0.3, 0.25, 0.2, 0.2, 0.05))
    # Part of a taste is shared by people of one gender, or grows with age: attributes tell it.
    by_gender = random.normal(0, 0.35, (len(words.genders), departments))
    by_age = random.normal(0, 0.25, departments)
    own = random.normal(0, DEPARTMENT_TASTE, (count, departments))
    return _Users(
        leniency=random.normal(0, LENIENCY, count),
        department_taste=own + by_gender[gender] + ((age - 41) / 15)[:, None] * by_age,
        shelf_taste=random.normal(0, SHELF_TASTE, (count, len(words.shelves))),
        brand_taste=random.normal(0, BRAND_TASTE, (count, len(words.brands))),
        price_taste=random.normal(-PRICE_TASTE / 2, PRICE_TASTE, count),
        activity=random.gamma(1.5, 1, count) + 0.05,
        joined=np.where(random.random(count) < 0.5, 0, random.random(count) * 0.8),
        records=[
            User(
                user_id=f"user-{number:05d}",
                event_time=start,
                gender=words.genders[gender[number]],
                age=float(age[number]),
                region=words.regions[region[number]],
            )
            for number in range(count)
        ],
    )


def _make_items(random: np.random.Generator, words: _Words, count: int, start: datetime) -> _Items:
    shelf = random.integers(len(words.shelves), size=count)
    brand = random.integers(len(words.brands), size=count)
    quality = random.normal(0, QUALITY, count)
    usual = np.array([each.price for each in words.shelves], np.float64)[shelf]
    # Better items cost more; their descriptions hint at the quality.
    dearness = np.exp(0.3 * quality / QUALITY + random.normal(0, 0.4, count))
    price = (usual * dearness).round(2)
    making = np.clip(np.round(2 + 1.2 * quality / QUALITY + random.normal(0, 0.5, count)), 0, 4)
    return _Items(
        shelf=shelf,
        brand=brand,
        quality=quality,
        price=price,
        price_rank=_ranks(price, shelf),
        popularity=random.pareto(2.0, count) + 0.2,
        launched=np.where(random.random(count) < 0.75, 0, random.random(count) * 0.8),
        records=[
            _item(
                random,
                words,
                words.shelves[shelf[number]],
                words.brands[brand[number]],
                words.makings[int(making[number])],
                {
                    "item_id": f"item-{number:05d}",
                    "event_time": start,
                    "price": float(price[number]),
                },
            )
            for number in range(count)
        ],
    )


def _ranks(price: NDArray[np.float64], shelf: NDArray[np.int64]) -> NDArray[np.float64]:
    """The place of each price on its shelf, from 0 to 1."""
    ranks = np.zeros(len(price))
    for number in np.unique(shelf):
        (on_shelf,) = np.nonzero(shelf == number)
        ranks[on_shelf[np.argsort(price[on_shelf])]] = np.linspace(0, 1, len(on_shelf))
    return ranks


def _item(
    random: np.random.Generator,
    words: _Words,
    shelf: _Shelf,
    brand: str,
    makings: Sequence[str],
    known: dict[str, Any],
) -> Item:
    noun = _pick(random, shelf.nouns)
    name = f"{brand} {_pick(random, words.models)} {random.integers(100, 1000)}"
    return Item(
        **known,
        title=f"{name} {noun}",
        brand=brand,
        category=[shelf.department, shelf.shelf],
        description=(
            f"The {name} is {_pick(random, makings)}. "
            f"Made with attention to {shelf.parts[0]} and {shelf.parts[1]}."
        ),
    )


def _meet(
    random: np.random.Generator, words: _Words, people: _Users, goods: _Items, events: int
) -> _Meetings:
    """Meetings enough for `events` events; users mostly meet what they like and what is popular."""
    draws = 2 * events + 100
    user = random.choice(len(people.activity), draws, p=people.activity / people.activity.sum())
    item = _choose_items(random, words, people, goods, user)
    # A pair meets once while there are others; when it meets again, no second review is written.
    _, firsts = np.unique(user * len(goods.shelf) + item, return_index=True)
    again = np.setdiff1d(np.arange(draws), firsts)
    order = np.concatenate([np.sort(firsts), again])
    user, item = user[order], item[order]
    liking = _liking(random, words, people, goods, user, item)
    steps = _steps(random, liking)
    steps[len(firsts) :, REVIEW] = False
    enough = int(np.searchsorted(np.cumsum(steps.sum(axis=1)), events)) + 1
    earliest = np.maximum(people.joined[user], goods.launched[item])
    when = earliest + (1 - earliest) * random.random(draws)
    return _Meetings(user[:enough], item[:enough], when[:enough], liking[:enough], steps[:enough])


def _choose_items(
    random: np.random.Generator,
    words: _Words,
    people: _Users,
    goods: _Items,
    user: NDArray[np.int64],
) -> NDArray[np.int64]:
    """An item for each visit: first a shelf after the user's taste, then an item by popularity."""
    shelves = np.arange(len(words.shelves))
    taste = people.department_taste[:, words.departments()] + people.shelf_taste
    stocked = np.isin(shelves, goods.shelf)
    cumulative = np.cumsum(np.exp(CHOICE * taste) * stocked, axis=1)
    place = random.random((len(user), 1)) * cumulative[user, -1:]
    shelf = (place >= cumulative[user]).sum(axis=1)
    # Items lie in one row by shelf, each as wide as it is popular; a visit points into its shelf.
    by_shelf = np.argsort(goods.shelf, kind="stable")
    edges = np.concatenate([[0.0], np.cumsum(goods.popularity[by_shelf])])
    begin = np.searchsorted(goods.shelf[by_shelf], shelves)
    end = np.searchsorted(goods.shelf[by_shelf], shelves, side="right")
    floor, ceiling = edges[begin][shelf], edges[end][shelf]
    pointed = np.searchsorted(edges, floor + random.random(len(user)) * (ceiling - floor), "right")
    return by_shelf[np.clip(pointed - 1, begin[shelf], end[shelf] - 1)]


def _liking(
    random: np.random.Generator,
    words: _Words,
    people: _Users,
    goods: _Items,
    user: NDArray[np.int64],
    item: NDArray[np.int64],
) -> NDArray[np.float64]:
    """How users like items, in stars that are not yet rounded and clipped."""
    shelf = goods.shelf[item]
    return (
        MEAN
        + people.leniency[user]
        + goods.quality[item]
        + people.department_taste[user, words.departments()[shelf]]
        + people.shelf_taste[user, shelf]
        + people.brand_taste[user, goods.brand[item]]
        + people.price_taste[user] * (goods.price_rank[item] - 0.5)
        + random.normal(0, NOISE, len(user))
    )


def _steps(random: np.random.Generator, liking: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which steps a meeting takes, (n, STEPS). What will be liked goes further."""
    hope = 1 / (1 + np.exp(-(liking - MEAN) - random.normal(0, 0.7, len(liking))))
    chance = random.random((len(liking), len(STEPS)))
    elsewhere = chance[:, 0] < 0.38  # bought in another shop, reviewed here
    view = ~elsewhere
    click = view & (chance[:, 1] < 0.2 + 0.4 * hope)
    wishlist = view & (chance[:, 2] < 0.15 * hope)
    share = view & (chance[:, 3] < 0.05 * hope)
    cart = view & (chance[:, 4] < 0.1 + 0.5 * hope)
    remove = cart & (chance[:, 5] < 0.3 * (1 - hope))
    purchase = view & ~remove & (cart | (chance[:, 6] < 0.25))
    review = elsewhere | (purchase & (chance[:, 7] < 0.95))
    return np.stack([view, click, wishlist, share, cart, remove, purchase, review], axis=1)


def _events(
    random: np.random.Generator,
    words: _Words,
    people: _Users,
    goods: _Items,
    met: _Meetings,
    events: int,
    span: tuple[datetime, datetime],
) -> Iterator[tuple[str, Record]]:
    start, end = span
    meeting, step = np.nonzero(met.steps)
    delays = np.array([seconds for _, seconds in STEPS])
    seconds = _clock(met.when[meeting]) + delays[step] * random.uniform(0.5, 1.5, len(step))
    order = np.argsort(seconds, kind="stable")[:events]
    seconds = seconds[order] - seconds[order[0]]
    seconds *= (end - start).total_seconds() / max(float(seconds[-1]), 1.0)
    for number, (row, after) in enumerate(zip(order.tolist(), seconds.tolist(), strict=True)):
        user, item = int(met.user[meeting[row]]), int(met.item[meeting[row]])
        action, _ = STEPS[step[row]]
        known: dict[str, Any] = {
            "event_id": f"event-{number:07d}",
            "user_id": people.records[user].user_id,
            "item_id": goods.records[item].item_id,
            "event_time": start + timedelta(milliseconds=round(after * 1000)),
        }
        if action == "review":
            parts = words.shelves[goods.shelf[item]].parts
            liking = float(met.liking[meeting[row]])
            yield "reviews", _review(random, words, liking, parts, known)
            continue
        priced = action in _PRICED
        yield (
            "behavior",
            Behavior(
                **known,
                action=cast(Action, action),
                price=float(goods.price[item]) if priced else None,
                quantity=float(1 + random.poisson(0.15)) if priced else None,
                session_id=f"session-{user:05d}-{int(met.when[meeting[row]] * SPAN.days)}",
            ),
        )


def _clock(when: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds since the start for shares of the span: busy evenings, quiet nights."""
    day, within = np.divmod(when * SPAN.days, 1)
    shares = np.concatenate([[0], np.cumsum(_HOURS)]) / sum(_HOURS)
    return (day + np.interp(within, shares, np.linspace(0, 1, len(shares)))) * 86_400


def _review(
    random: np.random.Generator,
    words: _Words,
    liking: float,
    parts: Sequence[str],
    known: dict[str, Any],
) -> Review:
    """Stars, mostly with words of about their tone; one in thirty has words alone."""
    stars = float(np.clip(np.round(liking), 1, 5))
    tone = int(np.clip(np.round(liking + random.normal(0, WORDING)), 1, 5)) - 1
    kind = random.random()
    worded = kind < 0.8
    return Review(
        **known,
        rating=None if kind < 0.033 else stars,
        title=_pick(random, words.titles[tone]) if worded else None,
        text=_text(random, words, tone, parts) if worded else None,
    )


def _text(random: np.random.Generator, words: _Words, tone: int, parts: Sequence[str]) -> str:
    """A review of a tone from 0 to 4; what it says of a second part may stray by one."""
    first, second = random.permutation(len(parts))[:2]
    sentence = f"The {parts[first]} {_pick(random, words.verdicts[tone])}"
    if random.random() < 0.6:
        near = int(np.clip(tone + random.integers(-1, 2), 0, 4))
        linking = "and" if near == tone else "but" if near < tone else "while"
        sentence += f", {linking} the {parts[second]} {_pick(random, words.verdicts[near])}"
    chosen = (_pick(random, words.openings[tone]), f"{sentence}.")
    return " ".join((*chosen, _pick(random, words.closings[tone]))).strip()


def _pick(random: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(random.integers(len(choices)))]
