"""Texts that repeat others, and those that do not."""

import numpy as np

from trainer.copies import copies, repeats

LONG = "this guitar came with a broken string and the shop sent me another one within two days"
OTHER = "a wholly different text about drums that has as many words as the first one had"
CHINESE = "这把吉他送到的时候有一根弦断了但是店家在两天之内就给我寄来了另一根弦所以我很满意"


def test_texts_that_are_copied_or_nearly() -> None:
    near = LONG.replace("two days", "three weeks")
    newer = [LONG, near, OTHER, "works great", LONG.upper()]
    found = copies([LONG, "works great"], newer)
    assert found.tolist() == [True, True, False, False, True]


def test_a_script_without_spaces() -> None:
    near = CHINESE.replace("满意", "高兴")
    other = "".join(reversed(CHINESE))
    assert copies([CHINESE, "很好"], [CHINESE, near, other, "很好"]).tolist() == [
        True, True, False, False
    ]  # fmt: skip


def test_a_text_repeats_an_earlier_one_of_its_group() -> None:
    texts = [LONG, LONG, OTHER, LONG, OTHER]
    assert repeats(texts, ["a", "b", "a", "a", "b"]).tolist() == [False, False, False, True, False]


def test_a_phrase_of_all_texts_makes_no_copies_of_them() -> None:
    """Each has 24 words of its own after a phrase of 12."""
    phrase = "this review was collected as part of a promotion of the shop"
    random = np.random.default_rng(0)
    texts = [
        f"{phrase} {' '.join(map(str, random.integers(0, 1_000_000, 24).tolist()))}"
        for _ in range(300)
    ]
    assert not repeats(texts, ["one"] * 300).any()
    assert copies(texts, texts).all()
