"""Variants of texts, on cases small enough to do by hand."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.augment import (
    MARKS,
    Vocabulary,
    delete,
    punctuate,
    reverse,
    shift,
    swap,
    variants,
)
from trainer.config import AugmentConfig, Way

TEXTS = ["the strings are bright", "the strings broke", "the case is fine", "the the bow"]
KEEPING: tuple[Way, ...] = ("swap", "shift", "reverse")
words = st.lists(st.text("abc", min_size=1, max_size=3), min_size=2, max_size=12)


def chance(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(words, st.integers(0, 99))
def test_deleting_keeps_a_part_in_order(words: list[str], seed: int) -> None:
    kept = delete(words, 0.5, chance(seed))
    assert 1 <= len(kept) <= len(words)
    rest = iter(words)
    assert all(word in rest for word in kept)


@given(words, st.integers(0, 99), st.sampled_from([swap, shift, reverse]))
def test_moving_keeps_every_word(
    words: list[str], seed: int, way: Callable[..., list[str]]
) -> None:
    assert Counter(way(words, 0.3, chance(seed))) == Counter(words)


def test_moving_by_hand() -> None:
    assert reverse(["a", "b", "c"], 0.1, chance()) == ["c", "b", "a"]
    assert shift(["a", "b"], 0.1, chance()) == ["b", "a"]
    assert swap(["a", "b"], 0.1, chance()) == ["b", "a"]


@given(words, st.integers(0, 99))
def test_punctuating_only_adds_marks(words: list[str], seed: int) -> None:
    found = punctuate(words, 0.1, chance(seed))
    assert 1 <= len(found) - len(words) <= max(len(words) // 3, 1)
    assert [word for word in found if word not in MARKS] == words


def test_what_words_tell_by_hand() -> None:
    vocabulary = Vocabulary.of(TEXTS)
    assert vocabulary.rarity["the"] == 0
    assert vocabulary.rarity["strings"] == pytest.approx(np.log(2))
    assert vocabulary.rarity["broke"] == pytest.approx(np.log(4))
    odds = dict(zip(vocabulary.words, np.diff(vocabulary.odds, prepend=0).tolist(), strict=True))
    # Of eight words seven tell ln 4 in all their places ("strings": twice ln 2), "the" nothing.
    assert odds["the"] == pytest.approx(1, abs=1e-6)
    assert odds["broke"] == pytest.approx(0, abs=1e-6)


def test_replacing_spares_the_words_that_tell() -> None:
    vocabulary = Vocabulary.of(TEXTS)
    for seed in range(20):
        found = vocabulary.replace(["the", "strings", "broke"], 0.3, chance(seed))
        assert found[2] == "broke"
        assert set(found) <= {"the", "strings", "broke"}


def test_each_text_gets_a_variant_and_a_lone_word_stays() -> None:
    config = AugmentConfig(ways=KEEPING)
    texts = ["good", "very good strings", ""]
    found = variants(texts, config, Vocabulary.of(texts), chance(), None)
    assert (found[0], found[2]) == ("good", "")
    assert sorted(found[1].split()) == ["good", "strings", "very"]
    assert found == variants(texts, config, Vocabulary.of(texts), chance(), None)


def test_a_translation_is_taken_as_given() -> None:
    config = AugmentConfig(ways=("translate",), there="a", back="b")
    found = variants(["gute Saiten"], config, Vocabulary.of(TEXTS), chance(), ["good strings"])
    assert found == ["good strings"]


def test_translating_needs_both_directories() -> None:
    with pytest.raises(ValidationError, match="needs the directories"):
        AugmentConfig(ways=("translate",), there="a")


def test_what_is_lost_on_the_way_back_stays_as_it_was() -> None:
    config = AugmentConfig(ways=("translate",), there="a", back="b")
    vocabulary = Vocabulary.of(TEXTS[:3])
    told = variants(TEXTS[:3], config, vocabulary, chance(), ["shiny strings", "", " "])
    assert told == ["shiny strings", *TEXTS[1:3]]


def test_texts_without_words_stay_so() -> None:
    config = AugmentConfig(ways=("replace",))
    assert variants(["", " "], config, Vocabulary.of(["", " "]), chance()) == ["", ""]
