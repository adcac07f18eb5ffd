"""A small generated shop and a tiny random encoder, for the trainer's tests."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from schemas.records import Behavior, Item, Record, Review, User

START = datetime(2024, 1, 1, tzinfo=UTC)
CATEGORIES = ("guitars", "drums", "pianos")
WORDS = ("awful", "poor", "fair", "good", "superb")  # one a star
USERS, ITEMS, REVIEWS = 40, 24, 700

Entries = list[tuple[str, Record]]


def shop(seed: int = 0) -> Entries:
    """Items and users first, then views and reviews in the order of time.

    Stars come from a user's taste for the item's category, which a user's mean and an item's mean
    cannot tell, and a little noise. The word in a review says its stars.
    """
    random = np.random.default_rng(seed)
    taste = random.choice([-1.4, 0.0, 1.4], (USERS, len(CATEGORIES)))
    entries: Entries = [("items", item(number)) for number in range(ITEMS)]
    entries += [
        ("users", User(user_id=f"u{number}", event_time=START, age=20.0 + number % 50))
        for number in range(USERS)
    ]
    for number in range(REVIEWS):
        user, product = int(random.integers(USERS)), int(random.integers(ITEMS))
        liking = 3 + taste[user, product % len(CATEGORIES)] + random.normal(0, 0.4)
        stars = int(np.clip(np.rint(liking), 1, 5))
        time = START + timedelta(hours=number)
        entries.append(("behavior", view(number, user, product, time)))
        entries.append(("reviews", review(number, user, product, time, stars)))
    return entries


def item(number: int) -> Item:
    category = CATEGORIES[number % len(CATEGORIES)]
    return Item(
        item_id=f"i{number}",
        event_time=START,
        title=f"{category} number {number}",
        brand=f"brand {number % 5}",
        category=[category],
        price=10.0 + number,
    )


def view(number: int, user: int, product: int, time: datetime) -> Behavior:
    return Behavior(
        event_id=f"v{number}",
        user_id=f"u{user}",
        item_id=f"i{product}",
        event_time=time,
        action="view",
    )


def review(number: int, user: int, product: int, time: datetime, stars: int) -> Review:
    return Review(
        event_id=f"r{number}",
        user_id=f"u{user}",
        item_id=f"i{product}",
        event_time=time + timedelta(minutes=1),
        rating=float(stars),
        title="Review" if number % 3 else None,
        text=f"{WORDS[stars - 1]} thing {number}",
    )


def write_encoder(
    folder: Path, words: Sequence[str] = (*WORDS, *CATEGORIES, "thing"), mask: str | None = None
) -> Path:
    """A random two-layer encoder of whole words, in Hugging Face form; `mask`: its mask token."""
    torch.manual_seed(0)
    named = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *([mask] if mask else []), *words]
    vocabulary = {word: k for k, word in enumerate(named)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", mask_token=mask
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return folder
