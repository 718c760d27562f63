"""The drafter inside a DeepSeek-V4 checkpoint: against torch, its window, its bits, and through the engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import artifacts
import deepseek_v4_drafter
import numpy as np
import pytest
import tiny_llama
import torch
from deepseek_v4_drafter import BLOCK, TAPS, WINDOW
from drafters import bind_intermediates, context_rows, draft_batch
from engines import ids
from safetensors.numpy import load_file, save_file
from speculation import SpeculatingDriver

from dspark_backend.stages.artifact import STAGE_FILE, load_drafter_artifact
from dspark_backend.stages.draft_batch import ContextRows, DraftOutput
from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter
from dspark_export.commands.plan import show_drafter_plan
from dspark_export.drafter import DrafterExport, export_drafter
from dspark_export.errors import ExportError

TOLERANCE = 1e-4
OTHER = np.random.default_rng(7).standard_normal((97, 32), dtype=np.float32)
"""The embedding of another target."""
FEATURES = np.random.default_rng(6).standard_normal((90, 96), dtype=np.float32)


POLICIES = ("off", "fixed:64", "fixed:2", "causal", "lagged")
PROMPTS = (tiny_llama.tokens(40), tiny_llama.tokens(9)[2:])


class Pair:
    """A checkpoint, both of its exports, the drafter in torch, and the target's greedy answers to the prompts."""

    def __init__(self, folder: Path) -> None:
        self.target, self.reference = deepseek_v4_drafter.make(folder, self._answer)
        self.checkpoint = folder / "model"
        self.verifier = artifacts.export(self.checkpoint, folder / "verifier", check=False)
        self.drafter = folder / "drafter"
        options = DrafterExport(self.checkpoint, self.verifier, self.drafter)
        self.artifact = export_drafter(options, artifacts.silent, expose_intermediates=True)
        self.stage = OnnxRuntimeDrafter(self.drafter, self.verifier, 1)

    def _answer(self, target: Any) -> list[list[int]]:
        texts = []
        for prompt in PROMPTS:
            mask = torch.ones(1, len(prompt))
            options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
            texts.append(target.generate(torch.tensor([prompt]), **options)[0].tolist())
        self.answers = [text[len(prompt) :] for text, prompt in zip(texts, PROMPTS, strict=True)]
        return texts


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def driver(pair) -> SpeculatingDriver:
    return SpeculatingDriver(pair.verifier, pair.drafter, prefill_chunk=7, prefill_chunk_busy=7)


def bits(output: DraftOutput, row: int = 0) -> bytes:
    arrays = (output.tokens, output.candidates, output.probabilities, output.confidence_logits)
    return b"".join(array[row].tobytes() for array in arrays)


def drafted(stage: OnnxRuntimeDrafter, features: np.ndarray, start: int, anchor: int = 7) -> DraftOutput:
    """One block alone, behind all rows before ``start``."""
    stage.allocate(1, 128, ())
    context = context_rows(features, 0, start, slot=0)
    return stage.draft(draft_batch(stage.artifact, context, [anchor], [0], [start], top_k=64))


def test_rounds_equal_the_torch_reference(pair):
    """Contexts shorter and longer than the window, committed by prompts, by rounds and not at all."""
    stage = pair.stage
    stage.allocate(2, 128, ())
    inner = bind_intermediates(stage, 1)
    first, starts = 0, (1, 3, 8, 12, 13, 14, 40, 41, 85)
    for start in starts:
        anchor = (31 * start) % 97
        split = max(first, start - 2)
        if split > first:
            stage.commit_context(context_rows(FEATURES, first, split, slot=1))
        rows = context_rows(FEATURES, split, start, slot=1)
        output = stage.draft(draft_batch(stage.artifact, rows, [anchor], [1], [start]))
        expected = pair.reference(torch.from_numpy(FEATURES[:start]), anchor, start)
        for key, values in (inner | {"confidence_logits": output.confidence_logits}).items():
            np.testing.assert_allclose(values[0], getattr(expected, key), rtol=0, atol=TOLERANCE, err_msg=key)
        assert output.tokens[0].tolist() == expected.tokens.tolist()
        first = start
    # Nothing new: the same block once more.
    again = stage.draft(draft_batch(stage.artifact, context_rows(FEATURES, 0, 0, 1), [anchor], [1], [start]))
    assert bits(again) == bits(output)


def test_a_block_sees_its_window_and_no_more(pair):
    stage, start = pair.stage, 60
    before = bits(drafted(stage, FEATURES, start))
    hidden = FEATURES.copy()
    hidden[: start - WINDOW] += 1.0
    hidden[start:] += 1.0
    assert bits(drafted(stage, hidden, start)) == before
    for row in (start - WINDOW, start - 1):
        seen = FEATURES.copy()
        seen[row] += 1.0
        assert bits(drafted(stage, seen, start)) != before, row


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_company(pair, threads):
    """Nor on slots, capacities, the order of rows, how context came in, and what stood there before."""
    stage = pair.stage if threads == 1 else OnnxRuntimeDrafter(pair.drafter, pair.verifier, threads)
    random = np.random.default_rng(8)
    starts = (2, 11, 37, 70)
    expected = [bits(drafted(pair.stage, FEATURES, start, anchor=start)) for start in starts]
    for _ in range(6):
        stage.allocate(7, int(random.choice([128, 256])), ())
        slots = random.permutation(7)[: len(starts)]
        for slot in slots:
            noise = random.standard_normal((90, 96), dtype=np.float32)
            stage.commit_context(context_rows(noise, 0, 90, int(slot)))
        pieces = []
        for start, slot in zip(starts, slots, strict=True):
            done = int(random.integers(1, start))
            stage.commit_context(context_rows(FEATURES, 0, done, int(slot)))
            pieces.append(context_rows(FEATURES, done, start, int(slot)))
        order = random.permutation(sum(piece.num_rows for piece in pieces))
        joined = [
            np.concatenate([getattr(piece, key) for piece in pieces])[order]
            for key in ("features", "positions", "slots")
        ]
        batch = draft_batch(stage.artifact, ContextRows(*joined), list(starts), slots.tolist(), list(starts), top_k=64)
        for _ in range(2):
            output = stage.draft(batch)
            assert [bits(output, row) for row in range(len(starts))] == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_text_is_the_targets_own(pair, driver, policy):
    driver.records.clear()
    sinks = driver.run(*(ids(*prompt, max_tokens=30, draft_policy=policy) for prompt in PROMPTS))
    assert [sink.tokens() for sink in sinks] == pair.answers
    accepted = sum(record.accepted for record in driver.records)
    verified = sum(record.verified for record in driver.records)
    if policy.startswith("fixed"):
        assert 0 < accepted < verified


def test_sampled_text_and_log_probs(driver):
    """A seed pins the text; what is said of greedy tokens is the same bits with drafts and without."""
    seeded = ids(*PROMPTS[0], max_tokens=20, temperature=0.8, seed=5, draft_policy="fixed:3")
    first, other = (sink.tokens() for sink in driver.run(seeded, ids(*PROMPTS[1], max_tokens=15)))
    assert driver.run(seeded)[0].tokens() == first and len(other) == 15
    asked = [ids(*PROMPTS[0], max_tokens=12, log_probs=True, draft_policy=policy) for policy in ("off", "fixed:64")]
    plain, drafted = driver.run(*asked)
    assert plain.log_probs() == drafted.log_probs()


def test_the_artifact_says_what_was_exported(pair):
    artifact = load_drafter_artifact(pair.drafter)
    assert artifact.block_size == BLOCK and artifact.target_layer_ids == TAPS and artifact.num_layers == 3
    assert artifact.markov_head == "vanilla" and artifact.has_confidence
    # Half a latent among the keys, half among the values.
    assert artifact.cache_shapes == ((1, 8),) * 3
    assert artifact.cache_bytes_per_token == 3 * 16 * 4


def test_smaller_storage(pair, tmp_path):
    export_drafter(DrafterExport(pair.checkpoint, pair.verifier, tmp_path / "d", "bfloat16"), artifacts.silent)
    other = drafted(OnnxRuntimeDrafter(tmp_path / "d", pair.verifier, 1), FEATURES, 30).confidence_logits[0, 0]
    assert 0 < abs(other - drafted(pair.stage, FEATURES, 30).confidence_logits[0, 0]) < 0.2


def changed(pair: Pair, out: Path, config: dict | None = None, tensors: dict | None = None) -> Path:
    shutil.copytree(pair.checkpoint, out)
    settings = json.loads((out / "config.json").read_text()) | (config or {})
    (out / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))
    stored = load_file(out / "model.safetensors") | (tensors or {})
    save_file({name: array for name, array in stored.items() if array is not None}, out / "model.safetensors")
    return out


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({}, {"mtp.2.markov_head.markov_w2.weight": None}, r"the tensor mtp\.2\.markov_head\.markov_w2\.weight"),
        ({}, {"mtp.1.ffn.experts.2.w3.weight": None}, r"expected the tensor mtp\.1\.ffn\.experts\.2\.w3\.weight"),
        ({}, {"mtp.2.hc_head_fn": None}, r"expected the tensor mtp\.2\.hc_head_fn"),
        ({}, {"mtp.0.main_proj.weight": zeros(32, 64)}, r"main_proj\.weight of shape \(32, 96\), got \(32, 64\)"),
        ({}, {"mtp.3.norm.weight": zeros(32)}, r"expected the stages mtp\.0 to mtp\.2, got \[0, 1, 2, 3\]"),
        ({"n_mtp_layers": 2}, {}, r"expected the stages mtp\.0 to mtp\.1, got \[0, 1, 2\]"),
        ({"dspark_markov_rank": 8}, {}, r"markov_w1\.weight of shape \(97, 8\), got \(97, 97\)"),
        ({"dspark_markov_rank": ...}, {}, "expected the key 'dspark_markov_rank'"),
        ({"dspark_block_size": 0}, {}, "dspark_block_size: expected 1 to 64, got 0"),
        ({"dspark_n_routed_experts": 4}, {}, r"dspark_n_routed_experts: expected none; .*DeepSeek-V4\.1"),
        ({"dspark_target_layer_ids": [3, 4, 5]}, {}, r"expected layers from 0 to 4, got \[3, 4, 5\]; .*another target"),
        ({"dspark_target_layer_ids": [1, 2, 3]}, {}, r"target_layer_ids \[1, 2, 3\], the verifier \[2, 3, 4\]"),
        ({"dspark_noise_token_id": 97}, {}, "expected a token below 97, got 97; the drafter is of another target"),
        ({}, {"embed.weight": OTHER}, "drafter c does not fit verifier model: .*median cosine"),
        ({}, {"mtp.1.attn.wq_a.scale": zeros(1, 1)}, r"mtp\.1\.attn\.wq_a\.weight in float32, .*dequantise the"),
        ({}, {"mtp.0.ffn.experts.1.w2.weight": zeros(32, 12)}, r"experts\.1\.w2\.weight in float32, .*FP4"),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, "quantised with fp8; dequantise it to bfloat16 first"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(pair, tmp_path, config, tensors, message):
    checkpoint = changed(pair, tmp_path / "c", config, tensors)
    with pytest.raises(ExportError, match=message):
        export_drafter(DrafterExport(checkpoint, pair.verifier, tmp_path / "out"), artifacts.silent)
    assert not (tmp_path / "out" / STAGE_FILE).exists()


@pytest.mark.parametrize(("runtime", "dtype"), [("onnxruntime", "int8"), ("tensorrt", "float16")])
def test_other_graphs_are_refused(pair, tmp_path, runtime, dtype):
    verifier = artifacts.variant(pair.verifier, tmp_path / "v", runtime=runtime)
    with pytest.raises(ExportError, match=f"deepseek_v4: expected --runtime onnxruntime .*got {runtime} and {dtype}"):
        export_drafter(DrafterExport(pair.checkpoint, verifier, tmp_path / "o", dtype, runtime), artifacts.silent)
    assert not (tmp_path / "o").exists()


def test_plans_are_refused(pair):
    with pytest.raises(ExportError, match="model_type deepseek_v4: its sizes are not planned"):
        show_drafter_plan(pair.checkpoint, pair.verifier, "float32")
