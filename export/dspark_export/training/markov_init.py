"""A Markov head that starts as the target's bigrams: a low-rank factorisation of their logarithms.

With counts C, row sums N, unigram probabilities u and k pseudo-counts, log p(j | i) is, up to a constant of the row,
log u_j + log(1 + C_ij / (k u_j)): one rank for the first term, and a sparse matrix for the second, whose rank is
reduced by a randomised singular value decomposition (rows weighted by the root of their counts).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dspark_backend.stages.batch import FloatArray
from dspark_export.errors import ExportError
from dspark_export.torch_heads import MarkovHead
from dspark_export.training.statistics import TokenStatistics

_PSEUDO_COUNTS = 2.0
_OVERSAMPLING = 8
_POWER_ITERATIONS = 2
_BLOCK = 1 << 18
"""Elements of the sparse matrix that are multiplied at once."""
_LINEAR = 0.25
"""tanh(x) is nearly x up to here."""


@dataclass(frozen=True)
class SparseRows:
    """[rows, columns] with values at places sorted by row."""

    shape: tuple[int, int]
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    value: FloatArray

    def transposed(self) -> SparseRows:
        order = np.argsort(self.column, kind="stable")
        return SparseRows(self.shape[::-1], self.column[order], self.row[order], self.value[order])

    def times(self, dense: FloatArray) -> FloatArray:
        """This [m, n] times ``dense`` [n, r]."""
        result = np.zeros((self.shape[0], dense.shape[1]), dtype=np.float32)
        for start in range(0, len(self.row), _BLOCK):
            part = slice(start, start + _BLOCK)
            row = self.row[part]
            first = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
            products = self.value[part, None] * dense[self.column[part]]
            result[row[first]] += np.add.reduceat(products, first, axis=0)
        return result


@dataclass(frozen=True)
class BigramFactors:
    """W1 [V, r] and W2 [Vd, r], float32: ``W1 @ W2.T`` approximates log p(next | token) up to a constant of the row."""

    first: FloatArray
    second: FloatArray


def leading_right_vectors(matrix: SparseRows, rank: int, seed: int) -> FloatArray:
    """Orthonormal [n, rank] that spans nearly what the largest right singular vectors span (randomised SVD)."""
    random = np.random.default_rng(seed)
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    flipped = matrix.transposed()
    basis = random.standard_normal((matrix.shape[1], width)).astype(np.float32)
    for _ in range(_POWER_ITERATIONS):
        basis = np.linalg.qr(flipped.times(np.linalg.qr(matrix.times(basis))[0]))[0]
    left = np.linalg.qr(matrix.times(basis))[0]
    _, _, right = np.linalg.svd(flipped.times(left).T, full_matrices=False)
    return np.ascontiguousarray(right[:rank].T, dtype=np.float32)


def bigram_factors(
    statistics: TokenStatistics, draft_ids: NDArray[np.int64], rank: int, seed: int
) -> BigramFactors:  # fmt: skip
    """Factors for the vocabulary of ``statistics`` and the draft vocabulary ``draft_ids``, ascending."""
    vocab_size = len(statistics.unigrams)
    smoothed = statistics.unigrams + 1e-3
    unigram = smoothed[draft_ids] / smoothed.sum()
    place = np.searchsorted(draft_ids, statistics.next_tokens)
    place = np.minimum(place, len(draft_ids) - 1)
    known = draft_ids[place] == statistics.next_tokens
    tokens, column, mass = statistics.tokens[known], place[known], statistics.mass[known]
    value = np.log1p(mass / (_PSEUDO_COUNTS * unigram[column])).astype(np.float32)
    weight = np.sqrt(np.bincount(tokens, weights=mass, minlength=vocab_size))
    seen, row = np.unique(tokens, return_inverse=True)
    plain = SparseRows((len(seen), len(draft_ids)), row, column, value)
    weighted = SparseRows(plain.shape, row, column, (value * weight[tokens]).astype(np.float32))
    right = leading_right_vectors(weighted, rank - 1, seed)
    left = plain.times(right)
    # As large on one side as on the other, so that one learning rate suits both.
    balance = np.sqrt(np.linalg.norm(left, axis=0) / max(1, len(seen)) ** 0.5 * len(draft_ids) ** 0.5) + 1e-6
    found = right.shape[1]
    first = np.zeros((vocab_size, rank), dtype=np.float32)
    second = np.zeros((len(draft_ids), rank), dtype=np.float32)
    first[:, 0] = 1.0
    # Centred: a constant changes no softmax, and small numbers train better.
    second[:, 0] = np.log(unigram) - np.log(unigram).mean()
    first[seen, 1 : 1 + found] = left / balance
    second[:, 1 : 1 + found] = right * balance
    return BigramFactors(first, second)


@torch.no_grad()
def start_from_bigrams(head: MarkovHead, factors: BigramFactors) -> None:
    """Set a head of any kind so that its bias is, at first, that of the factors.

    Raises:
        ExportError: the factors are of another size.
    """
    first, second = torch.from_numpy(factors.first), torch.from_numpy(factors.second)
    if head.markov_w1.weight.shape != first.shape or head.markov_w2.weight.shape != second.shape:
        raise ExportError(
            f"bigram start: expected factors of {tuple(head.markov_w1.weight.shape)} and "
            f"{tuple(head.markov_w2.weight.shape)}, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    rank = first.shape[1]
    head.markov_w1.weight.copy_(first)
    head.markov_w2.weight.copy_(second)
    if hasattr(head, "gate_proj"):
        # sigmoid(0) of a gate that does not yet look anywhere is one half.
        head.gate_proj.weight.mul_(0.1)
        head.gate_proj.bias.zero_()
        head.markov_w2.weight.mul_(2.0)
    if hasattr(head, "joint_proj"):
        # tanh(o) with a small o that is a copy of e.
        scale = _LINEAR / first.abs().amax(dim=0).clamp(min=1e-6)
        rows = head.joint_proj.weight[2 * rank :]
        rows.zero_()
        rows[:, rank : 2 * rank] = torch.diag(scale)
        head.joint_proj.bias[2 * rank :].zero_()
        head.markov_w2.weight.div_(scale)
