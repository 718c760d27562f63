"""Text of a run: prompts, shards on disk, no prompt twice, and the target's pass over them."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from artifacts import golden_arrays
from training import never, tiny_target

from dspark_backend.stages.artifact import load_verifier_artifact
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_export.errors import ExportError
from dspark_export.training.corpus import HELD_OUT, Corpus
from dspark_export.training.features import TargetPass
from dspark_export.training.generate import Continuation, Draw, Generator, Stopped
from dspark_export.training.heldout import matches, walk
from dspark_export.training.shard import Dialogue, load_shard, save_shard
from dspark_export.training.statistics import count_tokens
from dspark_export.training.user_turns import UserTurns, prompt_key


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny_target(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def open_corpus(target):
    """A function that opens a corpus over the tiny target; engines end with the test."""
    generators = []

    def opened(folder, **changes):
        settings = target.settings(folder, **changes)
        turns = UserTurns(settings.verifier, load_verifier_artifact(settings.verifier), settings.prompt_tokens)
        generators.append(Generator(settings.verifier, turns.longest + settings.answer_tokens, 8, 1))
        return Corpus(folder / "corpus", turns, generators[-1], settings)

    yield opened
    for generator in generators:
        generator.close()


def quiet(what, done):
    pass


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(a.tokens, b.tokens)
        and (a.prompt_length, a.sampled, a.key) == (b.prompt_length, b.sampled, b.key)
        for a, b in zip(left, right, strict=True)
    )


def test_a_shard_survives_the_disk(tmp_path):
    dialogues = [
        Dialogue(np.array([5, 6, 7, 8], dtype=np.int32), 1, True, 2**64 - 1),
        Dialogue(np.array([9, 1], dtype=np.int32), 1, False, 3),
    ]
    save_shard(tmp_path / "a.npz", dialogues)
    assert same(load_shard(tmp_path / "a.npz"), dialogues)
    assert dialogues[0].answer_length == 3 and dialogues[0].num_anchors == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match=r"a\.npz.*delete it"):
        load_shard(tmp_path / "a.npz")


def test_no_prompt_twice_and_none_of_the_held_out(open_corpus, tmp_path):
    corpus = open_corpus(tmp_path, prompt_tokens=2, shard_size=60, held_out=40, answer_tokens=8)
    shards = [corpus.shard(index, never, quiet) for index in range(3)]
    # A few answers end at once and are left out.
    assert all(wanted - 6 <= len(shard) <= wanted for wanted, shard in zip((40, 60, 60), shards, strict=True))
    keys = [Counter(dialogue.key for dialogue in shard) for shard in shards]
    assert set(keys[0].values()) == {1}, "a held-out prompt is answered once"
    assert max(keys[1].values()) == 2 == max(keys[2].values()), "other prompts twice"
    assert not (keys[0].keys() & keys[1].keys() or keys[0].keys() & keys[2].keys() or keys[1].keys() & keys[2].keys())
    assert not any(dialogue.sampled for dialogue in shards[HELD_OUT])
    for shard in shards[1:]:
        assert 25 <= sum(dialogue.sampled for dialogue in shard) <= 30
        greedy = Counter(dialogue.key for dialogue in shard if not dialogue.sampled)
        assert set(greedy.values()) == {1}


def test_greedy_answers_are_the_targets(open_corpus, tmp_path, target):
    dialogue = open_corpus(tmp_path).shard(HELD_OUT, never, quiet)[0]
    stage = OnnxRuntimeVerifier(target.verifier, 1)
    found = []
    wanted = np.arange(len(dialogue.tokens)) >= dialogue.prompt_length - 1
    TargetPass(stage).logits(dialogue.tokens, wanted, lambda logits: found.extend(logits.argmax(dim=1).tolist()))
    stage.close()
    assert found[:-1] == dialogue.tokens[dialogue.prompt_length :].tolist()


def test_a_lost_shard_comes_back_the_same(open_corpus, tmp_path):
    before = [open_corpus(tmp_path).shard(index, never, quiet) for index in range(3)]
    for number in (1, 2):
        (tmp_path / "corpus" / f"shard-0000{number}.npz").unlink()
    again = open_corpus(tmp_path)
    assert all(same(again.shard(index, never, quiet), before[index]) for index in range(3))
    other = open_corpus(tmp_path / "other", seed=1)
    assert not same(other.shard(1, never, quiet), before[1])


def test_a_stop_leaves_no_half_shard(open_corpus, tmp_path):
    corpus = open_corpus(tmp_path)
    corpus.shard(HELD_OUT, never, quiet)
    reached = []
    with pytest.raises(Stopped):
        corpus.shard(1, lambda: bool(reached) and reached[-1] > 0.5, lambda what, done: reached.append(done))
    assert [path.name for path in (tmp_path / "corpus").iterdir()] == ["shard-00000.npz"]
    # What was cancelled does not disturb what follows.
    assert same(corpus.shard(1, never, quiet), open_corpus(tmp_path / "other").shard(1, never, quiet))


def test_continuations_keep_the_token_that_ended_them(target):
    generator = Generator(target.verifier, 200, 8, 1)
    draws = [Draw((7, 8), 150, 1.0, seed) for seed in range(12)]
    found = generator.draw(draws, never, lambda done: None)
    assert any(one.ended for one in found), "none ended: the test says nothing"
    for one in found:
        assert one.ended == (one.token_ids[-1] == 5) and (one.ended or len(one.token_ids) == 150)
        assert 5 not in one.token_ids[:-1]
    assert generator.draw(draws[:1], never, lambda done: None) == found[:1], "alone as in a batch"
    generator.close()


def test_prompts_of_a_chat_model(text_artifact, tmp_path):
    turns = UserTurns(text_artifact, load_verifier_artifact(text_artifact), 40)
    random = np.random.default_rng(0)
    opening = turns.opening(random)
    assert turns._tokenizer is not None
    assert turns._tokenizer.decode(opening) == "<user>" and turns.opening_tokens(random) == 40

    def written(text, ended=True):
        return turns.from_target(opening, Continuation(tuple(turns._tokenizer.encode(text)), ended))

    prompt = written("  What is a fox? ")
    assert prompt is not None and turns._tokenizer.decode(prompt.token_ids) == "<user>What is a fox?<a>"
    assert prompt.key == prompt_key("what is\n a FOX?") != prompt_key("what is a box?")
    for refused in ("short", "12345678901", "   ", "so long that it does not fit, which is forty tokens here"):
        assert written(refused) is None, refused
    assert written("What is a fox?", ended=False) is None, "a turn that was cut off"

    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "Why is the sky blue?"}, {"prompt": "x" * 100}, {"turns": ["Tell me more.", "And more."]}]
    file.write_text("\n".join(map(json.dumps, lines)))
    decoded = [turns._tokenizer.decode(prompt.token_ids) for prompt in turns.from_file(file)]
    assert decoded == ["<user>Why is the sky blue?<a>", "<user>Tell me more.<a>"]


def test_prompt_files_fill_half_of_a_shard_each_prompt_once(text_artifact, tmp_path, target):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"Question number {number}?" for number in range(9)) + "\nquestion  NUMBER 3?\n")
    settings = target.settings(tmp_path, prompts=(file,), prompt_tokens=40, held_out=4, shard_size=8, answer_tokens=6)
    turns = UserTurns(text_artifact, load_verifier_artifact(text_artifact), 40)
    generator = Generator(text_artifact, turns.longest + 6, 8, 1)
    corpus = Corpus(tmp_path / "corpus", turns, generator, settings)
    # The random target ends no turn of its own: the files' half is all there is.
    shards = [corpus.shard(index, never, quiet) for index in range(4)]
    generator.close()
    assert [len({dialogue.key for dialogue in shard}) for shard in shards[:3]] == [2, 2, 2]
    keys = [key for shard in shards for key in {dialogue.key for dialogue in shard}]
    assert len(keys) == len(set(keys))
    for dialogue in shards[0]:
        text = turns._tokenizer.decode(dialogue.tokens[: dialogue.prompt_length].tolist())
        assert text.lower().startswith("<user>question")


def test_prompt_files_need_a_tokenizer(target, tmp_path):
    turns = UserTurns(target.verifier, load_verifier_artifact(target.verifier), 16)
    with pytest.raises(ExportError, match="without a tokenizer"):
        turns.from_file(tmp_path / "prompts.txt")


def test_features_and_distributions_are_the_reference_ones(golden_artifacts):
    golden = golden_arrays("qwen3_rnn")
    tokens = np.concatenate([golden["prompt"], golden["greedy"]])
    stage = OnnxRuntimeVerifier(golden_artifacts["qwen3_rnn"], 1)
    kept = np.arange(0, 300, 3)
    import torch

    target = TargetPass(stage, torch.from_numpy(kept))
    wanted = np.zeros(len(tokens), dtype=bool)
    wanted[[3, 4, 30, len(tokens) - 1]] = True
    features, rows = target.rows(tokens, wanted)
    np.testing.assert_allclose(features, golden["target_features"], atol=1e-4)
    np.testing.assert_array_equal(features, target.features(tokens))
    probabilities = torch.from_numpy(golden["target_logits"])[wanted].softmax(-1).numpy()
    np.testing.assert_allclose(rows.probabilities.numpy(), probabilities[:, kept], atol=1e-5)
    np.testing.assert_allclose(rows.outside.numpy(), 1 - probabilities[:, kept].sum(axis=1), atol=1e-5)
    # Longer than a chunk of the pass.
    long = np.tile(tokens, 6)[:300]
    assert np.array_equal(target.features(long)[: len(tokens)], features)
    stage.close()


def test_counts_are_sums_of_distributions(golden_artifacts):
    golden = golden_arrays("qwen3_rnn")
    prompt = len(golden["prompt"])
    tokens = np.concatenate([golden["prompt"], golden["greedy"]]).astype(np.int32)
    stage = OnnxRuntimeVerifier(golden_artifacts["qwen3_rnn"], 1)
    counts = count_tokens(TargetPass(stage), [Dialogue(tokens, prompt, False, 0)], 300)
    stage.close()
    logits = golden["target_logits"][prompt - 1 :].astype(np.float64)
    wanted = np.exp(logits - logits.max(axis=1, keepdims=True))
    wanted /= wanted.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(counts.unigrams, wanted.sum(axis=0), atol=1e-3)
    before = tokens[prompt - 1 :]
    pair = (int(before[5]), int(wanted[5].argmax()))
    place = np.flatnonzero((counts.tokens == pair[0]) & (counts.next_tokens == pair[1]))
    assert counts.mass[place].item() == pytest.approx(wanted[before == pair[0], pair[1]].sum(), rel=1e-3)
    assert (np.diff(counts.tokens * 300 + counts.next_tokens) > 0).all()


def test_drafts_stand_up_to_the_first_difference():
    drafted = np.array([[1, 2, 3], [1, 9, 3], [9, 2, 3], [1, 2, 9]])
    assert matches(drafted, np.array([[1, 2, 3]] * 4)).tolist() == [3, 1, 0, 2]


def test_a_walk_along_an_answer():
    # Anchor 0: two drafts stand, then the target's own; anchor 3: none; anchor 4: three would, two tokens are left.
    assert walk(np.array([2, 5, 5, 0, 3, 5])) == [2, 0, 1]
    assert walk(np.array([0, 0, 0])) == [0, 0, 0]
    assert walk(np.array([], dtype=np.int64)) == []
