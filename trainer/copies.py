"""Texts that repeat others, word for word or nearly.

Nearly: most runs of `_SHINGLE` words of a text stand in one other text (Broder 1997, "On the
resemblance and containment of documents"). Short texts may repeat honestly. Scripts without spaces
are read by runs of characters. What stands in very many texts is a shop's own phrase ("collected as
part of a promotion") and tells nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

_SHINGLE = 5  # words
_LEAST_WORDS = 12  # shorter texts may honestly repeat ("works great for the price")
_NEAR = 0.8  # share of a text's shingles that stand in one other text
_CHARACTERS = 2  # of a script without spaces that say as much as a word
_LONGEST_WORD = 15  # on average: longer ones are not words between spaces
_MOST_HOLDERS = 100  # of a shingle: a phrase of all texts would cost the square of their number


class _Texts:
    """Texts that were seen, to be found by a text that repeats one."""

    def __init__(self) -> None:
        self._exact: set[str] = set()
        self._holders: dict[int, list[int]] = defaultdict(list)

    def add(self, text: str) -> None:
        if text in self._exact:
            return
        for shingle in _shingles(text):
            if len(self._holders[shingle]) < _MOST_HOLDERS:
                self._holders[shingle].append(len(self._exact))
        self._exact.add(text)

    def has(self, text: str) -> bool:
        shingles = _shingles(text)
        if not shingles:
            return False
        held = Counter(holder for each in shingles for holder in self._holders.get(each, ()))
        nearly = bool(held) and held.most_common(1)[0][1] >= _NEAR * len(shingles)
        return text in self._exact or nearly


def copies(older: Sequence[str], newer: Sequence[str]) -> NDArray[np.bool_]:
    """Which of the newer texts (n) repeat one of the older."""
    seen = _Texts()
    for text in older:
        seen.add(text)
    return np.array([seen.has(text) for text in newer], np.bool_)


def repeats(texts: Sequence[str], groups: Sequence[Hashable]) -> NDArray[np.bool_]:
    """Which of n texts repeat an earlier one of their group."""
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        rows[group].append(row)
    found = np.zeros(len(texts), np.bool_)
    for members in rows.values():  # one after another: shingles of all would fill the memory
        seen = _Texts()
        for row in members if len(members) > 1 else ():
            found[row] = seen.has(texts[row])
            seen.add(texts[row])
    return found


def _shingles(text: str) -> set[int]:
    """Hashes of a text's runs of words, or of characters; none of a short one."""
    words: Sequence[str] = text.lower().split()
    run, least = _SHINGLE, _LEAST_WORDS
    if len(text) > _LONGEST_WORD * len(words):
        words = "".join(words)
        run, least = run * _CHARACTERS, least * _CHARACTERS
    if len(words) < least:
        return set()
    return {
        xxh3_64_intdigest(" ".join(words[at : at + run]).encode())
        for at in range(len(words) - run + 1)
    }
