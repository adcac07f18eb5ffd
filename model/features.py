"""The features of a prediction: declared in one table, computed for whole batches.

Biases: Y. Koren, "Factor in the neighbors: scalable and accurate collaborative filtering", ACM
TKDD 4(1), 2010: b_i = sum(r - mu) / (lambda_i + n), then b_u = sum(r - mu - b_i) / (lambda_u + n).
Ours run: each of a user's ratings counts with the mean and the item bias of its time. A user of
whom little is known is taken to lie near the level of newcomers (`model.newcomers`), 0 as a rule.

A value that is not known is nan. Counts and durations come as log(1 + x). No feature reads the
rating or the text of the event that it describes.
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model import newcomers
from model.compiled import compiled
from model.events import (
    ACTIONS,
    CART,
    CLICK,
    COUNTED,
    PURCHASE,
    REVIEW,
    SHARE,
    VIEW,
    WISHLIST,
    Rows,
)
from model.state import LEVELS, RATING_STEPS, SESSION_GAP, STARS

Group = Literal["user", "item", "behavior", "cross", "attributes", "text"]
Column = NDArray[Any]  # (n)
Columns = dict[str, Column]

# In ratings. Tuned on the running bias of Musical Instruments and Gift Cards, as is ITEM_DAMPING.
USER_DAMPING = 6.0
ITEM_DAMPING = 15.0
PRIOR_HISTOGRAM = np.array([0.5, 0.5, 1.5, 3.5, 4.0])  # ten ratings of mean 4, before there are any
PRIOR_COUNT = 10.0
CROSS_DAMPING = 2.0
RATE_DAMPING = 5.0
ALIKE = ("category", "leaf", "brand", "price_band")  # what an item may share with a recent one
PRICE_BAND = 0.35  # in log price: within a factor of 1.4
GENDER_BITS = 2
REGION_BITS = 3
HOUR = 3_600_000  # ms


@dataclass(frozen=True)
class Feature:
    """One column: what it means, and from which fields it comes."""

    name: str
    group: Group
    meaning: str
    source: str


FEATURES: tuple[Feature, ...] = (
    Feature(
        "bias",
        "user",
        "global mean + item bias + user bias + newcomers' level, within 1 to 5",
        "all ratings",
    ),
    Feature("global_mean", "user", "damped running mean of the partition", "partition.rating_sum"),
    Feature("user_bias", "user", "damped mean residual", "user.residual_sum"),
    Feature("user_rating_mean", "user", "mean rating, damped to the global", "user.rating_sum"),
    Feature("user_rating_deviation", "user", "standard deviation of ratings", "user.rating_*sum"),
    Feature("user_five_share", "user", "share of five stars among ratings", "user.histogram"),
    Feature("user_low_share", "user", "share of one and two stars", "user.histogram"),
    Feature("user_last_rating", "user", "newest rating of recent items", "user.recent.rating"),
    Feature("user_recent_rating", "user", "mean rating of recent items", "user.recent.rating"),
    Feature("user_ratings", "user", "log count of ratings", "user.rating_count"),
    Feature("user_events", "user", "log count of events", "user.actions"),
    Feature("user_reviews", "user", "log count of reviews", "user.actions"),
    Feature("user_views", "user", "log count of views and clicks", "user.actions"),
    Feature("user_interests", "user", "log count of wishes and shares", "user.actions"),
    Feature("user_carts", "user", "log count of carts", "user.actions"),
    Feature("user_purchases", "user", "log count of purchases", "user.actions"),
    Feature("user_recency", "user", "log hours since the last event", "user.last_time"),
    Feature("user_tenure", "user", "log days since the first event", "user.first_second"),
    Feature("user_sessions", "user", "log count of sessions", "user.sessions"),
    Feature("session_position", "user", "log events earlier in the session", "user.session_events"),
    Feature("session_age", "user", "log minutes since it began", "user.session_second"),
    Feature("user_price", "user", "mean log price of events", "user.price_log_sum"),
    Feature("user_paid", "user", "mean log price of purchases", "user.paid_log_sum"),
    Feature("user_text_stars", "user", "damped mean stars of own texts", "user.text_sum"),
    Feature("item_bias", "item", "damped mean deviation from the global mean", "item.rating_sum"),
    Feature("item_rating_deviation", "item", "standard deviation of ratings", "item.rating_*sum"),
    *(
        Feature(
            f"item_share_{k}", "item", f"share of {k} stars, damped to global", "item.histogram"
        )
        for k in range(1, STARS + 1)
    ),
    Feature("item_ratings", "item", "log count of ratings", "item.rating_count"),
    Feature("item_events", "item", "log count of events", "item.actions"),
    Feature("item_reviews", "item", "log count of reviews", "item.actions"),
    Feature("item_views", "item", "log count of views and clicks", "item.actions"),
    Feature("item_interests", "item", "log count of wishes and shares", "item.actions"),
    Feature("item_carts", "item", "log count of carts", "item.actions"),
    Feature("item_purchases", "item", "log count of purchases", "item.actions"),
    Feature("item_sessions", "item", "log count of sessions", "item.sessions"),
    Feature("item_age", "item", "log days since first heard of", "item, attributes.first_time"),
    Feature("item_recency", "item", "log hours since the last event", "item.last_time"),
    Feature("item_price", "item", "log price", "attributes.price, item.price_log_sum"),
    Feature("item_price_rank", "item", "rank of price in category", "attributes.price_rank"),
    Feature("item_known", "item", "1: attributes are known", "attributes.version"),
    *(
        Feature(f"action_{name}", "behavior", f"1: the event is a {name}", "event.action")
        for name in ACTIONS[:COUNTED]
    ),
    Feature("user_cart_rate", "behavior", "carts to views, damped", "user.actions"),
    Feature("user_purchase_rate", "behavior", "purchases to carts and views", "user.actions"),
    Feature("item_cart_rate", "behavior", "carts to views, damped", "item.actions"),
    Feature("item_purchase_rate", "behavior", "purchases to carts and views", "item.actions"),
    Feature("event_price", "behavior", "log price in the event", "event.price"),
    Feature("event_price_gap", "behavior", "log price in the event to the item's", "event.price"),
    Feature("event_quantity", "behavior", "log quantity", "event.quantity"),
    Feature("price_against_user", "behavior", "log price to the user's mean", "item, user price"),
    Feature("hour_sine", "behavior", "hour of day, UTC", "event.time"),
    Feature("hour_cosine", "behavior", "hour of day, UTC", "event.time"),
    *(
        Feature(f"{name}_{what}", "cross", f"{meaning} recent items of the same {which}", source)
        for name, which, source in (
            ("category", "widest category", "attributes.category"),
            ("leaf", "narrowest category", "attributes.category"),
            ("brand", "brand", "attributes.brand"),
            ("price_band", "price band", "attributes.price"),
        )
        for what, meaning in (("count", "number of"), ("rating", "damped mean deviation of rated"))
    ),
    Feature("item_viewed", "cross", "1: the user viewed this item lately", "user.recent.actions"),
    Feature("item_carted", "cross", "1: carted", "user.recent.actions"),
    Feature("item_bought", "cross", "1: bought", "user.recent.actions"),
    Feature("item_rated", "cross", "the user's earlier rating of it", "user.recent.rating"),
    Feature("item_seen", "cross", "log hours since the user met it", "user.recent.second"),
    Feature("user_age", "attributes", "age in years / 100", "user attributes"),
    *(
        Feature(f"gender_{k}", "attributes", f"bit {k} of the gender's hash", "user attributes")
        for k in range(GENDER_BITS)
    ),
    *(
        Feature(f"region_{k}", "attributes", f"bit {k} of the region's hash", "user attributes")
        for k in range(REGION_BITS)
    ),
    Feature("text_known", "text", "1: the item's text has a vector", "vectors"),
    Feature("text_similarity", "text", "mean cosine with recent items", "vectors"),
    Feature("text_similarity_highest", "text", "highest cosine with a recent item", "vectors"),
    Feature("text_rating", "text", "deviation of similar items' ratings", "vectors, user.recent"),
)

NAMES = tuple(feature.name for feature in FEATURES)
INDEX = {name: column for column, name in enumerate(NAMES)}
# Rows mean the same only while the table and the numbers behind it do.
FEATURE_HASH = sha256(
    repr(
        (
            FEATURES,
            (USER_DAMPING, ITEM_DAMPING, CROSS_DAMPING, RATE_DAMPING, PRICE_BAND),
            newcomers.CONSTANTS,
            PRIOR_HISTOGRAM.tolist(),
        )
    ).encode()
).hexdigest()[:8]


def compute(
    users: Rows,
    items: Rows,
    user_attributes: Rows,
    item_attributes: Rows,
    recent_attributes: Rows,
    partition: Rows,
    events: Rows,
    text_known: NDArray[np.bool_] | None = None,
    similarity: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Feature rows, shape (n, F), of n events; columns as in `FEATURES`.

    `users` USER (n), `items` ITEM (n): the states that the events meet; `recent_attributes`
    ITEM_ATTRIBUTES (n, 16): of the items in `users["recent"]`; `partition` PARTITION, (n) or ();
    `text_known` (n): the item's text has a vector; `similarity` (n, 16): its cosine with each
    recent item's, nan where either has none; `None`: there are no vectors.
    """
    columns = _ratings(users, items, partition)
    columns |= _user(users, events)
    columns |= _item(items, item_attributes, events)
    columns |= _behavior(users, items, events, columns)
    columns |= _cross(users, item_attributes, recent_attributes, events, columns)
    columns |= _attributes(user_attributes)
    columns |= _text(users, text_known, similarity, columns)
    rows = np.empty((len(events), len(NAMES)), np.float32)
    for name, column in columns.items():
        rows[:, INDEX[name]] = column
    return rows


def biases(items: Rows, partition: Rows) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The features `global_mean` and `item_bias` of n events, each (n).

    `items` ITEM (n): their items' states; `partition` PARTITION, (n) or (): what they meet.
    States keep residuals from them, so they go through float32, as the journal keeps features:
    `replay.recover` must meet the same numbers.
    """
    prior_sum = PRIOR_HISTOGRAM @ np.arange(1, STARS + 1)
    mean = (partition["rating_sum"] + prior_sum) / (partition["rating_count"] + PRIOR_COUNT)
    global_mean = np.broadcast_to(mean, len(items)).astype(np.float32)
    count = items["rating_count"]
    total = items["rating_sum"] - count * global_mean.astype(np.float64)
    return global_mean, (total / (count + ITEM_DAMPING)).astype(np.float32)


def _ratings(users: Rows, items: Rows, partition: Rows) -> Columns:
    global_mean, item_bias = biases(items, partition)
    mean = global_mean.astype(np.float64)
    user_count, item_count = users["rating_count"], items["rating_count"]
    user_bias = users["residual_sum"] / (user_count + USER_DAMPING)
    lately = newcomers.level(partition) * USER_DAMPING / (user_count + USER_DAMPING)
    user_mean = (users["rating_sum"] + USER_DAMPING * mean) / (user_count + USER_DAMPING)
    total = partition["rating_count"] + PRIOR_COUNT
    shares = (partition["histogram"] + PRIOR_HISTOGRAM) / total[..., None]
    item_shares = (items["histogram"] + ITEM_DAMPING * shares) / (item_count + ITEM_DAMPING)[
        :, None
    ]
    texts = users["text_count"]
    text_stars = (users["text_sum"] + CROSS_DAMPING * mean) / (texts + CROSS_DAMPING)
    return {
        "bias": np.clip(mean + item_bias + user_bias + lately, 1, STARS),
        "global_mean": global_mean,
        "user_bias": user_bias,
        "user_rating_mean": user_mean,
        "user_rating_deviation": _deviation(users),
        "user_text_stars": np.where(texts > 0, text_stars, np.nan),
        "item_bias": item_bias,
        "item_rating_deviation": _deviation(items),
        **{f"item_share_{k}": item_shares[:, k - 1] for k in range(1, STARS + 1)},
    }


def _user(users: Rows, events: Rows) -> Columns:
    actions, histogram, ratings = users["actions"], users["histogram"], users["recent"]["rating"]
    count = users["rating_count"]
    rated = ratings > 0
    stars = ratings / float(RATING_STEPS)
    last = stars[np.arange(len(users)), rated.argmax(1)]  # 0 where none is rated
    some = rated.any(1)
    quiet = events["time"] - users["last_time"]
    started = users["first_second"].astype(np.int64) * 1000
    session = users["session_second"].astype(np.int64) * 1000
    unnamed = events["session"] == 0
    same = np.where(unnamed, quiet <= SESSION_GAP, events["session"] == users["session"])
    same &= users["last_time"] > 0
    return {
        "user_five_share": _ratio(histogram[:, 4], count),
        "user_low_share": _ratio(histogram[:, 0] + histogram[:, 1], count),
        "user_last_rating": np.where(some, last, np.nan),
        "user_recent_rating": _ratio(stars.sum(1), rated.sum(1)),
        "user_ratings": np.log1p(count),
        **_counts("user", actions),
        "user_recency": _elapsed(users["last_time"], events["time"], HOUR),
        "user_tenure": _elapsed(started, events["time"], 24 * HOUR),
        "user_sessions": np.log1p(users["sessions"]),
        "session_position": np.log1p(np.where(same, users["session_events"], 0)),
        "session_age": np.where(same, _elapsed(session, events["time"], 60_000), 0),
        "user_price": _ratio(users["price_log_sum"], users["price_count"]),
        "user_paid": _ratio(users["paid_log_sum"], users["paid_count"]),
    }


def _item(items: Rows, attributes: Rows, events: Rows) -> Columns:
    heard, met = attributes["first_time"], items["first_time"]
    first = np.where((heard > 0) & (met > 0), np.minimum(heard, met), np.maximum(heard, met))
    listed = np.log1p(attributes["price"].astype(np.float64))
    seen = _ratio(items["price_log_sum"], items["price_count"])
    return {
        "item_ratings": np.log1p(items["rating_count"]),
        **_counts("item", items["actions"]),
        "item_sessions": np.log1p(items["sessions"]),
        "item_age": _elapsed(first, events["time"], 24 * HOUR),
        "item_recency": _elapsed(items["last_time"], events["time"], HOUR),
        "item_price": np.where(np.isnan(listed), seen, listed),
        "item_price_rank": attributes["price_rank"],
        "item_known": attributes["version"] > 0,
    }


def _behavior(users: Rows, items: Rows, events: Rows, known: Columns) -> Columns:
    price = np.log1p(events["price"].astype(np.float64))
    angle = events["time"] % (24 * HOUR) * (2 * np.pi / (24 * HOUR))
    return {
        **{f"action_{ACTIONS[code]}": events["action"] == code for code in range(COUNTED)},
        **_rates("user", users["actions"]),
        **_rates("item", items["actions"]),
        "event_price": price,
        "event_price_gap": price - known["item_price"],
        "event_quantity": np.log1p(events["quantity"].astype(np.float64)),
        "price_against_user": known["item_price"] - known["user_price"],
        "hour_sine": np.sin(angle),
        "hour_cosine": np.cos(angle),
    }


def _cross(
    users: Rows, attributes: Rows, recent_attributes: Rows, events: Rows, known: Columns
) -> Columns:
    met = np.zeros((len(events), 3), np.int64)  # of the event's own item: actions, rating, second
    alike = np.zeros((len(events), len(ALIKE), 3))  # recent items, those rated, their stars
    _compare(users, attributes, recent_attributes, events, met, alike)
    done, rating = met[:, 0], met[:, 1] / float(RATING_STEPS)
    columns: Columns = {
        "item_viewed": (done & (1 << VIEW | 1 << CLICK)) != 0,
        "item_carted": (done & (1 << CART)) != 0,
        "item_bought": (done & (1 << PURCHASE)) != 0,
        "item_rated": np.where(rating > 0, rating, np.nan),
        "item_seen": _elapsed(met[:, 2] * 1000, events["time"], HOUR),
    }
    usual = known["global_mean"] + known["user_bias"]
    for at, name in enumerate(ALIKE):
        count, rated, stars = alike[:, at].T
        columns[f"{name}_count"] = count
        columns[f"{name}_rating"] = (stars - rated * usual) / (rated + CROSS_DAMPING)
    return columns


@compiled
def _compare(
    users: Any, attributes: Any, recent_attributes: Any, events: Any, met: Any, alike: Any
) -> None:
    """Compare each event's item with the user's recent ones; fill what `_cross` makes of it."""
    for row in range(len(events)):
        item, recent, mine = events[row].item, users[row].recent, attributes[row]
        depth = 0
        while depth < LEVELS - 1 and mine.category[depth + 1] != 0:
            depth += 1
        price = np.log1p(np.float64(mine.price))
        for slot in range(len(recent)):
            other, theirs = recent[slot], recent_attributes[row, slot]
            if other.item == item:  # of at most one
                met[row, 0], met[row, 1] = other.actions, other.rating
                met[row, 2] = other.second
            same = (
                mine.category[0] != 0 and theirs.category[0] == mine.category[0],
                mine.category[depth] != 0 and theirs.category[depth] == mine.category[depth],
                mine.brand != 0 and theirs.brand == mine.brand,
                np.abs(np.log1p(np.float64(theirs.price)) - price) < PRICE_BAND,  # False for nan
            )
            for at in range(len(same)):
                if same[at]:
                    alike[row, at, 0] += 1
                    if other.rating:
                        alike[row, at, 1] += 1
                        alike[row, at, 2] += other.rating / RATING_STEPS


def _attributes(attributes: Rows) -> Columns:
    return {
        "user_age": attributes["age"] / 100,
        **_bits("gender", attributes["gender"], GENDER_BITS),
        **_bits("region", attributes["region"], REGION_BITS),
    }


def _text(
    users: Rows,
    text_known: NDArray[np.bool_] | None,
    similarity: NDArray[np.float32] | None,
    known: Columns,
) -> Columns:
    nothing = np.full(len(users), np.nan)
    if text_known is None or similarity is None:
        return {
            "text_known": np.zeros(len(users)),
            "text_similarity": nothing,
            "text_similarity_highest": nothing,
            "text_rating": nothing,
        }
    usual = known["global_mean"] + known["user_bias"]
    sums = np.empty((len(users), 4))  # count, sum and highest of cosines; weighted deviation
    _weigh(similarity, users, usual, CROSS_DAMPING, sums)
    count, total, highest, deviation = sums.T
    some = count > 0
    return {
        "text_known": text_known,
        "text_similarity": _ratio(total, count),
        "text_similarity_highest": np.where(some, highest, np.nan),
        "text_rating": np.where(some, deviation, np.nan),
    }


@compiled
def _weigh(similarity: Any, users: Any, usual: Any, damping: float, sums: Any) -> None:
    for row in range(len(users)):
        recent = users[row].recent
        count, total, highest, weights, deviation = 0, 0.0, -1.0, 0.0, 0.0
        for slot in range(len(recent)):
            cosine = np.float64(similarity[row, slot])
            if np.isnan(cosine):
                continue
            count += 1
            total += cosine
            highest = max(highest, cosine)
            if recent[slot].rating and cosine > 0:
                weights += cosine
                deviation += cosine * (recent[slot].rating / RATING_STEPS - usual[row])
        sums[row, 0], sums[row, 1], sums[row, 2] = count, total, highest
        sums[row, 3] = deviation / (weights + damping)


def _counts(side: str, actions: NDArray[Any]) -> Columns:
    groups = {
        "events": range(COUNTED),
        "reviews": (REVIEW,),
        "views": (VIEW, CLICK),
        "interests": (WISHLIST, SHARE),
        "carts": (CART,),
        "purchases": (PURCHASE,),
    }
    by_action = np.ascontiguousarray(actions.T)  # sums of whole rows are ten times as fast
    return {
        f"{side}_{name}": np.log1p(by_action[list(codes)].sum(0)) for name, codes in groups.items()
    }


def _rates(side: str, actions: NDArray[Any]) -> Columns:
    views = actions[:, VIEW] + actions[:, CLICK]
    carts, purchases = actions[:, CART], actions[:, PURCHASE]
    return {
        f"{side}_cart_rate": carts / (views + RATE_DAMPING),
        f"{side}_purchase_rate": purchases / (views + carts + RATE_DAMPING),
    }


def _deviation(states: Rows) -> Column:
    count = states["rating_count"]
    mean = _ratio(states["rating_sum"], count)
    square = _ratio(states["rating_square_sum"], count)
    return np.where(count > 1, np.sqrt(np.maximum(square - mean * mean, 0)), np.nan)


def _ratio(total: Column, count: Column) -> Column:
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)


def _elapsed(since: Column, now: Column, unit: int) -> Column:
    """log(1 + units of ms between); nan where `since` is 0 (never), 0 where it is later."""
    return np.where(since > 0, np.log1p(np.maximum(now - since, 0) / unit), np.nan)


def _bits(name: str, hashes: Column, bits: int) -> Columns:
    return {
        f"{name}_{k}": np.where(hashes == 0, np.nan, (hashes >> np.uint32(k)) & 1)
        for k in range(bits)
    }
