"""The optional fast encoder, gigatoken, taken only where it gives the very ids of ``tokenizers``.

It is young, so it is never trusted: it is built from the same ``tokenizer.json`` and compared on texts chosen to
differ and on a sample of the corpus; the first difference refuses it and is told in words. Three of its ways are met
here: it matches special tokens in any text it reads, so it is built without them, as the text of a document must not
be able to end the document; it knows a later Unicode than ``tokenizers``, so texts with characters newer than both
are left to ``tokenizers`` (``unfamiliar``); and it remembers every word it has seen, so it is built anew when memory
has grown.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.data import record

if TYPE_CHECKING:
    from poise.data.tokens.tokenizer import Tokenizer

CHECK_BYTES: Final = 2**20
"""Sample text compared, at most: about a second of ``tokenizers``."""

_GROUP_BYTES: Final = 32 * 2**20  # text given to the library at once, and least text between two builds
_GROWTH_BYTES: Final = 192 * 2**20  # of memory, after which the library is built anew
_PIECE: Final = 2**14  # characters taken from one text of the sample


class FastEncoder:
    """gigatoken, built from the text of a ``tokenizer.json`` without its special tokens.

    Attributes:
        version: of gigatoken.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self._gigatoken, self._awkward = importlib.import_module("gigatoken"), importlib.import_module("awkward")
        self.version = importlib.metadata.version("gigatoken")
        facts = json.loads(tokenizer_json)
        facts["added_tokens"] = [token for token in facts.get("added_tokens") or () if not token["special"]]
        facts["post_processor"] = facts["truncation"] = facts["padding"] = None
        self._json = json.dumps(facts)
        self._build()

    def encode_flat(
        self, bytes_: NDArray[np.uint8], offsets: NDArray[np.int64], *, threads: int | None = None
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return the ids of N texts without copying text or ids.

        Args:
            bytes_: UTF-8 of the texts.
            offsets: (N + 1,) the text n is ``bytes_[offsets[n]:offsets[n + 1]]``.
            threads: 1 stays on the calling thread; None takes the library's pool of threads.

        Returns:
            ids of all texts, and (N + 1,) where those of each begin.
        """
        results = []
        first, count = 0, len(offsets) - 1
        while first < count:
            last = int(np.searchsorted(offsets, offsets[first] + _GROUP_BYTES, "right")) - 1
            last = min(max(last, first + 1), count)
            results.append(self._encode(bytes_, offsets[first : last + 1], threads))
            first = last
        if len(results) == 1:
            return results[0]
        ids = np.concatenate([np.zeros(0, np.uint32), *(part for part, _ in results)])
        lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(starts) for _, starts in results)])
        return ids, np.concatenate([[0], np.cumsum(lengths)])

    def _encode(
        self, bytes_: NDArray[np.uint8], offsets: NDArray[np.int64], threads: int | None
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        size = int(offsets[-1] - offsets[0])
        if self._read + size > _GROUP_BYTES and _memory(self._read) - self._memory > _GROWTH_BYTES:
            self._build()
        self._read += size
        contents, index = self._awkward.contents, self._awkward.index
        chars = contents.NumpyArray(bytes_, parameters={"__array__": "char"})
        texts = contents.ListOffsetArray(index.Index64(offsets), chars, parameters={"__array__": "string"})
        layout = self._backend.encode_batch(self._awkward.Array(texts), parallel=threads != 1).layout
        starts = np.asarray(layout.offsets.data, np.int64)
        ids = np.asarray(layout.content.data)
        assert ids.dtype == np.uint32 and len(starts) == len(offsets), (ids.dtype, len(starts), len(offsets))
        return ids[starts[0] : starts[-1]], starts - starts[0]

    def _build(self) -> None:
        self._backend: Any = None  # the old one goes before the new one comes
        self._backend = self._gigatoken.Tokenizer.from_json(self._json).backend
        self._read = 0
        self._memory = _memory(0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the fast encoder may be used.

    Attributes:
        encoder: the encoder, or None.
        reason: why, or why not, in words.
    """

    encoder: FastEncoder | None
    reason: str


def for_tokenizer(tokenizer: Tokenizer, sample_texts: Sequence[str]) -> FastEncoder | None:
    """Return the fast encoder if it gives the ids of ``tokenizer``, else None; ``judge`` says why."""
    return judge(tokenizer, sample_texts).encoder


def judge(tokenizer: Tokenizer, sample_texts: Sequence[str]) -> Verdict:
    """Build the fast encoder and compare its ids with those of ``tokenizers``.

    Compared are texts chosen to differ (``probes``) and up to ``CHECK_BYTES`` of the sample, taken evenly.
    """
    try:
        encoder = FastEncoder(tokenizer.to_json())
    except ImportError:
        return Verdict(None, "gigatoken is not installed; for a faster encoder: pip install 'poise[fast]'")
    except Exception as error:  # the Rust side raises what it likes; any refusal is one
        return Verdict(None, f"gigatoken cannot read this tokenizer.json ({_first_line(error)})")
    texts = [*probes(tokenizer), *_pieces(sample_texts)]
    try:
        difference = _difference(tokenizer, encoder, texts)
    except Exception as error:
        return Verdict(None, f"gigatoken failed on a sample ({_first_line(error)})")
    if difference is not None:
        return Verdict(None, f"gigatoken {encoder.version} gives other ids than tokenizers: {difference}")
    size = sum(len(text.encode()) for text in texts)
    return Verdict(encoder, f"gigatoken {encoder.version}, same ids as tokenizers on {size:,} bytes")


def probes(tokenizer: Tokenizer) -> list[str]:
    """Return short texts on which tokenizers are known to disagree, the same ones every time."""
    rng = np.random.default_rng(0)
    texts = [
        "",
        " ",
        "\n",
        "\r\n\r\n\n  \t x \r y\r\n",
        "  two  spaces   three    and \t tab\t\t  end  ",
        "\u00a0\u2003 \u3000wide\u200b\u202f\ufeff\u0085x\u2028\u2029y",
        "don't I'll WE'VE it's 'tis ''s 's'S",
        "3.14159 1,000,000 x2y ²³ ⅷ ٣٤٥ １２３",
        "naïve café cafe\u0301 Å Å ﬁ ẞß İi ſ \u0130 ǆ",
        "日本語のテキスト、中文。한국어 ไทย हिन्दी العربية עברית",
        "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301\u0327 \U0001d49c \U0010ffff \ue000",
        "\x00\x01\x1f\x7f\x80\x9f",
        "x" * 3000,
        "=" * 1000 + "-" * 1000,
        "ab" * 1500,
        " " * 1500 + "x",
        "\n" * 700,
        "\t" * 300 + " \n" * 200,
        "$$$ ___ ++--**// !!!??? <a href='#'>&amp;</a> {}[]() \\n \\u00e9",
        "CamelCaseWord snake_case_word SHOUTING mixed123Text",
    ]
    for token in _added(tokenizer):
        texts += [token, f"a{token}b {token} c\n{token}{token}", token[:-1] + " " + token[1:]]
    alphabets = (
        list(" \t\n\r\x0b\x0c\u00a0\u2003ab1'."),
        [chr(c) for c in range(1, 0x250)],
        [chr(c) for c in range(0x250, 0x3100, 7)] + list(" \n"),
        [chr(c) for c in range(0x3000, 0x11000, 97) if not 0xD800 <= c < 0xE000] + [chr(0x1F600), " ", "\u0301"],
    )
    for alphabet in alphabets:
        texts += ["".join(rng.choice(alphabet, 400)) for _ in range(8)]
    return texts


def _added(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the special and other added tokens, at most 100 of them."""
    for token in (json.loads(tokenizer.to_json()).get("added_tokens") or ())[:100]:
        yield str(token["content"])


def _pieces(texts: Sequence[str]) -> Iterator[str]:
    """Yield beginnings of texts taken evenly from the sample, ``CHECK_BYTES`` characters or a little more."""
    want = max(1, CHECK_BYTES * len(texts) // max(1, sum(min(len(text), _PIECE) for text in texts)))
    step = max(1, -(-len(texts) // want))
    for text in texts[::step]:
        yield text[:_PIECE]


def _difference(tokenizer: Tokenizer, encoder: FastEncoder, texts: Sequence[str]) -> str | None:
    """Return where the ids of the two encoders differ first, in words."""
    reference: Callable[[Sequence[str]], Any] = tokenizer.encode_reference
    bytes_, places = record.flat(pa.array(texts, pa.string()))
    ids, offsets = encoder.encode_flat(bytes_, places)
    skipped = unfamiliar(bytes_, places)
    for number, (text, expected) in enumerate(zip(texts, reference(texts), strict=True)):
        if skipped[number]:
            continue
        got = ids[offsets[number] : offsets[number + 1]]
        if not np.array_equal(got, expected):
            same = int((got[: len(expected)] == expected[: len(got)]).cumprod().sum())
            before = tokenizer.decode(expected[:same])
            place = f"token {same} of {text[:20]!r}" if text.startswith(before) else f"a text like {text[:20]!r}"
            return f"{place} is {_ids(got, same)}, not {_ids(expected, same)} (text {text[len(before) :][:12]!r})"
    return None


def unfamiliar(bytes_: NDArray[np.uint8], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of N texts hold a character that Python's Unicode does not know, (N,).

    gigatoken 0.10 sorts the characters of Unicode 17 as letters or signs, tokenizers 0.23 as unassigned. Below U+1000
    nothing is looked at: those letters are old.
    """
    odd = np.zeros(len(offsets) - 1, bool)
    at = np.flatnonzero(bytes_[offsets[0] : offsets[-1]] >= 0xE1) + offsets[0]
    if not len(at):
        return odd
    lead = bytes_[at]
    code = lead.astype(np.int32) & np.where(lead >= 0xF0, 0x07, 0x0F)
    for number in (1, 2):
        code = code << 6 | bytes_[at + number] & 0x3F
    four = lead >= 0xF0
    code[four] = code[four] << 6 | bytes_[at[four] + 3] & 0x3F
    odd[np.searchsorted(offsets, at[_unknown()[code]], "right") - 1] = True
    return odd


@functools.cache
def _unknown() -> NDArray[np.bool_]:
    """Return which code points are unassigned."""
    letters = map(chr, range(sys.maxunicode + 1))
    return np.fromiter((unicodedata.category(c) == "Cn" for c in letters), bool, sys.maxunicode + 1)


def _memory(read: int) -> int:
    """Return the memory of this process in bytes; where the system does not tell, the text read since the build."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - called often
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError, IndexError, ValueError):
        return read


def _ids(ids: NDArray[np.uint32], at: int) -> str:
    return ", ".join(map(str, ids[at : at + 3].tolist())) or "the end"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
