"""How many planted near-duplicates are found, at known similarity, and how fast: both MinHash back ends.

Run: ``python benchmarks/data/near_duplicates.py | tee benchmarks/results/data_near_duplicates.txt`` (some seconds).

Made: documents of random words (frequencies by Zipf), and of each a copy with words replaced so that the exact
Jaccard similarity of the two sets of word 5-grams is as wanted (within 0.005). Found: ``clusters.near`` over the
whole corpus, in which all other documents are in the way. Columns: ``candidates``, the share of pairs with an equal
band, beside 1 - (1 - s^8)^14; ``joined``, the share in one cluster at the threshold; ``bias`` and ``sd`` of the
estimated similarity. Of all pairs of documents that were put together: the share that was planted, and the shares of
those with a true similarity at or above the threshold, and 0.1 below it. Speeds: best of three, processor time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.data.dedup import clusters, minhash

Result = TypeVar("Result")

SIMILARITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
CLOSE = 0.005
VOCABULARY = 20_000


def grams(words: NDArray[np.int64]) -> set[tuple[int, ...]]:
    """Return the set of 5-grams of word numbers."""
    return set(map(tuple, np.lib.stride_tricks.sliding_window_view(words, minhash.NGRAM).tolist()))


def jaccard(left: set[tuple[int, ...]], right: set[tuple[int, ...]]) -> float:
    """Return the exact similarity of two sets."""
    return len(left & right) / len(left | right)


def near_copy(words: NDArray[np.int64], wanted: float, rng: np.random.Generator) -> tuple[NDArray[np.int64], float]:
    """Return a copy with words replaced so that its similarity is about ``wanted``, and the exact similarity.

    To lose d of m n-grams leaves (m - d) / (m + d). A word replaced far from others takes n of them, the r-th word of
    the text takes r.
    """
    n = minhash.NGRAM
    count = len(words) - n + 1
    lost = round(count * (1 - wanted) / (1 + wanted))
    copy = words.copy()
    places = rng.choice(np.arange(2 * n, len(words) - n, n), lost // n, replace=False)
    copy[places] = VOCABULARY + rng.integers(VOCABULARY, size=len(places))
    if lost % n:
        copy[lost % n - 1] = VOCABULARY + rng.integers(VOCABULARY)
    return copy, jaccard(grams(words), grams(copy))


def corpus(pairs: int, shortest: int, longest: int, seed: int) -> tuple[list[str], NDArray[np.float64]]:
    """Return texts, planted pairs in neighbouring rows, and the exact similarity of each pair, (8, pairs)."""
    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, VOCABULARY + 1)
    texts, true = [], np.zeros((len(SIMILARITIES), pairs))
    for level, wanted in enumerate(SIMILARITIES):
        for pair in range(pairs):
            while abs(true[level, pair] - wanted) > CLOSE:
                words = rng.choice(VOCABULARY, rng.integers(shortest, longest), p=chance / chance.sum())
                copy, true[level, pair] = near_copy(words, wanted, rng)
            texts += [" ".join(f"w{word}" for word in each) for each in (words, copy)]
    return texts, true


def pairs_of(labels: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield every two documents that were put together."""
    order = np.argsort(labels, kind="stable")
    edges = np.flatnonzero(np.diff(labels[order])) + 1
    for group in np.split(order, edges):
        for i in range(len(group)):
            for j in range(i + 1, len(group)):
                yield int(group[i]), int(group[j])


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Return the least processor time of three runs, and the result."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
    return min(seconds), result


def report(backend: minhash.Backend, texts: list[str], true: NDArray[np.float64], threshold: float) -> None:
    """Print one back end's table."""
    column = pa.array(texts, pa.large_string())
    signed, signatures = timed(lambda: minhash.signatures(column, backend=backend))
    grouped, labels = timed(lambda: clusters.near(signatures, threshold=threshold))
    size = sum(map(len, texts)) / 1e6
    print(f"\n{minhash.backend_of(backend)}: {len(texts):,} documents, {size:.1f} MB")
    print(f"signatures {size / signed:.0f} MB/cpu-s, clusters {len(texts) / grouped:,.0f} documents/cpu-s")
    left, right = signatures[::2], signatures[1::2]
    equal = (left == right).reshape(*true.shape, minhash.BANDS, minhash.ROWS)
    candidate = equal.all(-1).any(-1)
    error = equal.mean((-1, -2)) - true
    joined = (labels[::2] == labels[1::2]).reshape(true.shape)
    print(f"{'similarity':>10} {'candidates':>10} {'expected':>8} {'joined':>6} {'bias':>7} {'sd':>6}")
    for level, wanted in enumerate(SIMILARITIES):
        expected = (1 - (1 - true[level] ** minhash.ROWS) ** minhash.BANDS).mean()
        print(
            f"{wanted:10.2f} {candidate[level].mean():10.3f} {expected:8.3f} {joined[level].mean():6.3f} "
            f"{error[level].mean():+7.4f} {error[level].std():6.4f}"
        )
    found = list(pairs_of(labels))
    similar = {2 * pair: value for pair, value in enumerate(true.ravel())}
    planted = [similar[a] for a, b in found if b == a + 1 and a in similar]
    high = true >= threshold
    print(
        f"joined pairs: {len(found):,}; planted: {len(planted) / max(len(found), 1):.4f}; "
        f"true similarity >= {threshold}: {np.mean([value >= threshold for value in planted]):.3f}, "
        f">= {threshold - 0.1:.1f}: {np.mean([value >= threshold - 0.1 for value in planted]):.3f}; "
        f"recall of pairs at or above {threshold}: {joined[high].mean():.3f}"
    )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200, help="planted pairs at each similarity")
    parser.add_argument("--words", type=int, nargs=2, default=(200, 600), metavar=("LEAST", "MOST"))
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    texts, true = corpus(options.pairs, *options.words, options.seed)
    print(f"{options.pairs} pairs at each similarity, documents of {options.words[0]} to {options.words[1]} words")
    backends: tuple[minhash.Backend, ...] = ("numpy", "rensa")
    for backend in backends:
        if backend == "rensa" and find_spec("rensa") is None:
            print("\nrensa is not installed: left out")
            continue
        report(backend, texts, true, options.threshold)


if __name__ == "__main__":
    main()
