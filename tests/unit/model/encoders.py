"""Encoders in Hugging Face form, tiny and random."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = [
    "the",
    "a",
    "and",
    "good",
    "bad",
    "guitar",
    "string",
    "drum",
    "case",
    "very",
    "not",
    "broke",
]
HIDDEN = 24


def save_tokenizer(folder: Path, special: bool) -> int:
    """A tokenizer of whole words, with or without [CLS] and [SEP]; returns its size."""
    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    names: dict[str, str] = {"unk_token": "[UNK]"}
    if special:
        names |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return len(vocabulary)


def bert(folder: Path, kind: Any = BertModel) -> None:
    size = save_tokenizer(folder, special=True)
    config = BertConfig(
        vocab_size=size,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        initializer_range=0.5,
    )
    kind(config).save_pretrained(folder)
