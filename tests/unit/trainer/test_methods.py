"""Which weights of an encoder a method fits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    ElectraConfig,
    ElectraModel,
    ModernBertConfig,
    ModernBertModel,
    OPTConfig,
    OPTModel,
)

from model import encoder as encoders
from model.encoder import TextEncoder
from tests.unit.trainer.shop import write_encoder
from trainer import methods
from trainer.config import FineTuneConfig, Method
from trainer.exceptions import TrainerError

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def encoder_of(folder: Path, model: Any) -> TextEncoder:
    """A tiny random encoder of another kind."""
    model.save_pretrained(write_encoder(folder))
    return encoders.load(folder, "cpu")


def test_a_model_without_layers_takes_no_adapters(encoder_folder: Path) -> None:
    bare = replace(encoders.load(encoder_folder, "cpu"), model=torch.nn.Linear(2, 2))
    with pytest.raises(encoders.EncoderError, match="no stack of layers"):
        methods.trainable(bare, "adapters", FineTuneConfig(), 1)


def test_layers_that_are_asked_of_which_kind_they_are_take_adapters(tmp_path: Path) -> None:
    special: dict[str, Any] = {
        f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")
    }
    encoder = encoder_of(tmp_path, ModernBertModel(ModernBertConfig(**SIZES, **special)))
    model = methods.trainable(encoder, "adapters", FineTuneConfig(), 1)
    assert encoder.holding(model).embed(encoder.tokens(["good thing"])).requires_grad


def test_adapters_are_as_wide_as_the_layers(tmp_path: Path) -> None:
    """Of OPT-350m these are wider than what it says."""
    config = OPTConfig(**SIZES, word_embed_proj_dim=12, do_layer_norm_before=False)
    encoder = encoder_of(tmp_path, OPTModel(config))
    model = methods.trainable(encoder, "adapters", FineTuneConfig(), 1)
    assert encoder.holding(model).embed(encoder.tokens(["good thing"])).shape == (1, 12)
    methods.write(encoder, "adapters", tmp_path / "adapted")
    assert encoders.load(tmp_path / "adapted", "cpu").encode(["good thing"]).shape == (1, 12)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_leave_texts_the_other_positions(
    method: Method, encoder_folder: Path
) -> None:
    encoder = encoders.load(encoder_folder, "cpu")
    model = methods.trainable(encoder, method, FineTuneConfig(virtual_tokens=4), 1)
    longest = encoder.holding(model)
    assert longest.longest_tokens == 40 - 4
    assert longest.embed(longest.tokens(["good thing " * 50])).requires_grad


@pytest.mark.parametrize(
    ("model", "method", "why"),
    [
        (AlbertModel(AlbertConfig(**SIZES)), "prefix", "does not hear what is added"),
        (ElectraModel(ElectraConfig(**SIZES, embedding_size=16)), "prompt", "Sizes of tensors"),
    ],
)
def test_a_model_that_takes_no_virtual_tokens_is_refused(
    model: Any, method: Method, why: str, tmp_path: Path
) -> None:
    encoder = encoder_of(tmp_path, model)
    with pytest.raises(TrainerError, match=why):
        methods.trainable(encoder, method, FineTuneConfig(), 1)
