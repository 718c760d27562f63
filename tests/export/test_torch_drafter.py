"""The torch drafter against the reference's numbers, and its two ways through a text against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from artifacts import GOLDEN, GOLDEN_NAMES, golden_arrays
from drafters import changed_checkpoint, golden_rounds, golden_torch_drafter, llama_pair, reduced_checkpoint
from safetensors.numpy import load_file

from dspark_export.errors import ExportError
from dspark_export.torch_drafter import CERTAIN, TorchDrafter, load_torch_drafter

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def one_torch_thread():
    """On a busy machine torch's threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shared(name):
    target = load_file(GOLDEN / name / "target" / "model.safetensors")
    head = target.get("lm_head.weight", target["model.embed_tokens.weight"])
    return torch.from_numpy(target["model.embed_tokens.weight"]), torch.from_numpy(head)


def text_of(name):
    golden = golden_arrays(name)
    tokens = np.concatenate([golden["prompt"], golden["greedy"]])
    return torch.from_numpy(golden["target_features"]), torch.from_numpy(tokens)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@torch.no_grad()
def test_every_golden_round(name):
    drafter = golden_torch_drafter(name)
    features, _ = text_of(name)
    count = 0
    for round_ in golden_rounds(name):
        output = drafter(features[: round_.start], torch.arange(round_.start), round_.anchor, round_.start)
        for key in ("hidden", "base_logits", "draft_logits", "confidence_logits"):
            got, expected = getattr(output, key)[0].numpy(), getattr(round_, key)
            np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE, err_msg=f"{key}, round {round_.index}")
        assert output.tokens[0].tolist() == round_.draft_tokens.tolist()
        assert output.previous[0].tolist() == [round_.anchor, *round_.draft_tokens.tolist()[:-1]]
        count += 1
    assert count == 9


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_parameters_are_those_of_the_released_layout(name):
    stored = load_file(GOLDEN / name / "drafter" / "model.safetensors")
    state = golden_torch_drafter(name).state_dict()
    assert set(state) == set(stored) - {"embed_tokens.weight", "lm_head.weight"}
    assert all(np.array_equal(state[key].numpy(), stored[key]) for key in state)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@torch.no_grad()
def test_many_blocks_in_one_pass_equal_one_at_a_time(name):
    drafter = golden_torch_drafter(name)
    features, tokens = text_of(name)
    block = drafter.spec.block_size
    anchors = torch.tensor([0, 1, 5, 21, 22, 40, len(tokens) - block])
    many = drafter.forward_blocks(features, anchors, tokens)
    for row, anchor in enumerate(anchors.tolist()):
        one = drafter(features[:anchor], torch.arange(anchor), int(tokens[anchor]), anchor)
        for key in ("hidden", "base_logits"):
            torch.testing.assert_close(getattr(many, key)[row], getattr(one, key)[0], rtol=0, atol=1e-5)
        assert many.previous[row].tolist() == tokens[anchor : anchor + block].tolist()
        # The first slot's previous token is the anchor either way; later ones differ unless drafts equal the text.
        torch.testing.assert_close(many.draft_logits[row, 0], one.draft_logits[0, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(many.confidence_logits[row, 0], one.confidence_logits[0, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@torch.no_grad()
def test_teacher_forcing_with_the_drafts_themselves_gives_the_draft_logits(name):
    """Behind an anchor the text plays no part but as previous tokens, so a text made of drafts is a drafted round."""
    drafter = golden_torch_drafter(name)
    features, tokens = text_of(name)
    for round_ in golden_rounds(name):
        block = drafter.spec.block_size
        forced = tokens.clone()
        end = min(round_.start + block, len(tokens))
        forced[round_.start + 1 : end] = torch.from_numpy(round_.draft_tokens)[: end - round_.start - 1]
        output = drafter.forward_blocks(features, torch.tensor([round_.start]), forced)
        slots = end - round_.start
        np.testing.assert_allclose(
            output.draft_logits[0, :slots].numpy(), round_.draft_logits[:slots], rtol=0, atol=TOLERANCE
        )
        np.testing.assert_allclose(
            output.confidence_logits[0, :slots].numpy(), round_.confidence_logits[:slots], rtol=0, atol=TOLERANCE
        )


@torch.no_grad()
def test_blocks_do_not_see_the_anchors_feature_nor_anything_behind():
    drafter = golden_torch_drafter("qwen3_gated")
    features, tokens = text_of("qwen3_gated")
    anchors = torch.tensor([10, 30])
    before = drafter.forward_blocks(features, anchors, tokens).hidden
    other = features.clone()
    other[30:] += 1.0
    unchanged = drafter.forward_blocks(other, anchors, tokens).hidden
    assert torch.equal(unchanged, before)
    other[29] += 1.0
    changed = drafter.forward_blocks(other, anchors, tokens).hidden
    assert torch.equal(changed[0], before[0])
    # The block is bidirectional: even its first slot changes, and all of them do.
    assert ((changed[1] - before[1]).abs().amax(dim=1) > 1e-3).all()


@torch.no_grad()
def test_packed_texts_equal_separate_ones():
    drafter = golden_torch_drafter("qwen3_rnn")
    features, tokens = text_of("qwen3_rnn")
    pieces = (slice(0, 30), slice(30, 47), slice(47, 81))
    anchors = [torch.tensor([3, 27]), torch.tensor([0, 9]), torch.tensor([20, 33])]
    packed = drafter.forward_blocks(
        features,
        torch.cat([piece.start + anchor for piece, anchor in zip(pieces, anchors, strict=True)]),
        tokens,
        [30, 17, 34],
    )
    alone = [drafter.forward_blocks(features[p], a, tokens[p]) for p, a in zip(pieces, anchors, strict=True)]
    for key in ("hidden", "draft_logits", "confidence_logits"):
        expected = torch.cat([getattr(output, key) for output in alone])
        torch.testing.assert_close(getattr(packed, key), expected, rtol=0, atol=1e-5)
    assert torch.equal(packed.previous, torch.cat([output.previous for output in alone]))


@torch.no_grad()
def test_slots_behind_the_end_are_finite_and_leave_the_others_alone():
    drafter = golden_torch_drafter("qwen3_rnn")
    features, tokens = text_of("qwen3_rnn")
    anchor = torch.tensor([len(tokens) - 2])
    short = drafter.forward_blocks(features, anchor, tokens)
    extended = torch.cat([tokens, torch.zeros(10, dtype=torch.int64)])
    whole = drafter.forward_blocks(features, anchor, extended)
    assert torch.isfinite(short.draft_logits).all()
    assert torch.equal(short.draft_logits[:, :2], whole.draft_logits[:, :2])
    assert short.previous[0].tolist() == tokens[-2:].tolist() + [int(tokens[-1])] * 5


def test_gradients_reach_every_parameter_and_nothing_else():
    drafter = golden_torch_drafter("qwen3_rnn").train()
    features, tokens = text_of("qwen3_rnn")
    output = drafter.forward_blocks(features, torch.tensor([4, 20, 50]), tokens)
    (output.draft_logits.logsumexp(-1).sum() + output.confidence_logits.sum()).backward()
    for name, parameter in drafter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert not drafter.embedding.requires_grad and not drafter.lm_head.requires_grad


def test_training_lowers_a_loss():
    torch.manual_seed(0)
    drafter = golden_torch_drafter("qwen3_vanilla").train()
    features, tokens = text_of("qwen3_vanilla")
    anchors, block = torch.arange(10, 70, 3), drafter.spec.block_size
    labels = tokens[anchors[:, None] + 1 + torch.arange(block)]
    optimiser = torch.optim.Adam(drafter.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        logits = drafter.forward_blocks(features, anchors, tokens).draft_logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.25 * losses[0]


@torch.no_grad()
def test_a_reduced_vocabulary_scores_its_tokens_as_the_whole_one_does(tmp_path):
    kept = np.random.default_rng(1).permutation(320)[:90]
    whole = golden_torch_drafter("qwen3_gated")
    reduced = load_torch_drafter(reduced_checkpoint("qwen3_gated", tmp_path / "d", kept), *shared("qwen3_gated"))
    assert "d2t" in reduced.state_dict()
    features, tokens = text_of("qwen3_gated")
    anchors = torch.tensor([7, 30])
    expected = whole.forward_blocks(features, anchors, tokens)
    output = reduced.forward_blocks(features, anchors, tokens)
    torch.testing.assert_close(output.base_logits, expected.base_logits[..., kept], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.draft_logits, expected.draft_logits[..., kept], rtol=0, atol=1e-5)
    best = expected.draft_logits[..., kept].argmax(-1)
    assert torch.equal(output.tokens, torch.from_numpy(kept)[best])
    drafted = reduced(features[:30], torch.arange(30), int(tokens[30]), 30)
    assert set(drafted.tokens.flatten().tolist()) <= set(kept.tolist())


@torch.no_grad()
def test_without_a_confidence_head_every_draft_is_certain(tmp_path):
    source = GOLDEN / "qwen3_gated" / "drafter"
    gone = {"confidence_head.proj.weight": None, "confidence_head.proj.bias": None}
    checkpoint = changed_checkpoint(source, tmp_path / "d", {"enable_confidence_head": False}, gone)
    drafter = load_torch_drafter(checkpoint, *shared("qwen3_gated"))
    features, tokens = text_of("qwen3_gated")
    output = drafter.forward_blocks(features, torch.tensor([7]), tokens)
    assert (output.confidence_logits == CERTAIN).all()


def test_a_llama_drafter_has_no_head_norms(tmp_path):
    drafter = llama_pair(tmp_path).drafter
    assert not [name for name in drafter.state_dict() if "q_norm" in name or "k_norm" in name]


def test_wrong_tensors_are_named(tmp_path):
    source = GOLDEN / "qwen3_gated" / "drafter"
    embedding, head = shared("qwen3_gated")
    wrong = changed_checkpoint(source, tmp_path / "w", tensors={"fc.weight": np.zeros((64, 127), np.float32)})
    with pytest.raises(ExportError, match=r"fc\.weight of shape \(64, 128\), got \(64, 127\)"):
        load_torch_drafter(wrong, embedding, head)
    missing = changed_checkpoint(source, tmp_path / "m", tensors={"markov_head.gate_proj.bias": None})
    with pytest.raises(ExportError, match=r"markov_head\.gate_proj\.bias"):
        load_torch_drafter(missing, embedding, head)
    with pytest.raises(ValueError, match=r"lm_head: expected the target's of shape \(320, 64\)"):
        TorchDrafter(golden_torch_drafter("qwen3_gated").spec, embedding, head[:-1])
