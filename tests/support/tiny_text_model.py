"""The golden target with a tokenizer: every token below 256 is a byte, so that it writes (odd) text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import artifacts
import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers.models import BPE

END = "<\uff5cend\uff5c>"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def write_text_model(folder: Path, name: str = "qwen3_rnn") -> Path:
    """A Hugging Face folder: a golden target, a byte-level tokenizer.json, a chat template."""
    shutil.copytree(artifacts.GOLDEN / name / "target", folder)
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "chat_template": TEMPLATE}))
    return folder
