"""Model folders for the engines that do not read GGUF files: python -m peers.prepare GGUF CHECKPOINT_DIR GENAI_DIR."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

NEVER = "<empty_output>"
"""A token that the model does not say: as the end of sequence it ends nothing."""


def write_checkpoint(gguf: Path, folder: Path) -> None:
    """The GGUF file's weights in float32, as transformers reads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # the weights are dequantised, but a model with this entry cannot be saved
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def write_genai(checkpoint: Path, folder: Path) -> None:
    """ONNX Runtime GenAI's int4 model, by its own builder with its defaults for the CPU."""
    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as cache:
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", folder]
        builder += ["-p", "int4", "-e", "cpu", "-c", Path(cache) / "cache", "--extra_options", "hf_token=false"]
        subprocess.run(builder, check=True)
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["eos_token_id"] = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).token_to_id(NEVER)
    # Not the end of a turn, which chat prompts hold: the padding is masked by its id.
    config["model"]["pad_token_id"] = 0
    path.write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    source, target, genai = map(Path, sys.argv[1:])
    write_checkpoint(source, target)
    write_genai(target, genai)
