"""What a step is made of: packed dialogues against single ones, targets by hand, optimisers, and rounds of shards."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from artifacts import GOLDEN, golden_arrays
from drafters import golden_torch_drafter
from safetensors.numpy import load_file
from training import learned_differences, never, state_of, tiny_target, train

from dspark_backend.stages.artifact import load_verifier_artifact
from dspark_export.errors import ExportError
from dspark_export.torch_drafter import load_torch_drafter
from dspark_export.training.batch import Example, block_targets, draft_index, pack
from dspark_export.training.beginning import scale_of
from dspark_export.training.corpus_run import OpenCorpus
from dspark_export.training.curves import HELD_OUT_FILE, read_rows
from dspark_export.training.export import feature_columns, released_state, write_checkpoint_folder
from dspark_export.training.losses import OUTSIDE, LossWeights, block_losses, position_weights
from dspark_export.training.record import TargetRecord, top_of
from dspark_export.training.shard import Dialogue


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny_target(tmp_path_factory.mktemp("step"))


@pytest.fixture(autouse=True)
def one_torch_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def examples(name="qwen3_rnn"):
    """Three dialogues out of a golden text, with the features and logits of the reference."""
    golden = golden_arrays(name)
    tokens = np.concatenate([golden["prompt"], golden["greedy"]]).astype(np.int32)
    features, logits = torch.from_numpy(golden["target_features"]), torch.from_numpy(golden["target_logits"])
    found = []
    for length, prompt in ((81, 21), (60, 30), (33, 25)):
        ids, probabilities, rest = top_of(logits[prompt - 1 : length - 1])
        record = TargetRecord(features[: length - 1].bfloat16(), ids, probabilities, rest)
        found.append(Example(Dialogue(tokens[:length], prompt, False, length, "own"), record))
    return found


def test_targets_by_hand():
    record = TargetRecord(
        torch.zeros(4, 2, dtype=torch.bfloat16),
        torch.tensor([[7, 3], [1, 7], [3, 1]], dtype=torch.int32),
        torch.tensor([[0.5, 0.25], [0.75, 0.125], [0.5, 0.5]], dtype=torch.float16),
        torch.zeros(3),
    )
    example = Example(Dialogue(np.array([9, 9, 7, 1, 3], dtype=np.int32), 2, False, 0, "own"), record)
    index = torch.full((10,), OUTSIDE)
    index[torch.tensor([1, 3])] = torch.arange(2)  # 7 cannot be proposed
    # The anchor is the answer's first token, 7: slot 0 predicts 1, slot 1 predicts 3, behind them is nothing.
    found = block_targets(example, torch.tensor([2]), index, torch.tensor([1.0, 0.5, 0.25]))
    assert found.labels[0, :2].tolist() == [0, 1] and found.weights.tolist() == [[1.0, 0.5, 0.0]]
    assert found.ids[0, :2].tolist() == [[0, 0], [1, 0]]
    assert found.probabilities[0, :2].tolist() == [[0.75, 0.0], [0.5, 0.5]]


def test_a_packed_step_has_the_gradients_of_single_ones():
    drafter, weights = golden_torch_drafter("qwen3_rnn").train(), position_weights(7, 4.0)
    index, texts = draft_index(drafter), examples()
    anchors = [torch.tensor([21, 40, 78]), torch.tensor([30, 31]), torch.tensor([26, 30, 31])]

    def gradients(groups):
        drafter.zero_grad()
        for members in groups:
            step = pack([texts[i] for i in members], [anchors[i] for i in members], index, weights, None)
            output = drafter.forward_blocks(step.features.float(), step.anchors, step.tokens, step.lengths)
            block_losses(output.draft_logits, output.confidence_logits, step.targets, LossWeights()).total.backward()
        return {name: parameter.grad.clone() for name, parameter in drafter.named_parameters()}

    packed, single = gradients([[0, 1, 2]]), gradients([[0], [1], [2]])
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, single[name], rtol=1e-3, atol=1e-4, msg=name)
    assert packed["fc.weight"].abs().sum() > 0


def test_features_are_scaled_to_one_and_the_written_checkpoint_contains_it(tmp_path):
    texts = examples()
    scale = scale_of(texts, None)
    answers = torch.cat([text.record.features[text.dialogue.prompt_length :] for text in texts]).float()
    torch.testing.assert_close((answers * scale).square().mean(dim=0), torch.ones(len(scale)), rtol=1e-4, atol=1e-4)
    drafter = golden_torch_drafter("qwen3_rnn")
    drafter.feature_scale.copy_(scale)
    config = json.loads((GOLDEN / "qwen3_rnn" / "drafter" / "config.json").read_text())
    write_checkpoint_folder(tmp_path, config, released_state(drafter), "float32")
    plain = load_torch_drafter(tmp_path, drafter.embedding, drafter.lm_head)
    tokens, anchors = torch.from_numpy(texts[0].dialogue.tokens.astype(np.int64)), torch.tensor([30, 50])
    features = texts[0].record.features.float()
    with torch.no_grad():
        expected = drafter.forward_blocks(features, anchors, tokens).draft_logits
        torch.testing.assert_close(plain.forward_blocks(features, anchors, tokens).draft_logits, expected)


def test_muon_resumes_to_the_last_bit_and_is_another_optimiser(target, tmp_path):
    train(target.settings(tmp_path / "a", optimiser="muon"), steps=4)
    train(target.settings(tmp_path / "b", optimiser="muon"), steps=2)
    train(target.settings(tmp_path / "b", optimiser="muon"), steps=4, resume=True)
    assert learned_differences(state_of(tmp_path / "a"), state_of(tmp_path / "b")) == []
    state = state_of(tmp_path / "a")
    assert list(state.optimisers) == ["0", "1"]
    assert all("momentum_buffer" in value for value in state.optimisers["0"]["state"].values())
    train(target.settings(tmp_path / "c"), steps=4)
    assert learned_differences(state, state_of(tmp_path / "c"))


def test_without_a_cache_a_run_is_the_same_to_the_last_bit(target, tmp_path):
    train(target.settings(tmp_path / "a"), steps=3)
    train(target.settings(tmp_path / "b", feature_cache=False), steps=3)
    assert not list((tmp_path / "b" / "corpus").glob("*.safetensors"))
    assert learned_differences(state_of(tmp_path / "a"), state_of(tmp_path / "b")) == []


def test_a_drafter_may_read_some_of_the_verifiers_layers(target, tmp_path):
    artifact = load_verifier_artifact(target.verifier)
    given, size = artifact.target_layer_ids, artifact.hidden_size
    settings = target.settings(tmp_path, target_layer_ids=(given[-1],))
    assert feature_columns(artifact, settings).tolist() == list(range((len(given) - 1) * size, len(given) * size))
    train(settings, steps=1)
    assert load_file(tmp_path / "model.safetensors")["fc.weight"].shape == (size, size)
    assert state_of(tmp_path).config["target_layer_ids"] == [given[-1]]
    with pytest.raises(ExportError, match="--target-layer-ids: expected layers that the verifier was exported with"):
        train(target.settings(tmp_path / "x", target_layer_ids=(17,)), steps=1)


def test_a_longer_budget_of_wsd_continues_as_if_it_had_been_there(target, tmp_path):
    changes = {"schedule": "wsd", "decay_share": 0.25}
    train(target.settings(tmp_path / "a", **changes), steps=4)
    train(target.settings(tmp_path / "b", tokens=50_000, **changes), steps=2)
    train(target.settings(tmp_path / "b", **changes), steps=4, resume=True)
    assert learned_differences(state_of(tmp_path / "a"), state_of(tmp_path / "b")) == []


def test_rounds_use_what_another_process_has_written(target, tmp_path):
    """While it writes nothing new, old text is trained on; resumed, the same of it."""
    settings = target.settings(tmp_path / "a", corpus=tmp_path / "corpus", passes=1)
    other = OpenCorpus.at(tmp_path / "corpus", load_verifier_artifact(target.verifier), settings.text)
    assert other.corpus.may_write()
    for index in range(2):
        other.corpus.shard(index, never, lambda what, done: None)
    # 16 dialogues, 4 a step.
    train(settings, steps=6)
    state = state_of(tmp_path / "a").position
    assert (state.round, state.offset, state.shards, state.fresh) == (1, 8, 1, 0)
    again = target.settings(tmp_path / "b", corpus=tmp_path / "corpus", passes=1)
    train(again, steps=5)
    train(again, steps=6, resume=True)
    assert learned_differences(state_of(tmp_path / "a"), state_of(tmp_path / "b")) == []
    other.corpus.shard(2, never, lambda what, done: None)
    train(settings, steps=9, resume=True)
    state = state_of(tmp_path / "a").position
    assert (state.round, state.offset, state.shards, state.fresh) == (2, 4, 2, 1)
    other.close()
    # Nobody writes any more: it makes its own.
    train(settings, steps=13, resume=True)
    assert state_of(tmp_path / "a").position.shards == 3


def test_the_curve_tells_domains_apart(target, tmp_path):
    train(target.settings(tmp_path), steps=1)
    row = read_rows(tmp_path / HELD_OUT_FILE)[-1]
    assert float(row["accepted_own"]) == pytest.approx(float(row["accepted_length"]))
