"""BERT encoders, tiny and random, and what transformers makes of texts with them."""

from typing import Any, cast

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from transformers import BertConfig, BertModel

HIDDEN, WORDS, LONGEST = 32, 50, 40
Tokens = list[list[int]]

token_lists = st.lists(
    st.lists(st.integers(1, WORDS - 1), min_size=1, max_size=LONGEST), min_size=1, max_size=12
)
poolings = st.sampled_from(["mean", "cls", "last"])


def small(**changes: Any) -> BertModel:
    """A BERT of two layers with random weights."""
    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": LONGEST,
        "initializer_range": 0.5,
    }
    model = BertModel(BertConfig(**settings | changes)).eval()
    for name, weights in model.named_parameters():
        if name.endswith("bias"):  # zero to begin with, so that nothing would tell if it were lost
            nn.init.normal_(weights, std=0.5)
    return model


def one_by_one(model: BertModel, tokens: Tokens, pooling: str) -> NDArray[np.float32]:
    """What transformers makes of each text alone, where nothing is padded."""
    found: list[torch.Tensor] = []
    with torch.no_grad():
        for each in tokens:
            states = cast(Any, model)(input_ids=torch.tensor([each])).last_hidden_state[0]
            taken = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
            found.append(nn.functional.normalize(taken, dim=0))
    return torch.stack(found).numpy()
