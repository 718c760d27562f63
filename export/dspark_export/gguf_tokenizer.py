"""tokenizer.json from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from dspark_export.errors import ExportError
from dspark_export.tokenizer_info import TokenizerInfo

_USE_FOLDER = "export from the model's Hugging Face folder instead, which holds the original tokenizer.json"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")

# tokenizer.ggml.pre -> how text is cut before merging: a regular expression, or one of the two names below.
_GPT2 = "gpt2"
_DIGITS_GPT2 = "digits, then gpt2"
_PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _DIGITS_GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "qwen35": _QWEN35,
}
_NORMALISED_NFC = (_QWEN2, _QWEN35)
# Llama 3 takes a whole word that is in the vocabulary without looking at merges.
_IGNORES_MERGES = (_LLAMA3,)

# Tokens that end a turn; counted as EOS where the file's own chat template writes them.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<turn|>")


class TokenType(IntEnum):
    """Values of ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class _Fields:
    """Metadata of one file, with errors that name the key."""

    def __init__(self, source: gguf.GGUFReader | Mapping[str, Any]) -> None:
        self._source = source

    def get(self, key: str, default: Any = None) -> Any:
        if isinstance(self._source, Mapping):
            return self._source.get(key, default)
        field = self._source.get_field(key)
        return default if field is None else field.contents()

    def require(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ExportError(f"GGUF: expected the metadata key {key}, which the file does not have; {_USE_FOLDER}")
        return value


def write_tokenizer(source: gguf.GGUFReader | Mapping[str, Any], out_dir: Path) -> TokenizerInfo:
    """Write ``out_dir/tokenizer.json`` from GGUF metadata.

    Args:
        source: an open file, or its metadata as a mapping from key to plain value.
        out_dir: an existing directory.

    Raises:
        ExportError: a kind of tokenizer that we cannot rebuild exactly, or broken metadata.
    """
    fields = _Fields(source)
    tokens: list[str] = list(fields.require("tokenizer.ggml.tokens"))
    types = [int(kind) for kind in fields.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))]
    if len(types) != len(tokens):
        raise ExportError(f"GGUF: expected one token_type a token ({len(tokens)}), got {len(types)}; the file is broken")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise ExportError(f"GGUF: expected every token once, but {twice!r} occurs again; {_USE_FOLDER}")

    model = fields.require("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(fields, vocab)
    elif model == "llama":
        tokenizer = _sentencepiece(fields, tokens, types, vocab)
    else:
        raise ExportError(f"GGUF: tokenizer.ggml.model is {model!r}, expected gpt2 or llama; {_USE_FOLDER}")
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        found = [token for token, its_kind in zip(tokens, types, strict=True) if its_kind == kind]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in found])

    info = _info(fields, tokens, types, adds_bos_by_default=model == "llama")
    if info.add_bos:
        bos = (info.bos_token, info.bos_token_id)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]}:1 $B:1", special_tokens=[bos]
        )
    tokenizer.save(str(out_dir / "tokenizer.json"), pretty=False)
    return info


def _byte_level(fields: _Fields, vocab: dict[str, int]) -> Tokenizer:
    pre = fields.get("tokenizer.ggml.pre", "default")
    split = _PRE_TOKENIZERS.get(pre)
    if split is None:
        raise ExportError(
            f"GGUF: tokenizer.ggml.pre is {pre!r}, expected one of {', '.join(_PRE_TOKENIZERS)}; {_USE_FOLDER}"
        )
    merges = _merges(fields.require("tokenizer.ggml.merges"))
    tokenizer = _build(
        BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False, ignore_merges=split in _IGNORES_MERGES),
        merges,
        vocab,
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (_GPT2, _DIGITS_GPT2))
    if split == _GPT2:
        tokenizer.pre_tokenizer = byte_level
    else:
        cut = pre_tokenizers.Digits(individual_digits=True)
        if split != _DIGITS_GPT2:
            cut = pre_tokenizers.Split(Regex(split), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    if split in _NORMALISED_NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
