"""The standard dialect, run by ONNX Runtime on the CPU, against the reference's numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from artifacts import golden_arrays
from drafters import golden_rounds, golden_torch_drafter
from standard_graphs import (
    Caches,
    ReferenceSession,
    draft,
    drafter_graphs,
    drafter_tensors,
    open_graph,
    target_of,
    verifier_graph,
    verifier_tensors,
    verify,
)

from dspark_export.torch_drafter import TorchDrafter

TOLERANCE = 1e-4
NAMES = ("qwen3_vanilla", "qwen3_gated", "qwen3_rnn", "gemma4_vanilla")


def tokens_of(name):
    golden = golden_arrays(name)
    return [*golden["prompt"].tolist(), *golden["greedy"].tolist()]


def check_target(name, session, ends):
    """Logits and features of the golden text, in chunks that end at ``ends``."""
    golden, tokens = golden_arrays(name), tokens_of(name)
    _, _, shared = target_of(name)
    caches = Caches(session, slots=3)
    # Row 1 has the golden text, in chunks of several sizes; row 2 another one beside it; row 0 takes no part.
    logits, features, first = [], [], 0
    for end in ends:
        company = (2, first, [(token + 1) % 50 for token in tokens[first : min(end, first + 3)]])
        found = verify(caches, shared, [(1, first, tokens[first:end]), company], view=min(end + 5, 128))
        logits.append(found["logits"][: end - first])
        features.append(found["features"][: end - first])
        assert (found["argmax"] == found["logits"].argmax(axis=1)).all()
        assert (found["top_logit"] == found["logits"].max(axis=1)).all()
        first = end
    np.testing.assert_allclose(np.concatenate(logits), golden["target_logits"][:first], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(np.concatenate(features), golden["target_features"][:first], rtol=0, atol=TOLERANCE)


def check_rounds(name, drafting, through_context, rounds):
    """Golden rounds of a drafter, each against the reference's numbers."""
    _, _, shared = target_of(name)
    features = golden_arrays(name)["target_features"]
    caches = Caches(drafting, slots=2)
    for round_ in rounds:
        first = round_.first
        if round_.start - first > 1:
            # All but the last row come as a prompt's chunks do.
            count = round_.start - 1 - first
            update = np.tile(np.arange(count), (2, 1))
            caches.run(
                {
                    "features": features[first : first + count],
                    "context_positions": np.arange(first, first + count),
                    "update_index": update,
                    "write_starts": np.array([160 - count, first]),
                },
                through_context,
            )
            first += count
        found = draft(caches, shared, features, first, round_.start, round_.anchor, 1, drafter_tensors(name).block_size)
        assert found["tokens"][0].tolist() == round_.draft_tokens.tolist()
        for key in ("hidden", "base_logits", "draft_logits", "confidence_logits"):
            np.testing.assert_allclose(
                found[key][0], getattr(round_, key), rtol=0, atol=TOLERANCE, err_msg=f"{key}, round {round_.index}"
            )


@pytest.mark.parametrize("name", NAMES)
def test_golden_logits_and_features_in_chunks_and_in_company(tmp_path, name):
    check_target(name, open_graph(verifier_graph(name), tmp_path, "v.onnx"), (7, 8, 13, 40, len(tokens_of(name))))


@pytest.mark.parametrize("name", NAMES)
def test_every_golden_round(tmp_path, name):
    drafting, context = drafter_graphs(name)
    rounds = list(golden_rounds(name))
    check_rounds(name, open_graph(drafting, tmp_path, "d.onnx"), open_graph(context, tmp_path, "c.onnx"), rounds)
    assert len(rounds) == 9


def test_layers_with_windows(tmp_path):
    name, whole = "qwen3_vanilla", golden_torch_drafter("qwen3_vanilla")
    attention = whole.spec.decoder.attention
    attentions = (replace(attention, window=5), attention)
    spec = replace(whole.spec, decoder=replace(whole.spec.decoder, attentions=attentions), causal_windows=True)
    module = TorchDrafter(spec, whole.embedding, whole.lm_head)
    module.load_state_dict(whole.state_dict())
    _, _, shared = target_of(name)
    drafting, _ = drafter_graphs(name, spec=spec)
    caches = Caches(open_graph(drafting, tmp_path, "d.onnx"), slots=2)
    features = golden_arrays(name)["target_features"]
    for round_ in list(golden_rounds(name))[:3]:
        found = draft(caches, shared, features, round_.first, round_.start, round_.anchor, 1, spec.block_size)
        with torch.no_grad():
            seen = torch.from_numpy(features[: round_.start])
            expected = module(seen, torch.arange(round_.start), round_.anchor, round_.start)
        for key in ("hidden", "base_logits", "draft_logits", "confidence_logits"):
            np.testing.assert_allclose(found[key], getattr(expected, key), rtol=0, atol=TOLERANCE, err_msg=key)
        assert np.abs(found["hidden"][0] - round_.hidden).max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_onnx_own_reference_says_the_same(name):
    """The numbers hang on the operators' definitions, not on what ONNX Runtime makes of them."""
    check_target(name, ReferenceSession(verifier_graph(name)), (9, 10, 16))
    drafting, context = (ReferenceSession(graph) for graph in drafter_graphs(name))
    check_rounds(name, drafting, context, list(golden_rounds(name))[:2])


FORMS = [
    ("float16", {}),
    ("bfloat16", {}),
    ("bfloat16", {"products": "int4"}),
]


@pytest.mark.parametrize(("dtype", "form"), FORMS)
@pytest.mark.parametrize("name", ["qwen3_rnn", "gemma4_vanilla"])
def test_graphs_have_the_contracts_tensors_and_standard_operators_alone(name, dtype, form):
    drafting, context = drafter_graphs(name, dtype, expose=False, **form)
    tensors = drafter_tensors(name, dtype)
    for model, specs in (
        (verifier_graph(name, dtype, **form), verifier_tensors(name, dtype).specs),
        (drafting, tensors.draft_specs),
        (context, tensors.context_specs),
    ):
        assert set(model.graph.opset_imports) == {""}
        assert {node.domain for node in model.graph} == {""}
        found = {
            value.name: (direction, str(value.dtype).lower(), tuple(getattr(d, "value", d) for d in value.shape))
            for direction, values in (("input", model.graph.inputs), ("output", model.graph.outputs))
            for value in values
        }
        spelt = {"float": "float32"}
        found = {key: (way, spelt.get(kind, kind), shape) for key, (way, kind, shape) in found.items()}
        assert found == {spec.name: (spec.direction, spec.dtype, spec.dims) for spec in specs}
