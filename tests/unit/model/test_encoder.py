"""Text encoders, built tiny and random by the tests themselves."""

import json
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    CanineConfig,
    CanineModel,
    CLIPConfig,
    CLIPModel,
    FNetConfig,
    FNetModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTModel,
    PhobertTokenizer,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    XmodConfig,
    XmodModel,
)

from model import encoder as encoders
from model.encoder import StarHead, TextEncoder, Vectors
from model.exceptions import EncoderError
from model.lookups import VECTOR_DTYPE
from tests.unit.model.encoders import HIDDEN, bert, save_tokenizer

TEXTS = [
    "the guitar broke",
    "a very very good string",
    "",
    "loud",
    "not a good drum case the string broke and the guitar is very quiet " * 3,
    "a very very good string",
    "   ",
]


def masked_bert(folder: Path) -> None:
    """A checkpoint with a head and without a pooler, as most are."""
    bert(folder, BertForMaskedLM)


def gpt2(folder: Path) -> None:
    size = save_tokenizer(folder, special=False)
    config = GPT2Config(
        vocab_size=size, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=40, initializer_range=0.5
    )
    GPT2Model(config).save_pretrained(folder)


def llama(folder: Path) -> None:
    size = save_tokenizer(folder, special=False)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def opt(folder: Path) -> None:
    """As the 350m one, whose vectors are narrower than its layers."""
    size = save_tokenizer(folder, special=False)
    config = OPTConfig(
        vocab_size=size,
        hidden_size=2 * HIDDEN,
        word_embed_proj_dim=HIDDEN,
        do_layer_norm_before=False,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        init_std=0.5,
    )
    OPTModel(config).save_pretrained(folder)


def t5(folder: Path) -> None:
    size = save_tokenizer(folder, special=True)
    config = T5Config(
        vocab_size=size,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)


def bart(folder: Path) -> None:
    size = save_tokenizer(folder, special=True)
    config = BartConfig(
        vocab_size=size,
        d_model=HIDDEN,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=40,
        init_std=0.5,
    )
    BartForConditionalGeneration(config).save_pretrained(folder)


def fnet(folder: Path) -> None:
    """It mixes all tokens of a row, padding too."""
    size = save_tokenizer(folder, special=True)
    config = FNetConfig(
        vocab_size=size,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    FNetModel(config).save_pretrained(folder)


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "bert": (bert, "mean"),
    "masked bert": (masked_bert, "mean"),
    "gpt2": (gpt2, "last"),
    "llama": (llama, "last"),
    "opt": (opt, "last"),
    "t5": (t5, "mean"),
    "bart": (bart, "mean"),
    "fnet": (fnet, "mean"),
}


def cut_at(folder: Path, tokens: int) -> None:
    """Let an encoder's texts be cut there."""
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": tokens}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each kind of encoder, which cuts texts at 32 tokens."""
    torch.manual_seed(0)
    made = {name: tmp_path_factory.mktemp(name.replace(" ", "-")) for name in KINDS}
    for name, folder in made.items():
        KINDS[name][0](folder)
        cut_at(folder, 32)
    return made


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A BERT directory that a test may spoil."""
    torch.manual_seed(0)
    bert(tmp_path)
    return tmp_path


@pytest.fixture(params=KINDS)
def encoder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> TextEncoder:
    """A loaded encoder of each kind."""
    return encoders.load(folders[request.param], "cpu")


def test_nothing_is_fetched(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert encoders.load(folders["bert"], "cpu").encode(["good"]).any()


def test_pooling_fits_the_architecture(folders: dict[str, Path]) -> None:
    found = {name: encoders.load(folder, "cpu").pooling for name, folder in folders.items()}
    assert found == {name: pooling for name, (_, pooling) in KINDS.items()}


def test_vectors_are_unit_and_in_order(encoder: TextEncoder) -> None:
    vectors = encoder.encode(TEXTS, token_budget=64)
    assert vectors.shape == (len(TEXTS), HIDDEN)
    assert vectors.dtype == np.float32
    blank = [not text.strip() for text in TEXTS]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.invert(blank), atol=1e-5)
    np.testing.assert_allclose(vectors[1], vectors[5], atol=1e-5)
    assert abs(vectors[0] @ vectors[1]) < 0.999  # different texts differ
    assert encoder.encode([]).shape == (0, HIDDEN)
    assert not encoder.encode(["", " "]).any()


def test_same_alone_and_in_any_batch(encoder: TextEncoder) -> None:
    together = encoder.encode(TEXTS)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    small = encoder.encode(TEXTS, token_budget=1)
    np.testing.assert_allclose(alone, together, atol=1e-5)
    np.testing.assert_allclose(small, together, atol=1e-5)


def test_batches_keep_the_token_budget(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoders.load(folders["gpt2"], "cpu")  # padded, unlike a BERT
    sizes: list[int] = []
    embed = TextEncoder.embed

    def watched(self: TextEncoder, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        sizes.append(tokens["input_ids"].numel())
        return embed(self, tokens)

    monkeypatch.setattr(TextEncoder, "embed", watched)
    texts = [" ".join(["good"] * (k % 40)) for k in range(200)]
    encoder.encode(texts, token_budget=256)
    assert max(sizes) <= 256
    used = sum(cost for cost, text in zip(encoder.count_tokens(texts), texts, strict=True) if text)
    assert sum(sizes) < 1.15 * used  # texts of like length go together
    sizes.clear()
    encoder.encode(texts, token_budget=100_000)
    assert 1_000 < max(sizes) <= 1_024  # what a CPU's caches hold


def test_mean_pooling_by_hand(folders: dict[str, Path]) -> None:
    encoder = encoders.load(folders["bert"], "cpu")
    ids = torch.tensor([encoder.tokenizer("the guitar broke")["input_ids"]])
    with torch.no_grad():
        states = encoder.model(input_ids=ids).last_hidden_state
    mean = states[0].mean(0).numpy()
    found = encoder.encode(["the guitar broke", "a much longer text of very many good words"])[0]
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-5)


def test_last_token_pooling_by_hand(folders: dict[str, Path]) -> None:
    encoder = encoders.load(folders["llama"], "cpu")
    ids = torch.tensor([encoder.tokenizer("the guitar broke")["input_ids"]])
    with torch.no_grad():
        last = encoder.model(input_ids=ids).last_hidden_state[0, -1].numpy()
    found = encoder.encode(["the guitar broke", "a much longer text of very many good words"])[0]
    np.testing.assert_allclose(found, last / np.linalg.norm(last), atol=1e-5)


@pytest.mark.parametrize("said", [{"pooling_mode_cls_token": True}, {"pooling_mode": "cls"}])
def test_pooling_as_the_directory_says(said: dict[str, Any], own: Path) -> None:
    (own / "1_Pooling").mkdir()
    (own / "1_Pooling/config.json").write_text(json.dumps(said))
    encoder = encoders.load(own, "cpu")
    assert encoder.pooling == "cls"
    with torch.no_grad():
        states = encoder.model(**encoder.tokens(["good"])).last_hidden_state[0, 0].numpy()
    np.testing.assert_allclose(
        encoder.encode(["good"])[0], states / np.linalg.norm(states), atol=1e-5
    )


def test_texts_are_cut(encoder: TextEncoder) -> None:
    assert encoder.count_tokens(["", "good " * 500]) == [
        max(1, len(encoder.tokenizer("")["input_ids"])),
        32,
    ]
    assert encoder.encode(["good " * 500]).any()


def test_a_text_is_cut_where_its_encoder_says(own: Path, tmp_path: Path) -> None:
    cut_at(own, 7)
    encoder = encoders.load(own, "cpu")
    assert encoder.cut(["good " * 500]) == [encoder.cut(["good " * 5])[0]]
    assert len(encoder.cut(["good " * 500])[0]) == 7
    encoder.save(tmp_path / "saved")
    assert encoders.load(tmp_path / "saved", "cpu").longest_tokens == 7
    cut_at(own, 8)
    assert encoders.folder_hash(own) != encoder.hash  # other vectors


@pytest.mark.parametrize("said", ["7", '{"max_seq_length": "all"}', '{"max_seq_length": -1}', "{"])
def test_a_cut_that_is_no_number_is_told(said: str, own: Path) -> None:
    (own / "sentence_bert_config.json").write_text(said)
    with pytest.raises(EncoderError, match=r"sentence_bert_config\.json"):
        encoders.load(own, "cpu")


def test_a_text_is_never_longer_than_the_model(own: Path) -> None:
    cut_at(own, 10_000)
    encoder = encoders.load(own, "cpu")
    assert encoder.longest_tokens == 40
    assert encoder.encode(["good " * 500]).any()


def test_a_model_of_texts_and_pictures_is_refused(tmp_path: Path) -> None:
    size = save_tokenizer(tmp_path, special=True)
    small: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "projection_dim": 8}
    CLIPModel(
        CLIPConfig(
            text_config=small | {"vocab_size": size, "max_position_embeddings": 40},
            vision_config=small | {"image_size": 8, "patch_size": 4},
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="CLIPModel is no model of texts alone"):
        encoders.load(tmp_path, "cpu")


def test_a_model_without_a_table_of_words_is_refused(tmp_path: Path) -> None:
    """Canine hashes characters."""
    save_tokenizer(tmp_path, special=True)
    config = CanineConfig(
        hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    CanineModel(config).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="CanineModel has no table of words"):
        encoders.load(tmp_path, "cpu")


def test_a_model_that_cannot_read_is_refused_before_texts_come(tmp_path: Path) -> None:
    """X-MOD wants to be told a language."""
    size = save_tokenizer(tmp_path, special=True)
    config = XmodConfig(
        vocab_size=size,
        pad_token_id=0,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    XmodModel(config).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="cannot read a text: Input language unknown"):
        encoders.load(tmp_path, "cpu")


def test_positions_before_the_first_are_not_for_texts(tmp_path: Path) -> None:
    """RoBERTa counts from the one after padding's: of 40 positions a text has 38."""
    torch.manual_seed(0)
    size = save_tokenizer(tmp_path, special=True)
    RobertaModel(
        RobertaConfig(
            vocab_size=size,
            pad_token_id=1,
            hidden_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=40,
        )
    ).save_pretrained(tmp_path)
    encoder = encoders.load(tmp_path, "cpu")
    assert encoder.longest_tokens == 38
    assert encoder.encode(["good " * 500]).any()


def test_files_of_unusual_tokenizers_are_of_the_encoder(tmp_path: Path) -> None:
    """PhoBERT cuts words by `bpe.codes`: a bundle without them could not be loaded."""
    (tmp_path / "vocab.txt").write_text("the 2\ngui@@ 1\ntar 1\n")
    (tmp_path / "bpe.codes").write_text("t h 3\nth e</w> 2\ng u 1\ngu i 1\nt a 1\nta r</w> 1\n")
    words = (str(tmp_path / name) for name in ("vocab.txt", "bpe.codes"))
    tokenizer = PhobertTokenizer(*words)
    tokenizer.save_pretrained(tmp_path)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=1,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    RobertaModel(config).save_pretrained(tmp_path)
    before = encoders.load(tmp_path, "cpu")
    assert before.count_tokens(["the guitar"]) == [5]
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in encoders.files(tmp_path):
        (copy / name).write_bytes((tmp_path / name).read_bytes())
    after = encoders.load(copy, "cpu")
    np.testing.assert_array_equal(after.encode(TEXTS), before.encode(TEXTS))
    codes = tmp_path / "bpe.codes"
    codes.write_text(codes.read_text().replace("gu i", "u i"))
    assert encoders.folder_hash(tmp_path) != before.hash  # other vectors


def test_projection_keeps_cosines_about_and_blank_vectors(encoder: TextEncoder) -> None:
    hidden = encoder.encode(TEXTS)
    kept = encoder.project(hidden)
    assert kept.shape == (len(TEXTS), min(encoders.WIDTH, HIDDEN)) == (len(TEXTS), encoder.width)
    np.testing.assert_allclose(
        np.linalg.norm(kept, axis=1), np.linalg.norm(hidden, axis=1), atol=1e-3
    )
    np.testing.assert_allclose(kept @ kept.T, hidden @ hidden.T, atol=1e-3)  # a rotation here


def test_training_reads_the_vectors_that_are_served(encoder: TextEncoder) -> None:
    kept = encoder.project(encoder.encode(TEXTS))
    np.testing.assert_array_equal(kept, kept.astype(VECTOR_DTYPE))


def test_the_default_projection_is_the_same_everywhere(folders: dict[str, Path]) -> None:
    first, second = (encoders.load(folders[name], "cpu") for name in ("bert", "llama"))
    np.testing.assert_array_equal(first.projection.weight, second.projection.weight)
    # Pinned: another matrix under the same encoder hash would mix two kinds of vectors.
    pinned = [0.316067, 0.178951, 0.056727]
    np.testing.assert_allclose(first.projection.weight[0, :3], pinned, atol=1e-5)


def write_projection(folder: Path, mean: Vectors, weight: Vectors) -> None:
    save_file({"mean": mean, "weight": weight}, folder / encoders.PROJECTION)


def test_a_projection_is_part_of_the_encoder(own: Path) -> None:
    before = encoders.load(own, "cpu")
    mean = np.full(HIDDEN, 0.25, np.float32)
    write_projection(own, mean, np.eye(HIDDEN, 2, dtype=np.float32))
    after = encoders.load(own, "cpu")
    assert after.hash != before.hash
    assert after.width == 2
    given = np.stack([mean, mean])
    given[1, :2] += np.array([3, 4], np.float32)
    np.testing.assert_allclose(after.project(given), [[0, 0], [0.6, 0.8]], atol=5e-4)


def test_star_head(own: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    head = StarHead(
        random.normal(size=(5, HIDDEN)).astype(np.float32), np.arange(5, dtype=np.float32)
    )
    file = tmp_path / encoders.STAR_HEAD
    plain = encoders.load(own, "cpu")
    encoders.write_star_head(file, head)
    encoder = encoders.load(own, "cpu", file)
    assert encoder.hash == plain.hash  # a new head is no new encoder
    hidden = encoder.encode(TEXTS)
    stars = encoder.stars(hidden)
    np.testing.assert_allclose(stars.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(
        np.log(stars),
        torch.log_softmax(torch.tensor(hidden @ head.weight.T + head.bias), 1),
        atol=1e-5,
    )
    with pytest.raises(EncoderError, match="no star head"):
        plain.stars(hidden)
    encoders.write_star_head(file, StarHead(head.weight[:4], head.bias[:4]))
    with pytest.raises(EncoderError, match="weight must be of shape"):
        encoders.load(own, "cpu", file)
    file.write_bytes(b"\x80\x04.")
    with pytest.raises(EncoderError, match="cannot be read"):
        encoders.load(own, "cpu", file)


def test_gradients_reach_the_weights(encoder: TextEncoder) -> None:
    encoder.embed(encoder.tokens(["good guitar", "bad"]))[:, 0].sum().backward()
    gradients = [p.grad for p in encoder.model.parameters() if p.grad is not None]
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart"])
def test_a_changed_encoder_is_saved(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = encoders.load(folders[name], "cpu")
    before = encoder.encode(TEXTS)
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter.mul_(1.1)
    encoder.save(tmp_path / "tuned")
    again = encoders.load(tmp_path / "tuned", "cpu")
    assert again.hash != encoder.hash
    assert again.pooling == encoder.pooling
    np.testing.assert_allclose(again.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)
    assert not np.allclose(again.encode(TEXTS), before, atol=1e-3)


def test_the_hash_is_of_what_shapes_vectors(own: Path) -> None:
    first = encoders.folder_hash(own)
    for name in ("README.md", "pytorch_model.bin", ".cache.json", encoders.STAR_HEAD):
        (own / name).write_text("x")
    assert encoders.folder_hash(own) == first
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        with (own / name).open("ab") as file:
            file.write(b" ")
        assert encoders.folder_hash(own) != first
        first = encoders.folder_hash(own)


def spoil_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def spoil_pooling(folder: Path, content: str) -> None:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(content)


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def own_code(folder: Path) -> None:
    """A model of a kind that only code in its directory knows."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: ...\n")
    spoil_config(
        folder,
        model_type="evil",
        auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"},
    )


def no_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).flat[0] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "only pickled": (only_pickled, "no safetensors weights; pickled weights are never loaded"),
    "own code": (own_code, "cannot be loaded as a text encoder"),
    "a config that is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        "cannot be loaded as a text encoder",
    ),
    "damaged weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04."),
        "cannot be loaded as a text encoder",
    ),
    "missing weights": (
        lambda f: spoil_config(f, num_hidden_layers=3),
        r"lacks \d+ weights, first",
    ),
    "weights that are no numbers": (no_numbers, "weights of .* are no numbers"),
    "weights of another size": (
        lambda f: spoil_config(f, intermediate_size=64),
        "cannot be loaded as a text encoder",
    ),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("tokenizer*")],
        "a tokenizer of . tokens does not fit",
    ),
    "a pooling that is no JSON": (lambda f: spoil_pooling(f, "{"), r"1_Pooling.config\.json"),
    "a pooling of no names": (lambda f: spoil_pooling(f, "[]"), r"1_Pooling.config\.json"),
    "a projection of another length": (
        lambda f: write_projection(f, np.zeros(3, np.float32), np.zeros((3, 2), np.float32)),
        "mean must be of shape",
    ),
    "a projection of no numbers": (
        lambda f: write_projection(
            f, np.zeros(HIDDEN, np.float32), np.full((HIDDEN, 2), np.inf, np.float32)
        ),
        "weight has what is no number",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_cannot_be_an_encoder_is_refused(own: Path, name: str) -> None:
    spoil, reason = SPOILT[name]
    spoil(own)
    with pytest.raises(EncoderError, match=reason) as caught:
        encoders.load(own, "cpu")
    assert str(own) in str(caught.value)
    assert not (own / "ran").exists()


def test_a_hub_name_is_no_directory() -> None:
    with pytest.raises(EncoderError, match=r"no config\.json"):
        encoders.load(Path("bert-base-uncased"), "cpu")


@pytest.mark.parametrize(
    ("title", "text", "joined"),
    [("T", "x", "T\nx"), (None, "x", "x"), (" ", None, ""), ("T ", "", "T"), (None, None, "")],
)
def test_review_text(title: str | None, text: str | None, joined: str) -> None:
    assert encoders.review_text(title, text) == joined


def test_settings_name_an_encoder(tmp_path: Path) -> None:
    assert encoders.locate("none") is None
    assert encoders.locate(str(tmp_path)) == tmp_path
    packaged = find_spec(encoders.PACKAGED)
    assert (encoders.locate("auto") is None) == (packaged is None)


@pytest.mark.skipif(find_spec(encoders.PACKAGED) is None, reason="the demo extra is not installed")
def test_the_packaged_encoder() -> None:
    folder = encoders.locate("auto")
    assert folder is not None
    encoder = encoders.load(folder, "cpu")
    assert (encoder.pooling, encoder.hidden, encoder.width) == ("mean", 384, 64)
    hidden = encoder.encode(
        ["great guitar strings", "excellent strings for a guitar", "a pack of baby diapers"]
    )
    for vectors in (hidden, encoder.project(hidden)):
        cosines = vectors @ vectors.T
        assert cosines[0, 1] > 0.7 > 0.4 > cosines[0, 2]
