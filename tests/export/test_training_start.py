"""What a run starts from: counted tokens, the draft vocabulary, and a Markov head made of bigrams."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from drafters import golden_torch_drafter

from dspark_export.errors import ExportError
from dspark_export.torch_heads import MarkovHead
from dspark_export.training.export import pick_mask_token
from dspark_export.training.markov_init import (
    SparseRows,
    bigram_factors,
    leading_right_vectors,
    start_from_bigrams,
)
from dspark_export.training.record import top_of
from dspark_export.training.statistics import TokenStatistics, most_frequent


def statistics(vocab=40, pairs=400, seed=0):
    """Counts of a language in which a token has a few followers."""
    random = np.random.default_rng(seed)
    places = np.unique(random.integers(0, vocab * vocab, pairs))
    mass = random.gamma(0.5, 20.0, len(places)) + 0.1
    following = places % vocab
    return TokenStatistics(
        np.bincount(following, weights=mass, minlength=vocab), places // vocab, following, mass
    )  # fmt: skip


def bigram_log_probabilities(counts):
    """[V, V] with the smoothing that the factors promise."""
    vocab = len(counts.unigrams)
    unigram = (counts.unigrams + 1e-3) / (counts.unigrams + 1e-3).sum()
    dense = np.zeros((vocab, vocab))
    dense[counts.tokens, counts.next_tokens] = counts.mass
    smoothed = dense + 2.0 * unigram
    return np.log(smoothed / smoothed.sum(axis=1, keepdims=True))


def log_softmax(logits):
    return torch.from_numpy(np.asarray(logits, dtype=np.float64)).log_softmax(-1).numpy()


def test_most_frequent_tokens_in_order_of_their_ids():
    assert most_frequent(np.array([5.0, 1.0, 9.0, 5.0, 0.0]), 3).tolist() == [0, 2, 3]
    assert most_frequent(np.array([1.0, 1.0, 1.0]), 2).tolist() == [0, 1]
    assert most_frequent(np.array([1.0, 2.0]), 2).dtype == np.int64


def test_sparse_products_equal_dense_ones():
    random = np.random.default_rng(1)
    dense = (random.random((30, 20)) * (random.random((30, 20)) < 0.2)).astype(np.float32)
    row, column = np.nonzero(dense)
    sparse = SparseRows(dense.shape, row, column, dense[row, column])
    right, left = random.random((20, 3)).astype(np.float32), random.random((30, 3)).astype(np.float32)
    np.testing.assert_allclose(sparse.times(right), dense @ right, rtol=1e-5)
    np.testing.assert_allclose(sparse.transposed().times(left), dense.T @ left, rtol=1e-5)


def test_the_randomised_decomposition_spans_the_leading_vectors():
    random = np.random.default_rng(2)
    dense = (random.standard_normal((60, 5)) @ random.standard_normal((5, 40))).astype(np.float32)
    dense += 0.01 * random.standard_normal(dense.shape).astype(np.float32)
    row, column = np.nonzero(dense)
    found = leading_right_vectors(SparseRows(dense.shape, row, column, dense[row, column]), 5, seed=0)
    exact = np.linalg.svd(dense)[2][:5].T
    np.testing.assert_allclose(found.T @ found, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(np.linalg.svd(found.T @ exact)[1], 1.0, atol=1e-4)


def test_factors_of_full_rank_are_the_bigrams():
    counts = statistics()
    factors = bigram_factors(counts, np.arange(40), 41, seed=0)
    got = log_softmax(factors.first @ factors.second.T)
    seen = np.unique(counts.tokens)
    np.testing.assert_allclose(got[seen], bigram_log_probabilities(counts)[seen], atol=2e-3)


def test_a_lower_rank_still_beats_unigrams():
    counts = statistics(vocab=120, pairs=1500)
    wanted = np.exp(bigram_log_probabilities(counts))
    unigram = (counts.unigrams + 1e-3) / (counts.unigrams + 1e-3).sum()
    low = bigram_factors(counts, np.arange(120), 24, seed=0)
    got = np.exp(log_softmax(low.first @ low.second.T))
    rows = np.unique(counts.tokens)
    share = np.bincount(counts.tokens, weights=counts.mass, minlength=120)[rows]
    distance = 0.5 * np.average(np.abs(got - wanted)[rows].sum(axis=1), weights=share)
    assert distance < 0.75 * 0.5 * np.average(np.abs(unigram - wanted)[rows].sum(axis=1), weights=share)


def test_a_reduced_vocabulary_has_its_own_rows():
    counts = statistics()
    kept = most_frequent(counts.unigrams, 12)
    factors = bigram_factors(counts, kept, 13, seed=0)
    assert factors.first.shape == (40, 13) and factors.second.shape == (12, 13)
    got = log_softmax(factors.first @ factors.second.T)
    wanted = log_softmax(bigram_log_probabilities(counts)[:, kept])
    # Rows that only ever precede tokens outside fall back to unigrams.
    inside = np.unique(counts.tokens[np.isin(counts.next_tokens, kept)])
    outside = np.setdiff1d(np.arange(40), inside)
    np.testing.assert_allclose(got[inside], wanted[inside], atol=2e-3)
    smoothed = counts.unigrams[kept] + 1e-3
    np.testing.assert_allclose(np.exp(got[outside]), np.tile(smoothed / smoothed.sum(), (len(outside), 1)), atol=1e-3)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@torch.no_grad()
def test_every_kind_of_head_starts_as_the_bigrams(kind):
    spec = dataclasses.replace(
        golden_torch_drafter(f"qwen3_{kind}").spec, markov_rank=41, draft_vocab_size=40, head=kind
    )
    spec = dataclasses.replace(spec, decoder=dataclasses.replace(spec.decoder, vocab_size=40))
    torch.manual_seed(0)
    head = MarkovHead(spec)
    factors = bigram_factors(statistics(), np.arange(40), 41, seed=0)
    start_from_bigrams(head, factors)
    previous = torch.arange(40).repeat(2, 1)
    hidden = 0.3 * torch.randn(2, 40, spec.decoder.hidden_size)
    bias = head(hidden, head.markov_w1(previous))
    wanted = torch.from_numpy(factors.first @ factors.second.T).softmax(-1)
    distance = 0.5 * (bias.softmax(-1) - wanted).abs().sum(-1)
    assert float(distance.mean()) < {"vanilla": 1e-6, "gated": 0.06, "rnn": 0.06}[kind]
    with pytest.raises(ExportError, match=r"expected factors of \(40, 41\)"):
        start_from_bigrams(head, bigram_factors(statistics(), np.arange(40), 20, seed=0))


def test_the_mask_token_was_trained():
    embedding = np.ones((10, 4), dtype=np.float32)
    embedding[7:] = 0.0
    embedding[8] = 0.01
    assert pick_mask_token(embedding) == 6


def test_the_most_probable_tokens_are_recorded_with_what_is_left():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125]])) + 3.0
    ids, probabilities, rest = top_of(logits)
    assert ids.dtype == torch.int32 and ids.tolist()[0][:2] == [0, 1] and sorted(ids.tolist()[0]) == [0, 1, 2, 3]
    assert probabilities.tolist()[0] == pytest.approx([0.5, 0.25, 0.125, 0.125], rel=1e-3)
    assert rest.tolist() == pytest.approx([0.0], abs=1e-6)
    wide = torch.zeros(2, 200)
    ids, probabilities, rest = top_of(wide)
    assert ids.shape == (2, 128) and rest.tolist() == pytest.approx([72 / 200] * 2, rel=1e-5)
    assert probabilities.float().sum(dim=1).tolist() == pytest.approx([128 / 200] * 2, rel=1e-3)
