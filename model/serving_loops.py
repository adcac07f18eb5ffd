"""What the network does row by row as it serves on a CPU: loops that `serving` calls.

Each fills arrays that it is given. A row hangs on no other.
"""

from typing import Any

import numpy as np

from model.compiled import compiled, summing
from model.features import ITEM_DAMPING
from model.state import RATING_STEPS
from model.taste import FADE, MOOD

BLOCK = 128  # rows of a matrix product, and of one walk through the trees


@compiled
def embed(
    items: Any,
    categories: Any,
    brands: Any,
    users: Any,
    item: Any,
    category: Any,
    brand: Any,
    user: Any,
    joined: Any,
) -> None:
    """Fill the first 4 widths of `joined` with the embeddings of n rows' ids."""
    width = items.shape[1]
    for row in range(len(item)):
        for at in range(width):
            total = np.float32(0)
            for level in range(category.shape[1]):
                total += categories[category[row, level], at]
            joined[row, at] = items[item[row], at]
            joined[row, width + at] = total
            joined[row, 2 * width + at] = brands[brand[row], at]
            joined[row, 3 * width + at] = users[user[row], at]


@compiled
def standardise(columns: Any, scaling: Any, joined: Any) -> None:
    """Columns (n, C) to values and missing flags in the first 2 C of `joined`."""
    width = columns.shape[1]
    mean, scale, low, high, used = scaling
    for row in range(len(columns)):
        for at in range(width):
            value = columns[row, at]
            if np.isnan(value):
                joined[row, width + at] = used[at]
            else:
                value = (value - mean[at]) / scale[at]
                joined[row, at] = max(min(value, high[at]), low[at]) * used[at]


@compiled
def fold_in(
    factors: Any,
    offsets: Any,
    corrections: Any,
    ratings: Any,
    level: float,
    ridge: Any,
    damping: float,
    trust: Any,
    item: Any,
    recent: Any,
    recent_rating: Any,
    older: Any,
    older_rating: Any,
    running: Any,
    said: Any,
) -> None:
    """The columns of `model.taste` (n, 8)."""
    count = len(ridge)
    gram, person = np.empty((count, count)), np.empty(count)
    for row in range(len(item)):
        gram[:], person[:] = 0.0, 0.0
        age = known = 0
        for slot in range(recent.shape[1]):
            stars = recent_rating[row, slot]
            if not np.isnan(stars):
                bucket = recent[row, slot]
                left = stars - (level + offsets[bucket])
                known += _rate(factors[bucket], left, age, gram, person)
                age += 1
        for slot in range(older.shape[1]):
            bucket = older[row, slot]
            if bucket:
                stars = older_rating[row, slot] / np.float32(RATING_STEPS)
                left = stars - (level + offsets[bucket])
                known += _rate(factors[bucket], left, age, gram, person)
                age += 1
        if age:
            _solve(gram, ridge, person)
        wanted = factors[item[row]]
        taste = strength = wanted_strength = 0.0
        for at in range(2, count):
            factor = np.float64(wanted[at - 2])
            taste += person[at] * factor
            strength += person[at] * person[at]
            wanted_strength += factor * factor
        bias, user_bias, item_bias, rated = running[row]
        user_level = person[0] + person[1] - user_bias
        rated, fitted = np.expm1(rated), ratings[item[row]]
        item_level = item_bias * (ITEM_DAMPING - damping) / (rated + damping)
        same = (fitted + damping) / (max(rated, fitted) + damping)
        item_level += corrections[item[row]] * same
        added = trust[0] * user_level + trust[1] * item_level + trust[2] * taste
        said[row, 0] = max(min(bias + added, 5.0), 1.0)
        said[row, 1], said[row, 2], said[row, 3] = user_level, person[1], item_level
        said[row, 4], said[row, 5] = taste, known
        said[row, 6], said[row, 7] = strength, wanted_strength


@compiled
def _rate(known: Any, left: float, age: int, gram: Any, person: Any) -> int:
    """Add one rated item to the normal equations; 0 where its factors are not known."""
    weight = FADE / (FADE + age)
    lately = np.exp(-(1 + age) / MOOD)
    person[0] += weight * left
    person[1] += weight * lately * left
    gram[0, 0] += weight
    gram[1, 0] += weight * lately
    gram[1, 1] += weight * lately * lately
    some = 0
    for at in range(len(known)):
        factor = weight * known[at]
        if factor != 0:
            some = 1
        person[at + 2] += factor * left
        gram[at + 2, 0] += factor
        gram[at + 2, 1] += factor * lately
        for other in range(at + 1):
            gram[at + 2, other + 2] += factor * known[other]
    return some


@compiled
def _solve(gram: Any, ridge: Any, right: Any) -> None:
    """(gram + diag(ridge))^-1 right, in place, by Cholesky; of gram the lower half is read."""
    count = len(right)
    for at in range(count):
        gram[at, at] += ridge[at]
        for other in range(at):
            total = gram[at, other]
            for inner in range(other):
                total -= gram[at, inner] * gram[other, inner]
            gram[at, other] = total / gram[other, other]
        total = gram[at, at]
        for inner in range(at):
            total -= gram[at, inner] * gram[at, inner]
        gram[at, at] = np.sqrt(total)
        total = right[at]
        for inner in range(at):
            total -= gram[at, inner] * right[inner]
        right[at] = total / gram[at, at]
    for at in range(count - 1, -1, -1):
        total = right[at]
        for inner in range(at + 1, count):
            total -= gram[inner, at] * right[inner]
        right[at] = total / gram[at, at]


@compiled
def climb(columns: Any, trees: Any, said: Any) -> None:
    """Add what trees say of each row: a tree at a time for as many rows as a core's cache holds."""
    roots, depths, asked, thresholds, left, values = trees
    count, width = columns.shape
    nodes = np.empty(BLOCK, np.uint32)
    asked_of = np.empty(2 * width * BLOCK, np.float32)  # a missing value goes left, then right
    for first in range(0, count, BLOCK):
        rows = min(BLOCK, count - first)
        for row in range(rows):
            for at in range(width):
                value = columns[first + row, at]
                missing = np.isnan(value)
                asked_of[at * BLOCK + row] = -np.inf if missing else value
                asked_of[(width + at) * BLOCK + row] = np.inf if missing else value
        for tree in range(len(roots)):
            for row in range(BLOCK):
                nodes[row] = roots[tree]
            for _ in range(depths[tree]):
                for row in range(BLOCK):
                    node = nodes[row]
                    right = asked_of[asked[node] + np.uint32(row)] > thresholds[node]
                    nodes[row] = left[node] + np.uint32(right)
            for row in range(rows):
                said[first + row] += values[nodes[row]]


@summing
def attend(
    query: Any,
    width: int,
    by_vector: Any,
    vector_rows: Any,
    by_item: Any,
    recent: Any,
    rating: Any,
    actions: Any,
    by_rating: Any,
    by_actions: Any,
    by_position: Any,
    heard: Any,
) -> None:
    """What each head hears (n, k · heads · token) of the recent items; see `network.Attention`."""
    slots, wide = by_position.shape  # wide: the tokens of k members
    heads = query.shape[1] // width
    tokens = np.empty((slots, wide), np.float32)
    weights = np.empty(slots, np.float32)
    for row in range(len(recent)):
        count = 0
        for slot in range(slots):
            if recent[row, slot] == 0:
                continue
            token, position = tokens[count], by_position[slot]
            vector, item = by_vector[vector_rows[row, slot]], by_item[recent[row, slot]]
            done = by_actions[actions[row, slot]]
            for at in range(wide):
                token[at] = position[at] + vector[at] + item[at] + done[at]
            stars = rating[row, slot]
            if not np.isnan(stars):
                high = (stars - np.float32(3)) / np.float32(2)
                by_stars, by_any = by_rating
                for at in range(wide):
                    token[at] += high * by_stars[at] + by_any[at]
            count += 1
        for head in range(heads):
            begin = head * width
            first = begin // (query.shape[1] // wide * width) * width  # of its member's token
            mine = slice(first, first + width)
            asks, hears = query[row, begin : begin + width], heard[row, begin : begin + width]
            highest = np.float32(0)  # of the score of nothing
            for at in range(count):
                token, score = tokens[at, mine], np.float32(0)
                for inner in range(width):
                    score += asks[inner] * token[inner]
                weights[at] = score
                highest = max(highest, score)
            total = np.exp(-highest)
            for at in range(count):
                weights[at] = np.exp(weights[at] - highest)
                total += weights[at]
            for at in range(count):
                token, weight = tokens[at, mine], weights[at] / total
                for inner in range(width):
                    hears[inner] += weight * token[inner]
