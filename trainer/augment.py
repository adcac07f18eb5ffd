"""Variants of review texts that mean the same stars, for an encoder to be fine-tuned on too.

- delete: words go; swap: two words change places (Wei and Zou 2019, "EDA", section 2);
- shift: words move in a circle; reverse: the last word comes first;
- replace: words that say little, by others that say little (Xie et al. 2020, "Unsupervised Data
  Augmentation for Consistency Training", section 2.2 and appendix on TF-IDF);
- punctuate: marks come between words (Karimi, Rossi and Prati 2021, "AEDA", section 3);
- translate: there and back (Sennrich, Haddow and Birch 2016, "Improving Neural Machine Translation
  Models with Monolingual Data", section 3.2).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model import device as devices
from trainer.config import AugmentConfig, Way
from trainer.exceptions import TrainerError
from trainer.metrics import Floats

MARKS = (".", ";", "?", ":", "!", ",")  # AEDA's
_TRANSLATED = 16  # texts at once
_LONGEST = 256  # tokens of a translation

Words = list[str]
Vary = Callable[[Words, float, np.random.Generator], Words]
"""A variant of at least two words; the share of words that change; where chance comes from."""


@dataclass(frozen=True)
class Vocabulary:
    """The v words of a shop's texts, with what they tell."""

    words: tuple[str, ...]  # (v)
    rarity: dict[str, float]  # inverse document frequency
    odds: Floats  # (v), summed up: of coming in for another, highest for those that tell least

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Vocabulary":
        """Of texts (n); idf = ln(n / texts with the word)."""
        counts: Counter[str] = Counter()
        holders: Counter[str] = Counter()
        for text in texts:
            words = text.split()
            counts.update(words)
            holders.update(set(words))
        words = tuple(sorted(counts))
        rarity = {word: float(np.log(len(texts) / holders[word])) for word in words}
        told = np.array([counts[word] * rarity[word] for word in words])
        odds = np.cumsum(told.max(initial=0) - told + 1e-9)
        return cls(words, rarity, odds / odds[-1:])  # of no words none

    def replace(self, words: Words, share: float, random: np.random.Generator) -> Words:
        """Words replaced with odds that fall with what they tell; `share` of them on average."""
        counts = Counter(words)
        told = np.array([counts[word] * self.rarity.get(word, 0.0) for word in words])
        odds = told.max() - told
        odds = share * odds / odds.mean() if odds.any() else np.full(len(told), share)
        chosen = np.flatnonzero(random.random(len(words)) < odds)
        new = np.searchsorted(self.odds, random.random(len(chosen)), "right")
        found = [*words]
        for at, number in zip(chosen.tolist(), new.tolist(), strict=True):
            found[at] = self.words[number]
        return found


def variants(
    texts: Sequence[str],
    config: AugmentConfig,
    vocabulary: Vocabulary,
    random: np.random.Generator,
    translated: Sequence[str] | None = None,
) -> list[str]:
    """One variant of each text (n), by a way drawn for each; of a single word, the word itself.

    `translated` (n) are the texts there and back, where `translate` is among the ways; one of which
    nothing was left stays as it was.
    """
    ways: dict[Way, Vary] = {**_WAYS, "replace": vocabulary.replace}
    drawn = random.integers(len(config.ways), size=len(texts)).tolist()
    found: list[str] = []
    for row, (text, number) in enumerate(zip(texts, drawn, strict=True)):
        way, words = config.ways[number], text.split()
        if way == "translate":
            found.append((translated[row].strip() if translated is not None else "") or text)
        else:
            varied = ways[way](words, config.share, random) if len(words) > 1 else words
            found.append(" ".join(varied))
    return found


def delete(words: Words, share: float, random: np.random.Generator) -> Words:
    """Each word goes with the odds `share`; one at least stays."""
    kept = random.random(len(words)) >= share
    kept[random.integers(len(words))] = True
    return [word for word, stays in zip(words, kept.tolist(), strict=True) if stays]


def swap(words: Words, share: float, random: np.random.Generator) -> Words:
    """Two words change places, as often as changes `share` of the words."""
    found = [*words]
    for _ in range(max(round(share * len(words) / 2), 1)):
        first, second = random.choice(len(words), 2, replace=False).tolist()
        found[first], found[second] = found[second], found[first]
    return found


def shift(words: Words, share: float, random: np.random.Generator) -> Words:
    """The text begins at another of its words; the words before it come last."""
    at = int(random.integers(1, len(words)))
    return words[at:] + words[:at]


def reverse(words: Words, share: float, random: np.random.Generator) -> Words:
    """The words from the last to the first."""
    return words[::-1]


def punctuate(words: Words, share: float, random: np.random.Generator) -> Words:
    """One to a third as many marks as there are words, between them."""
    count = int(random.integers(1, max(len(words) // 3, 1) + 1))
    places = np.sort(random.integers(0, len(words), count))[::-1]
    found = [*words]
    for place, mark in zip(places.tolist(), random.choice(MARKS, count).tolist(), strict=True):
        found.insert(place, mark)
    return found


_WAYS: dict[Way, Vary] = {
    "delete": delete,
    "swap": swap,
    "shift": shift,
    "reverse": reverse,
    "punctuate": punctuate,
}


def translate(texts: Sequence[str], there: Path, back: Path, device: str) -> list[str]:
    """Texts (n) in another language and back, by two sequence-to-sequence directories.

    Raises:
        TrainerError: a directory cannot be loaded.
    """
    return _through(_through(texts, there, device), back, device)


def _through(texts: Sequence[str], folder: Path, device: str) -> list[str]:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer  # seconds to import

    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    target = devices.find(device)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **safe)
        model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder, **safe, use_safetensors=True)
    except Exception as error:  # transformers raises anything, down to KeyError
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise TrainerError(f"{folder} cannot be loaded as a translation model: {reason}") from error
    model.to(target).eval()
    found: list[str] = []
    for start in range(0, len(texts), _TRANSLATED):
        tokens = tokenizer(
            list(texts[start : start + _TRANSLATED]),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=_LONGEST,
        ).to(target)
        told = model.generate(**tokens, max_new_tokens=_LONGEST)
        found += tokenizer.batch_decode(told, skip_special_tokens=True)
    return found
