"""Data order as a pure function of (seed, step).

The training set of `size` samples is an endless stream of epochs, each with another permutation. A permutation is a
Feistel network over the smallest power of four ≥ `size`, repeated until the result is below `size` (cycle walking). It
needs no table and no state, and computes any position directly.
"""

import numpy as np
from numpy.typing import NDArray

FEISTEL_ROUNDS = 6
VALIDATION_SEED = 0x5EED_0F_7E57  # of the order of validation samples: the same for every run


def step_samples(step: int, batch: int, size: int, seed: int) -> NDArray[np.int64]:
    """Sample indices (batch,) of the global batch at `step` (from 0): positions [step · batch, (step + 1) · batch)."""
    positions = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    epochs, offsets = positions // size, positions % size
    samples = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        samples[inside] = permute(offsets[inside], size, seed, int(epoch))
    return samples


def micro_batch_rows(samples: NDArray[np.int64], part: int, parts: int) -> NDArray[np.int64]:
    """Return the rows of micro-batch number `part` of `parts`; sizes differ by at most one."""
    return np.array_split(samples, parts)[part]


def permute(indices: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Map `indices` (any shape, 0 ≤ index < size) through the permutation of this seed and epoch."""
    half_bits = max((max(size - 1, 1).bit_length() + 1) // 2, 1)
    seed_part, epoch_part = mix(np.array([seed % 2**64, ~epoch % 2**64], dtype=np.uint64))
    keys = mix(np.arange(FEISTEL_ROUNDS, dtype=np.uint64) + seed_part + epoch_part)
    values = _feistel(indices.astype(np.uint64), half_bits, keys)
    outside = values >= size
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, keys)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right + key) & mask)
    return (left << shift) | right


def validation_rows(numbers: NDArray[np.int64], tokens: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    """Return the rows (n,), ascending, of a prefix of the fixed order of all validation samples.

    The order follows from the samples' numbers alone, so a larger limit adds samples, and leaving out others does not
    change the order of the rest.

    Args:
        numbers: (S,) number of each sample.
        tokens: (S,) tokens of each sample.
        limit: most tokens of the prefix, which has at least one sample; None: all samples.
    """
    if limit is None or tokens.sum() <= limit:
        return np.arange(len(numbers), dtype=np.int64)
    order = np.argsort(uniforms(numbers, VALIDATION_SEED), kind="stable")
    count = np.searchsorted(np.cumsum(tokens[order]), limit, side="right")
    return np.sort(order[: max(int(count), 1)])


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash with SplitMix64's finalizer (Steele et al. 2014): every input bit affects every output bit."""
    with np.errstate(over="ignore"):
        values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniforms(indices: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1) as a pure function of (seed, index), for `indices` of any shape."""
    key = mix(np.array([seed % 2**64], dtype=np.uint64))
    return (mix(indices.astype(np.uint64) ^ key) >> np.uint64(11)).astype(np.float64) * 2.0**-53
