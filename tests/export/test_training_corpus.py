"""Text of a run: prompts, shards on disk, no prompt twice, and the target's pass over them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from artifacts import golden_arrays
from training import never, tiny_target

from dspark_backend.stages.artifact import load_verifier_artifact
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_export.errors import ExportError
from dspark_export.training.batch import Example
from dspark_export.training.corpus import HELD_OUT
from dspark_export.training.corpus_run import OpenCorpus
from dspark_export.training.corpus_settings import CorpusSettings
from dspark_export.training.corpus_source import check_source
from dspark_export.training.features import TargetPass
from dspark_export.training.generate import Continuation, Draw, Generator, Stopped
from dspark_export.training.heldout import matches, walk
from dspark_export.training.openings import Opening, OpeningChoice, alternating, read_openings
from dspark_export.training.record_file import RecordFile
from dspark_export.training.shard import Dialogue, load_shard, save_shard
from dspark_export.training.statistics import count_tokens
from dspark_export.training.user_turns import UserTurns, prompt_key


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny_target(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def open_corpus(target):
    """A function that opens a corpus over the tiny target; what it opens ends with the test."""
    corpora = []

    def opened(folder, **changes):
        settings = target.settings(folder, **{"slots": 8, **changes}).text
        corpora.append(OpenCorpus.at(folder / "corpus", load_verifier_artifact(settings.verifier), settings))
        return corpora[-1].corpus

    yield opened
    for corpus in corpora:
        corpus.close()


@contextmanager
def opened_pass(verifier):
    over = TargetPass(lambda: OnnxRuntimeVerifier(verifier, 1))
    yield over
    over.close()


def quiet(what, done):
    pass


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(a.tokens, b.tokens)
        and (a.prompt_length, a.sampled, a.key, a.domain) == (b.prompt_length, b.sampled, b.key, b.domain)
        for a, b in zip(left, right, strict=True)
    )


def test_a_shard_survives_the_disk(tmp_path):
    dialogues = [
        Dialogue(np.array([5, 6, 7, 8], dtype=np.int32), 1, True, 2**64 - 1, "maths"),
        Dialogue(np.array([9, 1], dtype=np.int32), 1, False, 3, "own"),
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
    found = []
    with opened_pass(target.verifier) as over:
        over.logits(
            dialogue.tokens, dialogue.prompt_length - 1, lambda logits: found.extend(logits.argmax(dim=1).tolist())
        )
    assert found[:-1] == dialogue.tokens[dialogue.prompt_length :].tolist()


def test_a_lost_shard_comes_back_the_same(open_corpus, tmp_path):
    first = open_corpus(tmp_path)
    before = [first.shard(index, never, quiet) for index in range(3)]
    first.close()
    for number in (1, 2):
        for suffix in (".npz", ".safetensors"):
            (tmp_path / "corpus" / f"shard-0000{number}{suffix}").unlink()
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
    assert not list((tmp_path / "corpus").glob("shard-00001*"))
    # What was cancelled does not disturb what follows.
    assert same(corpus.shard(1, never, quiet), open_corpus(tmp_path / "other").shard(1, never, quiet))


def equal(left, right):
    names = ("features", "top_ids", "top_probabilities", "rest")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


def test_what_was_recorded_is_what_the_target_says(open_corpus, tmp_path, target):
    """To the last bit, although slots are few, and the cache grows and is tidied up meanwhile."""
    corpus = open_corpus(tmp_path, answer_tokens=150, shard_size=24, slots=5)
    dialogues = corpus.shard(1, never, quiet)
    assert len({dialogue.answer_length for dialogue in dialogues}) > 5
    plain = open_corpus(tmp_path, feature_cache=False)
    plain.shard(1, never, quiet)
    with opened_pass(target.verifier) as over:
        for row, dialogue in enumerate(dialogues):
            computed = over.record(dialogue)
            assert equal(corpus.record(1, row), computed) and equal(plain.record(1, row), computed)
            assert computed.features.shape[0] == len(dialogue.tokens) - 1
            assert len(computed.rest) == dialogue.answer_length


def test_a_lost_record_is_made_up_for_and_a_damaged_one_named(open_corpus, tmp_path):
    corpus = open_corpus(tmp_path)
    dialogues = corpus.shard(1, never, quiet)
    before = corpus.record(1, 3)
    path = tmp_path / "corpus" / "shard-00001.safetensors"
    whole = path.read_bytes()
    path.unlink()
    again = open_corpus(tmp_path)
    again.shard(1, never, quiet)
    assert equal(again.record(1, 3), before) and path.read_bytes() == whole
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match=r"shard-00001\.safetensors.*delete it"):
        RecordFile(path, dialogues, before.features.shape[1])
    path.write_bytes(whole)
    with pytest.raises(ExportError, match="of another verifier or shard"):
        RecordFile(path, dialogues[1:], before.features.shape[1])


def test_one_process_writes_and_others_wait(open_corpus, tmp_path):
    writer, reader = open_corpus(tmp_path), open_corpus(tmp_path)
    assert writer.may_write() and not reader.may_write()
    assert (tmp_path / "corpus" / "writer.lock").read_text() == f"{os.getpid()}\n"
    with pytest.raises(Stopped):
        reader.shard(HELD_OUT, lambda: True, quiet)
    written = writer.shard(HELD_OUT, never, quiet)
    assert reader.available == 1 and same(reader.shard(HELD_OUT, never, quiet), written)
    writer.close()
    assert reader.may_write() and not writer.may_write()


def test_a_corpus_of_another_target_is_refused(open_corpus, tmp_path, target):
    open_corpus(tmp_path)
    artifact = load_verifier_artifact(target.verifier)
    check_source(tmp_path / "corpus", artifact)
    for change, message in (
        ({"source_hash": "0" * 64}, "this one.s is 000000000000"),
        ({"target_layer_ids": (0,)}, r"target layers .* this one's is \[0\]"),
    ):
        with pytest.raises(ExportError, match=message):
            check_source(tmp_path / "corpus", dataclasses.replace(artifact, **change))


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


def test_prompts_of_a_chat_model(text_artifact, tmp_path, caplog):
    turns = UserTurns(text_artifact, load_verifier_artifact(text_artifact), 40)
    random = np.random.default_rng(0)
    opening = turns.opening(random, Opening())
    assert turns._tokenizer is not None
    assert turns._tokenizer.decode(opening) == "<user>" and turns.opening_tokens(random) == 40

    def written(text, ended=True):
        return turns.from_target(opening, Opening(), Continuation(tuple(turns._tokenizer.encode(text)), ended))

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
    assert "prompts.jsonl: 1 of 3 are left out: longer than --prompt-tokens 40" in caplog.text


def test_a_prompt_of_a_file_is_known_wherever_it_comes_from(text_artifact, tmp_path):
    turns = UserTurns(text_artifact, load_verifier_artifact(text_artifact), 40)
    file = tmp_path / "prompts.jsonl"
    lines = [
        "What is a fox?",
        {"prompt": "what is\na  FOX?"},
        {"messages": [{"role": "user", "content": "What is a fox?"}]},
        "Wo ist Änne?",
        "wo ist änne?",
        {"messages": [{"role": "system", "content": "What is a fox?"}]},
        {"messages": ["no message"]},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    fox, *same, first, second, other = [prompt.key for prompt in turns.from_file(file)]
    ids = turns.opening(np.random.default_rng(0), Opening())
    own = turns.from_target(ids, Opening(), Continuation(tuple(turns._tokenizer.encode("What is a fox?")), True))
    assert same == [fox, fox] and own is not None and own.key == fox and first == second
    assert len({fox, first, other}) == 3


def test_a_target_without_a_chat_template_takes_short_prompts(text_artifact, tmp_path):
    plain = dataclasses.replace(load_verifier_artifact(text_artifact), chat_template=None)
    turns = UserTurns(text_artifact, plain, 1)
    assert turns.opening_tokens(np.random.default_rng(0)) == 1
    file = tmp_path / "prompts.jsonl"
    file.write_text('"x"\n{"messages": ["no message"]}\n')
    assert [len(prompt.token_ids) for prompt in turns.from_file(file)] == [1]


def test_the_target_completes_openings(text_artifact):
    turns = UserTurns(text_artifact, load_verifier_artifact(text_artifact), 60)
    chosen = Opening("Why is", " Be brief.", "general")
    ids = turns.opening(np.random.default_rng(0), chosen)
    assert turns._tokenizer is not None and turns._tokenizer.decode(ids) == "<user>Why is"
    prompt = turns.from_target(ids, chosen, Continuation(tuple(turns._tokenizer.encode(" the sky blue?")), True))
    assert prompt is not None and prompt.domain == "general"
    assert turns._tokenizer.decode(prompt.token_ids) == "<user>Why is the sky blue? Be brief.<a>"


def test_openings_of_a_file(tmp_path):
    path = tmp_path / "few.txt"
    path.write_text("# a comment\nHow many\t\\nBe brief.\n\n[code]\n-\n  Write a function  \n")
    assert read_openings(path) == [
        Opening("How many", "\nBe brief.", "few"), Opening("", "", "code"), Opening("Write a function", "", "code")
    ]  # fmt: skip
    path.write_bytes(b"\xef\xbb\xbf[code]\nWrite a function\n")
    assert read_openings(path) == [Opening("Write a function", "", "code")], "a byte order mark is no part of a line"
    path.write_bytes("Erkläre".encode("latin-1"))
    with pytest.raises(ExportError, match=r"few\.txt: expected UTF-8 text, got an invalid byte at 4"):
        read_openings(path)
    path.write_text("\t ending only")
    with pytest.raises(ExportError, match=r"few\.txt, line 1: expected a beginning"):
        read_openings(path)
    path.write_text("# nothing\n")
    with pytest.raises(ExportError, match="got none"):
        read_openings(path)


def test_every_eighth_opening_is_held_out_and_domains_take_turns():
    choice = OpeningChoice([Opening(str(number), "", domain) for domain in "ab" for number in range(17)] + [Opening()])
    random = np.random.default_rng(0)
    assert choice.domains == ["a", "b", "own"]
    held = {choice.draw(random, "a", True).beginning for _ in range(50)}
    kept = {choice.draw(random, "a", False).beginning for _ in range(500)}
    assert held == {"7", "15"} and len(kept) == 15 and not held & kept
    assert choice.draw(random, "own", True) == choice.draw(random, "own", False) == Opening()
    assert alternating("ab", ["a", "a", "b"], 4) == ["b", "a", "b", "a"]
    assert OpeningChoice([]).draw(random, OpeningChoice([]).domains[0], True) == Opening()


def test_prompt_files_fill_half_of_a_shard_each_prompt_once(text_artifact, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"Question number {number}?" for number in range(9)) + "\nquestion  NUMBER 3?\n")
    settings = CorpusSettings(
        text_artifact, (file,), prompt_tokens=40, held_out=4, shard_size=8, answer_tokens=6, threads=1
    )  # fmt: skip
    artifact = load_verifier_artifact(text_artifact)
    opened = OpenCorpus.at(tmp_path / "corpus", artifact, settings)
    turns, corpus = UserTurns(text_artifact, artifact, 40), opened.corpus
    # The random target ends no turn of its own: the files' half is all there is.
    shards = [corpus.shard(index, never, quiet) for index in range(4)]
    opened.close()
    assert {dialogue.domain for dialogue in shards[0]} == {"prompts"}
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
    tokens = np.concatenate([golden["prompt"], golden["greedy"]]).astype(np.int32)
    dialogue = Dialogue(tokens, len(golden["prompt"]), False, 0, "own")
    with opened_pass(golden_artifacts["qwen3_rnn"]) as over:
        record = over.record(dialogue)
        everything = over.logits(tokens, len(tokens), lambda logits: None)
        # Longer than a chunk of the pass.
        long = over.logits(np.tile(tokens, 6)[:300], 300, lambda logits: None)
    np.testing.assert_allclose(everything, golden["target_features"], atol=1e-4)
    assert np.array_equal(long[: len(tokens)], everything)
    assert torch.equal(record.features, torch.from_numpy(everything[:-1]).bfloat16())
    probabilities = torch.from_numpy(golden["target_logits"])[dialogue.prompt_length - 1 : -1].softmax(-1)
    found = probabilities.gather(-1, record.top_ids.long())
    torch.testing.assert_close(record.top_probabilities.float(), found, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found, probabilities.topk(128).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(record.rest, 1 - found.sum(-1), atol=1e-5, rtol=0)


def test_counts_are_sums_of_distributions(golden_artifacts):
    golden = golden_arrays("qwen3_rnn")
    prompt = len(golden["prompt"])
    tokens = np.concatenate([golden["prompt"], golden["greedy"]]).astype(np.int32)
    dialogue = Dialogue(tokens, prompt, False, 0, "own")
    with opened_pass(golden_artifacts["qwen3_rnn"]) as over:
        counts = count_tokens([Example(dialogue, over.record(dialogue))], 300)
    logits = golden["target_logits"][prompt - 1 : -1].astype(np.float64)
    wanted = np.exp(logits - logits.max(axis=1, keepdims=True))
    wanted /= wanted.sum(axis=1, keepdims=True)
    order = np.argsort(-wanted, axis=1)[:, :128]
    kept = np.zeros_like(wanted)
    np.put_along_axis(kept, order, np.take_along_axis(wanted, order, 1), 1)
    np.testing.assert_allclose(counts.unigrams, kept.sum(axis=0), atol=2e-3)
    before = tokens[prompt - 1 : -1]
    pair = (int(before[5]), int(wanted[5].argmax()))
    place = np.flatnonzero((counts.tokens == pair[0]) & (counts.next_tokens == pair[1]))
    assert counts.mass[place].item() == pytest.approx(wanted[before == pair[0], pair[1]].sum(), rel=2e-3)
    assert (np.diff(counts.tokens * 300 + counts.next_tokens) > 0).all()


def test_drafts_stand_up_to_the_first_difference():
    drafted = np.array([[1, 2, 3], [1, 9, 3], [9, 2, 3], [1, 2, 9]])
    assert matches(drafted, np.array([[1, 2, 3]] * 4)).tolist() == [3, 1, 0, 2]


def test_a_walk_along_an_answer():
    # Anchor 0: two drafts stand, then the target's own; anchor 3: none; anchor 4: three would, two tokens are left.
    assert walk(np.array([2, 5, 5, 0, 3, 5])) == [2, 0, 1]
    assert walk(np.array([0, 0, 0])) == [0, 0, 0]
    assert walk(np.array([], dtype=np.int64)) == []
