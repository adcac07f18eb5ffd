"""Smaller encoders, on one that is tiny."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any, cast

import numpy as np
import pytest
from transformers import (
    AlbertConfig,
    AlbertModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2Model,
    Qwen3Config,
    Qwen3Model,
)

from model import encoder as encoders
from model.exceptions import EncoderError
from tests.unit.trainer.shop import write_encoder
from tests.unit.trainer.test_text import texts
from trainer import compress as compressing
from trainer.compress import Compressed, choose, compress, ways
from trainer.config import AdaptConfig, TrainerConfig
from trainer.exceptions import TrainerError
from trainer.metrics import TextScores

CONFIG = TrainerConfig(threads=1, device="cpu")


@pytest.fixture(scope="module")
def found(encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Compressed]:
    parent = encoders.load(encoder_folder, "cpu")
    folder = tmp_path_factory.mktemp("compressed")
    return compress(texts(), parent, CONFIG, folder, lambda done, total: None)


def test_each_way_stands_beside_the_parent(found: list[Compressed]) -> None:
    names = [each.name for each in found]
    assert names == [
        "parent", "1 layers", "1 heads", "bf16", "fp16", "int8", "int8 static", "student"
    ]  # fmt: skip
    by_name = {each.name: each for each in found}
    assert len({by_name[name].scores.rows for name in names}) == 1
    assert by_name["bf16"].size_bytes < by_name["parent"].size_bytes
    assert by_name["1 layers"].size_bytes < by_name["parent"].size_bytes
    assert all(each.texts_per_second > 0 for each in found)
    assert by_name["int8"].scores.accuracy > 0.9


def test_each_is_an_encoder_that_loads(found: list[Compressed]) -> None:
    words = ["good thing", "awful thing"]
    parent = encoders.load(found[0].folder, "cpu").encode(words)
    hashes: set[str] = set()
    for each in found:
        encoder = encoders.load(each.folder, "cpu")
        hashes.add(encoder.hash)
        vectors = encoder.encode(words)
        assert vectors.shape == parent.shape
        if each.name in ("bf16", "fp16", "int8", "int8 static"):
            assert ((vectors * parent).sum(1) > 0.95).all()
    assert len(hashes) == len(found)


def test_a_student_learns_what_its_parent_says(found: list[Compressed]) -> None:
    """The tiny parent has two layers, so its student has both and starts as a copy."""
    words = ["good thing", "awful thing", "fair thing"]
    by_name = {each.name: encoders.load(each.folder, "cpu").encode(words) for each in found}
    assert ((by_name["student"] * by_name["parent"]).sum(1) > 0.99).all()


SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}


@pytest.mark.parametrize(
    "model",
    [
        GPT2Model(GPT2Config(vocab_size=20, n_embd=24, n_layer=3, n_head=2, n_positions=40)),
        Qwen3Model(Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=12)),  # layers of kinds
        DebertaV2Model(DebertaV2Config(**SIZES)),  # attention of another kind
        AlbertModel(AlbertConfig(**SIZES)),  # one layer, read three times
    ],
    ids=lambda model: type(model).__name__,
)
def test_encoders_of_other_kinds_become_smaller(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(write_encoder(tmp_path / "parent"))
    parent = encoders.load(tmp_path / "parent", "cpu")
    tried = ways(parent, 7, lambda done, total: None)
    assert ("int8" in tried) == (not isinstance(model, GPT2Model))  # it has nothing to take
    for name, make in tried.items():
        make(parent, texts(), tmp_path / name)
        smaller = encoders.load(tmp_path / name, "cpu")
        assert np.isfinite(smaller.encode(["good thing", "awful"])).all()
        if name == "student":
            assert cast(Any, smaller.model).config.num_hidden_layers <= 2


def test_what_was_cut_short_is_made_again(
    encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between weights and what makes them eight bits wide."""
    parent = encoders.load(encoder_folder, "cpu")
    alone = {"int8": ways(parent, 7, lambda done, total: None)["int8"]}
    monkeypatch.setattr(compressing, "ways", lambda *_: alone)

    def made() -> list[Compressed]:
        return compress(texts(), parent, CONFIG, tmp_path / "new", lambda done, total: None)

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(compressing.encoders, "write_quantization", killed)
        with pytest.raises(KeyboardInterrupt):
            made()
    assert (made()[1].folder / encoders.QUANTIZATION).exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["int8"]


def test_what_is_compressed_is_not_compressed_again(
    found: list[Compressed], tmp_path: Path
) -> None:
    quantized = encoders.load(next(e for e in found if e.name == "int8").folder, "cpu")
    with pytest.raises(TrainerError, match="not plain"):
        compress(texts(), quantized, CONFIG, tmp_path, lambda done, total: None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"linear": "int8"}, "earlier version"),
        ({"ranges": {"encoder.layer.9": [0, 1]}}, "does not fit"),
        ({"ranges": {"encoder.layer.0.output.dense": [0, 1, 2]}}, "does not fit"),
    ],
)
def test_eight_bits_of_another_kind_are_refused(
    found: list[Compressed], tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    copytree(next(e for e in found if e.name == "int8").folder, tmp_path / "copy")
    file = tmp_path / "copy" / encoders.QUANTIZATION
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(EncoderError, match=reason):
        encoders.load(tmp_path / "copy", "cpu")


def test_the_fastest_within_the_bound_is_chosen() -> None:
    def one(name: str, rmse: float, speed: float) -> Compressed:
        return Compressed(name, Path(name), TextScores(9, rmse, 0, 1, 1, 1), 1, speed)

    found = [one("parent", 0.7, 10), one("fast", 0.706, 20), one("fastest", 0.8, 40)]
    assert choose(found, 0.01).name == "fast"
    assert choose(found, 0.0).name == "parent"
    assert choose(found, 1.0).name == "fastest"
    assert np.isclose(found[1].scores.rmse / found[0].scores.rmse - 1, 0.00857, atol=1e-4)


def test_the_parent_is_not_adapted(masking_folder: Path, tmp_path: Path) -> None:
    """Its folder may be that of a bundle, in which a file too many is a damage."""
    parent = copytree(masking_folder, tmp_path / "parent")
    before = sorted(parent.rglob("*"))
    text = CONFIG.text.model_copy(update={"adapt": AdaptConfig(epochs=1)})
    config = CONFIG.model_copy(update={"text": text})
    encoder = encoders.load(parent, "cpu")
    found = compress(texts(), encoder, config, tmp_path / "new", lambda done, total: None)
    assert sorted(parent.rglob("*")) == before
    assert found[0].folder == parent
