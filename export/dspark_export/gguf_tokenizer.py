"""tokenizer.json from the metadata of a GGUF file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from dspark_export.errors import ExportError
from dspark_export.tokenizer_info import TokenizerInfo

logger = logging.getLogger(__name__)

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
        raise ExportError(
            f"GGUF: expected one token_type a token ({len(tokens)}), got {len(types)}; the file is broken"
        )
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
    for kind, special in ((TokenType.UNKNOWN, True), (TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        found = [token for token, its_kind in zip(tokens, types, strict=True) if its_kind == kind]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in found])

    info = _info(fields, tokens, types, adds_bos_by_default=model == "llama")
    if info.add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[info.bos_token, "$A"],
            pair=[info.bos_token, "$A", f"{info.bos_token}:1", "$B:1"],
            special_tokens=[(info.bos_token, info.bos_token_id)],
        )
    tokenizer.save(str(out_dir / "tokenizer.json"), pretty=False)
    return info


def _byte_level(fields: _Fields, vocab: dict[str, int]) -> Tokenizer:
    """Byte-level BPE, as GPT-2 and its successors."""
    pre = fields.get("tokenizer.ggml.pre", "default")
    split = _PRE_TOKENIZERS.get(pre)
    if split is None:
        raise ExportError(
            f"GGUF: tokenizer.ggml.pre is {pre!r}, expected one of {', '.join(_PRE_TOKENIZERS)}; {_USE_FOLDER}"
        )
    if pre == "default":
        logger.warning("GGUF: tokenizer.ggml.pre does not say how text is cut; assuming the rule of GPT-2")
    merges = _merges(fields.require("tokenizer.ggml.merges"), vocab)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=split in _IGNORES_MERGES))
    cut: list[Any] = []
    if split == _DIGITS_GPT2:
        cut = [pre_tokenizers.Digits(individual_digits=True)]
    elif split != _GPT2:
        cut = [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    own_regex = split in (_GPT2, _DIGITS_GPT2)
    cut.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_regex))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    if split in _NORMALISED_NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: _Fields, tokens: list[str], types: list[int], vocab: dict[str, int]) -> Tokenizer:
    """SentencePiece BPE: spaces are U+2581, unknown characters fall back to byte tokens."""
    architecture = str(fields.get("general.architecture", ""))
    if architecture.startswith("gemma"):
        raise ExportError(f"GGUF: the scores of {architecture} files do not give the order of merges; {_USE_FOLDER}")
    given = fields.get("tokenizer.ggml.merges")
    if given is not None:
        merges = _merges(given, vocab)
    else:
        scores = fields.require("tokenizer.ggml.scores")
        if len(scores) != len(tokens):
            raise ExportError(
                f"GGUF: expected one score a token ({len(tokens)}), got {len(scores)}; the file is broken"
            )
        ordinary = {token: vocab[token] for token, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
        merges = merges_from_scores(ordinary, scores)
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=TokenType.BYTE in types,
        )
    )
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    steps: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def merges_from_scores(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary implies, first the one with the highest score.

    Args:
        vocab: ordinary tokens and their ids.
        scores: one an id; the score of the token that a merge makes is its priority.
    """
    found = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((-scores[index], index, cut, left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _merges(lines: Sequence[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """``"left right"`` lines as pairs. Checked here: the library aborts on a merge outside the vocabulary."""
    merges = []
    for line in lines:
        at = line.find(" ", 1)
        left, right = line[:at], line[at + 1 :]
        if at < 0 or left not in vocab or right not in vocab or left + right not in vocab:
            raise ExportError(f"GGUF: expected merges of two tokens into a third, got {line!r}; the file is broken")
        merges.append((left, right))
    return merges


def _info(fields: _Fields, tokens: list[str], types: list[int], adds_bos_by_default: bool) -> TokenizerInfo:
    def token_id(name: str) -> int | None:
        value = fields.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and not 0 <= value < len(tokens):
            raise ExportError(
                f"GGUF: tokenizer.ggml.{name}_token_id is {value}, expected 0 to {len(tokens) - 1}; the file is broken"
            )
        return None if value is None else int(value)

    bos, eos = token_id("bos"), token_id("eos")
    template = fields.get("tokenizer.chat_template")
    ends = {token for token in (eos, token_id("eot"), token_id("eom")) if token is not None}
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == TokenType.CONTROL and token in _END_OF_TURN and token in (template or ""):
            ends.add(index)
    add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", adds_bos_by_default))
    if add_bos and bos is None:
        raise ExportError(f"GGUF: the file wants BOS before every prompt but has no bos_token_id; {_USE_FOLDER}")
    return TokenizerInfo(
        bos_token_id=bos,
        eos_token_ids=tuple(sorted(ends)),
        add_bos=add_bos,
        chat_template=template,
        bos_token=None if bos is None else tokens[bos],
        eos_token=None if eos is None else tokens[eos],
    )
