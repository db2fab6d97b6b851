"""Spans of tokens in which an n-gram repeats many times over: the one property of text with a proven link to spikes.

Source: OLMo Team, "2 OLMo 2 Furious", 2024 (arXiv 2501.00656), section 3.1: sequences with 32 or more repeats of an
n-gram of 1 to 13 tokens cause spikes of the gradient norm, and masking their loss removes most of them. Here the
spans are found once, on whole documents and on the tokens that are really trained on; which of them count is decided
later, for the window a model is trained with (``counted``).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from poise.data.tokens.tokenizer import Tokenizer

MAX_PERIOD: Final = 13
"""Longest n-gram looked for, in tokens."""

MIN_COUNT: Final = 8
"""Repeats from which a span is written down; what counts in training is ``threshold``, never below this."""

FULL_COUNT: Final = 32
"""Repeats from which a span counts where the window is long enough to show them."""

REPEAT: Final = np.dtype(
    [("start", "<i8"), ("length", "<i4"), ("count", "<i4"), ("period", "<i2"), ("blank", "?")], align=False
)
"""One span. ``start``: position of its first token; ``length``: tokens of the whole run, the last repeat may be
cut off; ``count``: whole repeats, ``length // period``; ``period``: tokens of the n-gram, the smallest that fits;
``blank``: every token of the n-gram decodes to white space only."""

_SAMPLES: Final = 4  # positions of a shortest run that are looked at first


def find(
    ids: NDArray[np.unsignedinteger],
    ends: NDArray[np.int64],
    *,
    max_period: int = MAX_PERIOD,
    min_count: int = MIN_COUNT,
    blank_ids: NDArray[np.integer] | None = None,
) -> NDArray[np.void]:
    """Return the maximal runs in which an n-gram of at most ``max_period`` tokens repeats ``min_count`` times.

    Runs are reported once, with their smallest period, and never reach over the end of a document. A run inside
    another one (eight equal tokens inside an n-gram of nine that repeats itself) is left out, so the starts and the
    ends of the result both increase strictly; neighbours may still share fewer than ``2 * max_period`` tokens.

    Args:
        ids: (N,) tokens of whole documents, one after another.
        ends: (documents,) position after each document's last token; the last one is N.
        max_period: longest n-gram, in tokens.
        min_count: repeats of the n-gram, at least 2.
        blank_ids: ids that decode to white space (``Tokenizer.blank_ids``); None marks nothing as blank.

    Returns:
        (R,) of dtype ``REPEAT``, in order of ``start``.
    """
    assert ids.ndim == 1 and max_period >= 1 and min_count >= 2, (ids.shape, max_period, min_count)
    assert (ends[-1] if len(ends) else 0) == len(ids), (len(ids), ends[-1:])
    ends = np.asarray(ends, np.int64)
    starts, stops, periods = [], [], []
    for period in range(1, min(max_period, len(ids) // min_count) + 1):
        first, last = _split(*_runs(ids, period, period * (min_count - 1)), ends)
        long = last - first >= period * min_count
        starts.append(first[long])
        stops.append(last[long])
        periods.append(np.full(np.count_nonzero(long), period, np.int64))
    if not starts:
        return np.zeros(0, REPEAT)
    start, stop, period_R = np.concatenate(starts), np.concatenate(stops), np.concatenate(periods)
    # Two runs that share enough tokens are one run of a smaller period (Fine and Wilf 1965), and then they are equal:
    # longest first and smallest period first, all that reach no further than an earlier one are inside it.
    order = np.lexsort((period_R, -stop, start))
    start, stop, period_R = start[order], stop[order], period_R[order]
    reached = np.maximum.accumulate(stop)
    fresh = np.ones(len(stop), bool)
    fresh[1:] = stop[1:] > reached[:-1]
    repeats = np.zeros(np.count_nonzero(fresh), REPEAT)
    repeats["start"], repeats["period"] = start[fresh], period_R[fresh]
    repeats["length"] = stop[fresh] - start[fresh]
    repeats["count"] = repeats["length"] // repeats["period"]
    if blank_ids is not None and len(repeats):
        repeats["blank"] = _blank(ids, repeats, blank_ids)
    return repeats


def threshold(seq_len: int) -> int:
    """Return how often an n-gram must repeat to count in training with windows of ``seq_len`` tokens.

    32 (OLMo 2) where the window can show 32 repeats of the longest n-gram, 416 tokens. A shorter window would be
    blind to the longer n-grams, so there the count is what it can show of them, ``seq_len // 13``, and at least 8.
    """
    return max(MIN_COUNT, min(FULL_COUNT, seq_len // MAX_PERIOD))


def counted(repeats: NDArray[np.void], seq_len: int) -> NDArray[np.bool_]:
    """Return which spans count in training with windows of ``seq_len`` tokens: often enough, and not white space.

    White space is exempt because it says more about the vocabulary than about the text: one without tokens for runs
    of blanks repeats a token wherever text is indented.
    """
    return np.asarray((repeats["count"] >= threshold(seq_len)) & ~repeats["blank"])


def covered(repeats: NDArray[np.void]) -> NDArray[np.int64]:
    """Return how many tokens each span covers that no earlier span covers, (R,); their sum counts no token twice."""
    stop = repeats["start"] + repeats["length"]
    result = repeats["length"].astype(np.int64)
    result[1:] -= np.maximum(stop[:-1] - repeats["start"][1:], 0)
    return result


def per_document(
    repeats: NDArray[np.void], ends: NDArray[np.int64], chosen: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return for each document the largest count of a span in it, and the tokens its spans cover, both (documents,).

    Args:
        repeats: from ``find``.
        ends: position after each document's last token.
        chosen: (R,) spans to look at, e.g. ``counted``; None for all.
    """
    repeats = repeats if chosen is None else repeats[chosen]
    document = np.searchsorted(ends, repeats["start"], "right")
    count = np.zeros(len(ends), np.int32)
    np.maximum.at(count, document, repeats["count"])
    tokens = np.bincount(document, covered(repeats), minlength=len(ends))
    return count, tokens.astype(np.int32)


def mask(repeats: NDArray[np.void], start: int, length: int) -> NDArray[np.bool_]:
    """Return which of the positions ``start`` to ``start + length`` lie in a span, (length,)."""
    first = int(np.searchsorted(repeats["start"] + repeats["length"], start, "right"))
    last = int(np.searchsorted(repeats["start"], start + length, "left"))
    inside = np.zeros(length, bool)
    for repeat in repeats[first:last]:
        low = int(repeat["start"]) - start
        inside[max(0, low) : max(0, low + int(repeat["length"]))] = True
    return inside


def report(
    repeats: NDArray[np.void],
    tokenizer: Tokenizer,
    ids: NDArray[np.unsignedinteger],
    ends: NDArray[np.int64] | None = None,
    *,
    seq_len: int | None = None,
    top: int = 20,
) -> dict[str, Any]:
    """Return what repeats, with its text, and whether the text or the vocabulary is to blame.

    Args:
        repeats: from ``find``.
        tokenizer: whose ids they are.
        ids: (N,) the tokens that ``repeats`` points into; a memory map is read at the spans only.
        ends: (documents,) as for ``find``; without it no shares of documents are told.
        seq_len: the window trained with, for ``threshold``; None for the full count of 32.
        top: n-grams listed, those that cover most tokens first.

    Returns:
        ``threshold``; ``spans``, ``tokens`` (each once), ``blank_spans``, ``blank_tokens`` of the spans with that many
        repeats; ``ngrams``: for each n-gram its ids, text, blank or not, spans and tokens (rotations of an n-gram are
        one); ``documents``, and the share of them with a span: ``flagged`` when white space is exempt, and
        ``flagged_with_blank``; ``warnings`` in words.
    """
    least = FULL_COUNT if seq_len is None else threshold(seq_len)
    often = repeats[repeats["count"] >= least]
    blank = often["blank"]
    tokens = covered(often)
    result: dict[str, Any] = {
        "threshold": least,
        "spans": len(often),
        "tokens": int(tokens.sum()),
        "blank_spans": int(blank.sum()),
        "blank_tokens": int(tokens[blank].sum()),
        "ngrams": _ngrams(often, tokens, tokenizer, ids)[:top],
    }
    if ends is not None:
        result["documents"] = len(ends)
        for name, chosen in (("flagged", ~blank), ("flagged_with_blank", np.ones(len(often), bool))):
            found = np.unique(np.searchsorted(ends, often["start"][chosen], "right"))
            result[name] = round(len(found) / len(ends), 6) if len(ends) else 0.0
    return result | {"warnings": _warnings(result)}


def _ngrams(
    repeats: NDArray[np.void], tokens: NDArray[np.int64], tokenizer: Tokenizer, ids: NDArray[np.unsignedinteger]
) -> list[dict[str, Any]]:
    """Return spans and tokens of each n-gram, the one with most tokens first."""
    found: dict[tuple[int, ...], list[int]] = {}
    starts, periods = repeats["start"].tolist(), repeats["period"].tolist()
    for start, period, size in zip(starts, periods, tokens.tolist(), strict=True):
        gram = tuple(ids[start : start + period].tolist())
        gram = min(gram[k:] + gram[:k] for k in range(period))  # where a run begins is chance
        spans = found.setdefault(gram, [0, 0])
        spans[0] += 1
        spans[1] += size
    blank = set(tokenizer.blank_ids.tolist())
    rows = sorted(found.items(), key=lambda item: (-item[1][1], item[0]))
    return [
        {
            "ids": list(gram),
            "text": tokenizer.decode(gram),
            "blank": blank.issuperset(gram),
            "spans": spans,
            "tokens": size,
        }
        for gram, (spans, size) in rows
    ]


def _warnings(report: dict[str, Any]) -> list[str]:
    """Return what a user should know, in words."""
    lines = []
    worst = report["ngrams"][0] if report["ngrams"] else None
    if worst and worst["blank"] and len(worst["ids"]) == 1 and worst["tokens"] > report["tokens"] / 2:
        share = worst["tokens"] / report["tokens"]
        flagged = f"; it flags {report['flagged_with_blank']:.1%} of documents" if "documents" in report else ""
        lines.append(
            f"{share:.0%} of the repeated tokens are id {worst['ids'][0]} ({worst['text']!r}), white space{flagged}: "
            "the tokenizer causes it, it has no tokens for longer blanks; such spans are not masked"
        )
    rest = report["tokens"] - report["blank_tokens"]
    text = next((gram for gram in report["ngrams"] if not gram["blank"]), None)
    if text and rest:
        flagged = f", in {report['flagged']:.2%} of documents" if "documents" in report else ""
        lines.append(
            f"{report['spans'] - report['blank_spans']:,} spans repeat an n-gram {report['threshold']} times or more: "
            f"{rest:,} tokens{flagged}; most often {text['text'][:40]!r}"
        )
    return lines


def _runs(ids: NDArray[np.unsignedinteger], period: int, shortest: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return start and stop of all maximal runs with ``shortest`` or more tokens equal to the one ``period`` before."""
    now, before = ids[period:], ids[:-period]
    # A run of that length holds _SAMPLES consecutive multiples of the step, so looking at those excludes nearly all.
    samples = min(_SAMPLES, shortest)
    step = shortest // samples
    first, last = _alike(now[::step] == before[::step], samples)
    # The run lies strictly between the unequal samples before and after.
    low = np.maximum((first - 1) * step + 1, 0)
    high = np.minimum(last * step, len(now))
    size = high - low
    if size.sum() > len(now) // 4:
        start, stop = _stretches(now != before, shortest)
        return start, stop + period
    gathered = np.concatenate([np.zeros(0, np.int64), np.cumsum(size + 1)])
    owner = np.repeat(np.arange(len(size)), size + 1)
    at = np.arange(len(owner)) - np.concatenate([[0], gathered[:-1]]).astype(np.int64)[owner] + low[owner]
    unequal = np.ones(len(at), bool)  # the place after each stretch separates it from the next
    inside = at < high[owner]
    unequal[inside] = now[at[inside]] != before[at[inside]]
    start, stop = _stretches(unequal, shortest)
    return at[start], at[stop - 1] + 1 + period


def _alike(equal: NDArray[np.bool_], shortest: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return start and stop of the stretches of at least ``shortest`` true places, cheap where they are rare."""
    count = max(len(equal) - shortest + 1, 0)
    all_equal = equal[:count].copy()
    for shift in range(1, shortest):
        all_equal &= equal[shift : shift + count]
    at = np.flatnonzero(all_equal)
    gap = np.diff(at) > 1
    return at[np.append(True, gap)[: len(at)]], at[np.append(gap, True)[: len(at)]] + shortest


def _stretches(breaks: NDArray[np.bool_], shortest: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return start and stop of the stretches of at least ``shortest`` places without a break."""
    at = np.flatnonzero(breaks)
    start = np.concatenate([[0], at + 1])
    stop = np.concatenate([at, [len(breaks)]])
    long = stop - start >= shortest
    return start[long], stop[long]


def _split(
    start: NDArray[np.int64], stop: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut runs at the ends of documents."""
    first = np.searchsorted(ends, start, "right")  # the document of the first token
    last = np.searchsorted(ends, stop - 1, "right")
    pieces = last - first + 1
    owner = np.repeat(np.arange(len(start)), pieces)
    document = np.arange(len(owner)) - (np.cumsum(pieces) - pieces)[owner] + first[owner]
    begins = np.where(document > 0, ends[document - 1], 0)
    return np.maximum(start[owner], begins), np.minimum(stop[owner], ends[document])


def _blank(
    ids: NDArray[np.unsignedinteger], repeats: NDArray[np.void], blank_ids: NDArray[np.integer]
) -> NDArray[np.bool_]:
    """Return which spans repeat white space only."""
    period = repeats["period"].astype(np.int64)
    at = repeats["start"][:, None] + np.minimum(np.arange(period.max()), period[:, None] - 1)
    return np.asarray(np.isin(ids[at], blank_ids).all(axis=1))
