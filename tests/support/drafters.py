"""Drafters for tests: golden rounds, exported golden drafters, variants of them, and one for a Llama target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from artifacts import GOLDEN, export, golden_arrays, silent
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dspark_backend.stages.artifact import DrafterArtifact
from dspark_backend.stages.draft_batch import ContextRows, DraftBatch
from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter
from dspark_export.drafter import DrafterExport, export_drafter
from dspark_export.drafter_spec import describe_drafter
from dspark_export.torch_drafter import TorchDrafter, load_torch_drafter


@dataclass(frozen=True)
class GoldenRound:
    """One scripted round: what is committed, and what the reference said."""

    index: int
    first: int
    """Context rows first .. start-1 are new in this round."""
    start: int
    anchor: int
    hidden: np.ndarray
    base_logits: np.ndarray
    draft_logits: np.ndarray
    draft_tokens: np.ndarray
    confidence_logits: np.ndarray


def golden_rounds(name: str) -> Iterator[GoldenRound]:
    golden = golden_arrays(name)
    text = np.concatenate([golden["prompt"], golden["greedy"]])
    first, start = 0, len(golden["prompt"])
    for index, accepted in enumerate(golden["round_accepted"].tolist()):
        outputs = ("hidden", "base_logits", "draft_logits", "draft_tokens", "confidence_logits")
        yield GoldenRound(
            index, first, start, int(text[start]), **{key: golden[f"round_{key}"][index] for key in outputs}
        )
        first, start = start, start + accepted + 1


def golden_torch_drafter(name: str) -> TorchDrafter:
    target = load_file(GOLDEN / name / "target" / "model.safetensors")
    embedding = torch.from_numpy(target["model.embed_tokens.weight"])
    head = torch.from_numpy(target.get("lm_head.weight", target["model.embed_tokens.weight"]))
    return load_torch_drafter(GOLDEN / name / "drafter", embedding, head).eval()


def export_golden_drafter(
    name: str, verifier: Path, out: Path, checkpoint: Path | None = None, dtype: str = "float32"
) -> DrafterArtifact:
    """Export with the inner values exposed."""
    options = DrafterExport(checkpoint or GOLDEN / name / "drafter", verifier, out, dtype)
    return export_drafter(options, silent, expose_intermediates=True)


def changed_checkpoint(
    source: Path, out: Path, config: dict[str, Any] | None = None, tensors: dict[str, np.ndarray | None] | None = None
) -> Path:
    """A copy of a checkpoint with other config keys and tensors; None removes one."""
    shutil.copytree(source, out)
    settings = json.loads((out / "config.json").read_text()) | (config or {})
    (out / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    stored = load_file(out / "model.safetensors") | (tensors or {})
    save_file({key: value for key, value in stored.items() if value is not None}, out / "model.safetensors")
    return out


def reduced_checkpoint(name: str, out: Path, kept: np.ndarray) -> Path:
    """A golden drafter that can propose only the tokens ``kept``, in that order."""
    source = GOLDEN / name / "drafter"
    second = load_file(source / "model.safetensors")["markov_head.markov_w2.weight"]
    return changed_checkpoint(
        source,
        out,
        {"draft_vocab_size": len(kept)},
        {"markov_head.markov_w2.weight": np.ascontiguousarray(second[kept]), "d2t": kept.astype(np.int64)},
    )


@dataclass(frozen=True)
class LlamaPair:
    """A random Llama target, exported, and a random drafter for it without q/k norms."""

    verifier: Path
    checkpoint: Path
    drafter: TorchDrafter


def llama_pair(root: Path, head: str = "rnn") -> LlamaPair:
    """Grouped heads, stretched RoPE, tied embedding, a confidence head that does not see the token before."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    target = LlamaForCausalLM(config)
    target.save_pretrained(root / "target")
    verifier = export(root / "target", root / "verifier", target_layer_ids=(0, 2))
    settings = json.loads((root / "target" / "config.json").read_text()) | {
        "architectures": ["LlamaDSparkModel"],
        "num_hidden_layers": 2,
        "block_size": 4,
        "target_layer_ids": [0, 2],
        "mask_token_id": 210,
        "markov_rank": 16,
        "markov_head_type": head,
        "enable_confidence_head": True,
        "confidence_head_with_markov": False,
    }
    embedding = target.model.embed_tokens.weight.detach()
    drafter = TorchDrafter(describe_drafter(settings), embedding, embedding).eval()
    with torch.no_grad():
        for parameter in drafter.parameters():
            # Norm weights start at 1; all others become large enough to matter.
            parameter.add_(torch.randn_like(parameter) * 0.2)
    checkpoint = root / "drafter"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(settings))
    save_file({name: value.numpy() for name, value in drafter.state_dict().items()}, checkpoint / "model.safetensors")
    return LlamaPair(verifier, checkpoint, drafter)


def draft_batch(
    artifact: DrafterArtifact,
    context: ContextRows,
    anchors: list[int],
    slots: list[int],
    starts: list[int],
    *,
    uniforms: np.ndarray | None = None,
    temperature: float = 1.0,
    top_k: int = 1,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> DraftBatch:
    """A batch whose requests share their sampling parameters; greedy unless told."""
    count = len(anchors)
    if uniforms is None:
        uniforms = np.full((count, artifact.block_size), 0.5, dtype=np.float32)
    return DraftBatch(
        context=context,
        anchors=np.array(anchors, dtype=np.int64),
        slots=np.array(slots, dtype=np.int64),
        starts=np.array(starts, dtype=np.int64),
        uniforms=np.ascontiguousarray(uniforms, dtype=np.float32),
        temperature=np.full(count, temperature, dtype=np.float32),
        top_k=np.full(count, top_k, dtype=np.int64),
        top_p=np.full(count, top_p, dtype=np.float32),
        min_p=np.full(count, min_p, dtype=np.float32),
    )


def context_rows(features: np.ndarray, first: int, end: int, slot: int) -> ContextRows:
    """Rows first .. end-1 of a text's features, for one slot."""
    return ContextRows(
        np.ascontiguousarray(features[first:end]), np.arange(first, end), np.full(end - first, slot, dtype=np.int64)
    )


def bind_intermediates(stage: OnnxRuntimeDrafter, count: int) -> dict[str, np.ndarray]:
    """Arrays that every later round fills, of ``count`` requests: hidden, base_logits, draft_logits."""
    artifact = stage.artifact
    widths = {
        "hidden": artifact.hidden_size,
        "base_logits": artifact.draft_vocab_size,
        "draft_logits": artifact.draft_vocab_size,
    }
    return {key: stage._draft.output(key, (count, artifact.block_size, width)) for key, width in widths.items()}
