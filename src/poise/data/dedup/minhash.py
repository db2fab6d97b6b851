"""MinHash signatures of documents over word n-grams: near-duplicates share many of a signature's numbers.

The share of equal numbers in two signatures estimates the Jaccard similarity of the two sets of n-grams (A. Broder, "On
the resemblance and containment of documents", 1997), here with ``bands * rows`` numbers. Fourteen bands of eight rows
over 5-grams of words are the settings of FineWeb (Penedo et al. 2024).

Two back ends; their signatures are not comparable with each other, so one run uses one.

* ``numpy``: fast similarity sketching (Dahlgaard, Knudsen, Thorup, "Fast similarity sketching", FOCS 2017). Each
  n-gram falls into one bin of the signature, the least value of a bin stays; empty bins are filled in further rounds
  with new hash functions, and what 8 rounds leave empty is filled by one MinHash function for each bin. Each number
  is an unbiased test of equality like one of MinHash, and the cost is that of about one hash function, not of 112.
* ``rensa``: R-MinHash of the optional package of that name (Rust); the same n-gram hashes go in.
"""

from __future__ import annotations

import importlib
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data.bits import mix
from poise.data.dedup.shingles import BLOCK_BYTES, shingles

Backend = Literal["auto", "rensa", "numpy"]

NGRAM: Final = 5
BANDS: Final = 14
ROWS: Final = 8
"""FineWeb's settings, and the defaults here."""

_ROUNDS: Final = 8  # after which bins still empty get a hash function of their own
_EMPTY: Final = np.uint32(2**32 - 1)  # no value is this large
_BITS: Final = 28  # of hash in a value; the 4 bits above hold the round
_MASK: Final = 2**_BITS - 1
_MANY: Final = 512  # n-grams from which on a signature with empty bins means repetition
_SEED: Final = 42
_PAIRS: Final = 2**18  # (bin, n-gram) pairs hashed at once in the last phase


def backend_of(backend: Backend = "auto") -> str:
    """Return which back end a run uses and its version, such as ``"rensa 0.5.0"``; for the manifest.

    Errors:
        UserError: an unknown name, or rensa is asked for and not installed.
    """
    if _choose(backend) == "numpy":
        return f"numpy {np.__version__}"
    return f"rensa {importlib.import_module('importlib.metadata').version('rensa')}"


def signatures(
    text: pa.StringArray,
    *,
    ngram: int = NGRAM,
    bands: int = BANDS,
    rows: int = ROWS,
    backend: Backend = "auto",
    block_bytes: int = BLOCK_BYTES,
) -> NDArray[np.uint32]:
    """Return the MinHash signature of every text, (N, bands * rows).

    A signature depends on nothing but its own text and the settings. Memory beyond the result is bounded by
    ``block_bytes``, whatever the length of a document. Documents of fewer than ``ngram`` words hash as a whole.

    Errors:
        UserError: an unknown back end, rensa asked for and not installed, or a size below 1.
    """
    for name, value in (("ngram", ngram), ("bands", bands), ("rows", rows)):
        if value < 1:
            raise UserError(f"minhash: {name} is {value}; it must be at least 1")
    sketch = _rensa if _choose(backend) == "rensa" else _numpy
    size = bands * rows
    out = np.empty((len(text), size), np.uint32)
    for block in shingles(text, ngram, block_bytes):
        here = sketch(block.hashes, block.offsets, size)
        if block.part:  # the sketch of a union is the least of the sketches, with both back ends
            np.minimum(out[block.row], here[0], out=out[block.row])
        else:
            out[block.row : block.row + len(here)] = here
    return out


def _choose(backend: Backend) -> Literal["rensa", "numpy"]:
    if backend == "numpy":
        return "numpy"
    if backend not in ("auto", "rensa"):
        raise UserError(f"unknown MinHash back end '{backend}'; choose auto, rensa or numpy")
    try:
        importlib.import_module("rensa")
    except ImportError:
        if backend == "rensa":
            raise UserError("back end rensa is not installed: pip install 'poise[fast]', or choose numpy") from None
        return "numpy"
    return "rensa"


def _rensa(hashes_S: NDArray[np.uint64], offsets_D1: NDArray[np.int64], size: int) -> NDArray[np.uint32]:
    """Return R-MinHash of the hashes of each document, (D, size)."""
    sketch: Any = importlib.import_module("rensa").RMinHash
    ends = np.ascontiguousarray(offsets_D1, np.uint64)
    matrix = sketch.digest_matrix_from_flat_token_hashes(hashes_S, ends, size, _SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(-1, size)


def _numpy(hashes_S: NDArray[np.uint64], offsets_D1: NDArray[np.int64], size: int) -> NDArray[np.uint32]:
    """Return the fast similarity sketch of the hashes of each document, (D, size).

    A value is the number of the round in 4 bits, then 28 bits of hash: the least is the first round's least.
    """
    counts_D = np.diff(offsets_D1)
    out = np.full((len(counts_D), size), _EMPTY, np.uint32)
    flat_out, hashes = out.reshape(-1), hashes_S
    first_S = np.repeat(np.arange(len(counts_D)) * size, counts_D)  # where an n-gram's document begins in ``out``
    open_D = np.ones(len(counts_D), bool)
    for number in range(_ROUNDS):
        here = hashes if number == 0 else mix(hashes + _key(number))
        place = ((here >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32)
        value = (here & np.uint64(_MASK)).astype(np.uint32) | np.uint32(number << _BITS)
        np.minimum.at(flat_out, first_S + place.astype(np.int64), value)
        still_D = open_D & (out == _EMPTY).any(1) & (counts_D > 0)
        if not still_D.any():
            return out
        if still_D.sum() < open_D.sum():  # full signatures take no part in the next round
            stay = still_D[first_S // size]
            hashes, first_S, open_D = hashes[stay], first_S[stay], still_D
    for row in np.flatnonzero(open_D & (counts_D > _MANY)):
        # Long, and yet bins are empty: the same few n-grams again and again.
        inside = np.unique(hashes_S[offsets_D1[row] : offsets_D1[row + 1]])
        out[row : row + 1] = np.minimum(out[row], _fill(inside, np.array([0, len(inside)]), out[row : row + 1]))
        open_D[row] = False
    rows = np.flatnonzero(open_D)
    if len(rows):
        starts = np.concatenate([[0], np.cumsum(counts_D[rows])])
        out[rows] = _fill(hashes_S[np.repeat(open_D, counts_D)], starts, out[rows])
    return out


def _fill(hashes_S: NDArray[np.uint64], offsets_D1: NDArray[np.int64], out: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return ``out`` (D, size) with every empty bin set to the least of its own hash function over the document."""
    row_P, bin_P = np.nonzero(out == _EMPTY)
    count_P = np.diff(offsets_D1)[row_P]
    factor_P = mix(bin_P.astype(np.uint64) + _key(_ROUNDS)) | np.uint64(1)
    done_P1 = np.concatenate([[0], np.cumsum(count_P)])
    at = 0
    while at < len(row_P):
        after = max(int(np.searchsorted(done_P1, done_P1[at] + _PAIRS, side="right")) - 1, at + 1)
        each = count_P[at:after]
        edges = done_P1[at:after] - done_P1[at]
        # For every pair (document, bin), the positions of all n-grams of that document.
        position = np.arange(done_P1[after] - done_P1[at]) + np.repeat(offsets_D1[row_P[at:after]] - edges, each)
        value = (hashes_S[position] * np.repeat(factor_P[at:after], each)) >> np.uint64(64 - _BITS)
        least = np.minimum.reduceat(value, edges).astype(np.uint32)
        out[row_P[at:after], bin_P[at:after]] = least | np.uint32(_ROUNDS << _BITS)
        at = after
    return out


def _key(number: int) -> np.uint64:
    return np.uint64((number * 0xD1342543DE82EF95 + _SEED) % 2**64)
