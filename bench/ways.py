"""Ways to make vectors of texts with the same weights: ours, made smaller, and the peers' own."""

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.clock import seconds
from model import encoder as encoders
from model import int8, products
from model.encoder import TextEncoder
from trainer import compress
from trainer.progress import unseen
from trainer.text import ReviewTexts

Vectors = NDArray[np.float32]

INT8, INT8_STATIC, STUDENT = "int8", "int8 static", "student"  # of `trainer.compress.ways`
FP32, BF16, COMPILED = "fp32", "bf16", "compiled"
SENTENCES, TRANSFORMERS = "sentence-transformers", "transformers"
PLAIN_BATCH = 32  # texts, sentence-transformers' default too
PEER_BATCHES = {"cpu": (8, 32, 128), "cuda": (32, 128, 512)}  # texts; 8 suits a CPU's caches


@dataclass(frozen=True)
class Way:
    """One way to make vectors (n, hidden) of unit length."""

    name: str
    encode: Callable[[Sequence[str]], Vectors]
    encoder: TextEncoder | None = None  # none: a peer
    settings: str = ""


@dataclass(frozen=True)
class Shape:
    """What an encoder built as BERT is multiplies."""

    hidden: int
    inner: int
    layers: int

    def operations(self, tokens: Iterable[int]) -> float:
        """Multiplications and additions for texts of so many tokens each."""
        by_token = 2 * (4 * self.hidden**2 + 2 * self.hidden * self.inner)
        return float(self.layers * sum(n * by_token + 4 * n * n * self.hidden for n in tokens))


def shape(encoder: TextEncoder) -> Shape:
    """The shape of an encoder."""
    settings: Any = encoder.model.config
    return Shape(settings.hidden_size, settings.intermediate_size, settings.num_hidden_layers)


def matrix_rate(
    sizes: Shape, tokens: int, device: torch.device, dtype: torch.dtype, least: float
) -> float:
    """Operations a second of torch.mm on a layer's own products, of so many tokens at once.

    In torch.int8 it is that of the encoder's own product, codes in and float32 numbers out, and in
    single precision that of oneDNN where it is the faster one. It is measured for `least` seconds
    or longer.
    """
    square, wide, narrow = (
        (sizes.hidden, sizes.hidden),
        (sizes.hidden, sizes.inner),
        (sizes.inner, sizes.hidden),
    )
    shapes = (square, square, square, square, wide, narrow)
    products = [_product(tokens, *each, dtype, device) for each in shapes]
    layer = sum(2 * tokens * given * gives for given, gives in shapes)

    def multiply() -> None:
        for product in products:
            product()

    def layers() -> None:
        for _ in range(repeats):
            multiply()

    repeats = 1
    layers()  # what is set up at first is not timed
    while (spent := seconds(layers, device)) < least:
        repeats = max(2 * repeats, int(1.2 * repeats * least / max(spent, 1e-9)))
    return repeats * layer / spent


def _product(
    tokens: int, given: int, gives: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], Any]:
    if dtype == torch.int8:
        layer, rows = int8.Linear(torch.nn.Linear(given, gives)), int8.Rows.room(tokens, given)
        int8.take(torch.randn(tokens, given), layer, rows)
        return partial(layer.multiplied, rows.codes)
    if device.type == "cpu" and dtype == torch.float32 and products.by_onednn():
        return partial(products.multiply, torch.randn(tokens, given), torch.randn(gives, given))
    left = torch.randn(tokens, given, dtype=dtype, device=device)
    return partial(torch.mm, left, torch.randn(given, gives, dtype=dtype, device=device))


def ours(name: str, encoder: TextEncoder, budget: int) -> Way:
    """An encoder as the `texts` worker uses it."""
    return Way(
        name,
        lambda texts: encoder.encode(texts, budget),
        encoder,
        f"at most {budget} tokens a batch",
    )


def smaller(
    name: str, parent: TextEncoder, reviews: ReviewTexts, folder: Path, seed: int
) -> TextEncoder:
    """What `starcast compress` makes of an encoder, as it would be served."""
    place = folder / name.replace(" ", "-")
    compress.ways(parent, seed, unseen)[name](parent, reviews, place)
    return encoders.load(place, str(parent.device))


def copy(encoder: TextEncoder) -> TextEncoder:
    """The same encoder, loaded again."""
    return encoders.load(encoder.folder, str(encoder.device))


def model_of_transformers(encoder: TextEncoder, dtype: torch.dtype = torch.float32) -> Any:
    """An encoder's model as transformers loads it: whose layers PyTorch multiplies as they come."""
    package: Any = importlib.import_module("transformers")
    model = package.AutoModel.from_pretrained(
        encoder.folder, local_files_only=True, use_safetensors=True, dtype=dtype
    )
    return model.to(encoder.device)


def compiled(encoder: TextEncoder) -> TextEncoder:
    """An encoder whose model goes through torch.compile, its weights as constants."""
    own = copy(encoder)
    settings: Any = {"freezing": True}
    model: Any = torch.compile(own.model, dynamic=True, options=settings)
    return replace(own, model=model)


def in_bf16(encoder: TextEncoder) -> TextEncoder:
    """An encoder whose model works in bfloat16 on a GPU."""
    return encoders.load(encoder.folder, str(encoder.device), precision="bf16")


def sentences(encoder: TextEncoder, dtype: torch.dtype, texts: Sequence[str]) -> Way:
    """sentence-transformers, which sorts by length itself, with the fastest batch size of three."""
    package: Any = importlib.import_module("sentence_transformers")
    model: Any = package.SentenceTransformer(
        str(encoder.folder),
        device=str(encoder.device),
        local_files_only=True,
        model_kwargs={"torch_dtype": dtype},
    )
    model.max_seq_length = encoder.longest_tokens

    def encode(texts: Sequence[str], size: int) -> Vectors:
        vectors = model.encode(
            list(texts), batch_size=size, normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(vectors, np.float32)

    sizes = PEER_BATCHES[encoder.device.type]
    encode(texts, sizes[-1])
    spent: dict[float, int] = {}
    for size in sizes:
        spent[seconds(partial(encode, texts, size), encoder.device)] = size
    best = spent[min(spent)]
    return Way(SENTENCES, lambda texts: encode(texts, best), None, f"{best} texts a batch")


def plain(encoder: TextEncoder, dtype: torch.dtype) -> Way:
    """transformers as all-MiniLM-L6-v2's own page has it: padded batches in order of arrival."""
    package: Any = importlib.import_module("transformers")
    tokenizer = package.AutoTokenizer.from_pretrained(encoder.folder, local_files_only=True)
    model = model_of_transformers(encoder, dtype).eval()
    size = PLAIN_BATCH

    def encode(texts: Sequence[str]) -> Vectors:
        parts: list[Vectors] = []
        for first in range(0, len(texts), size):
            tokens = tokenizer(
                list(texts[first : first + size]),
                padding=True,
                truncation=True,
                max_length=encoder.longest_tokens,
                return_tensors="pt",
            ).to(encoder.device)
            with torch.no_grad():
                states = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
            mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            unit = torch.nn.functional.normalize(mean.float(), dim=1)
            parts.append(unit.cpu().numpy())
        return np.concatenate(parts)

    return Way(TRANSFORMERS, encode, None, f"{size} texts a batch")
