"""Mask what identifies a person or opens a door: e-mail and IP addresses, card numbers, keys and tokens.

What is masked, and with what, is in ``PLACEHOLDERS``. The rules take only what can be told apart by its form:

- e-mail: ``local@domain.tld``; reserved example domains (RFC 2606) stay, as does a call such as ``a@b.dot(c)``.
- IPv4, IPv6: public addresses only (``ipaddress.is_global``): loopback, private and documentation ranges say nothing
  about anybody. Four numbers below 100 are taken for a version (``1.16.4.2``; of random addresses 2.3 % are such), so
  are four after a letter or after a slash after a letter (``Chrome/119.0.0.0``).
- card: 14 to 19 digits whole or in the groups that a brand prints, with the brand's prefix and length and the Luhn
  digit.
- secret: what its issuer marked by a prefix (AWS, GitHub, GitLab, Google, Slack, Stripe, npm, PyPI, Hugging Face) and
  PEM private keys, header to end.

**Phone numbers are not masked.** Without knowing the country no form tells them from dates, ISBNs, table rows and
serial numbers; a rule that finds most of them destroys more figures than it hides people. Names and postal addresses
need a model. So this stage is a first broom, no anonymisation.

The cost on clean text is a few byte comparisons: candidates come from vectorised tests on the flat bytes, and only
they meet a regular expression.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.core.errors import UserError, nearest
from poise.data import record
from poise.data.record import set_column

Span = tuple[int, int, str]
"""First byte, byte after the last, kind."""

PLACEHOLDERS: Final = {
    "email": "<email>",
    "ip": "<ip-address>",
    "card": "<card-number>",
    "secret": "<secret>",
}
"""What stands in the text for each kind. Short ASCII without digits, so that masking again finds nothing new."""

KINDS: Final = tuple(PLACEHOLDERS)

_LOCAL = rb"[A-Za-z0-9._%+\-]{1,64}"
_DOMAIN = rb"(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}"
_EMAIL: Final = re.compile(_LOCAL + rb"@" + _DOMAIN + rb"(?![\w(\-@]|\.\w)")
_RESERVED: Final = re.compile(rb"@(?:[\w.\-]+\.)?(?:example(?:\.(?:com|net|org))?|test|invalid|localhost)\Z", re.I)
_IPV4: Final = re.compile(rb"[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![\w\-]|\.\w)")
_IPV6: Final = re.compile(rb"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?!\w|\.\w)")
_CARD: Final = re.compile(
    rb"[0-9]{14,19}(?!\w|[.,][0-9])"
    rb"|(?:[0-9]{4}([ \-])[0-9]{4}\1[0-9]{4}\1[0-9]{4}|[0-9]{4}([ \-])[0-9]{6}\2[0-9]{5})"
    rb"(?!\w|[.,][0-9]|[ \-][0-9]{4}(?![0-9]))"
)
_FOUR_BEFORE: Final = re.compile(rb"(?<![0-9])[0-9]{4}[ ]\Z")  # a column of numbers of four digits is no card
_BRAND: Final = re.compile(
    rb"4[0-9]{15}(?:[0-9]{3})?|(?:5[1-5]|2[2-7])[0-9]{14}|3[47][0-9]{13}|6(?:011|5[0-9]{2})[0-9]{12}"
    rb"|35[0-9]{14}|3(?:0[0-5]|[68][0-9])[0-9]{11}|62[0-9]{14,17}"
)
_SECRET: Final = {
    # What its issuer publishes as the form of the key; the needle is what is looked for first.
    b"AKIA": re.compile(rb"AKIA[0-9A-Z]{16}(?![0-9A-Za-z])"),
    b"ASIA": re.compile(rb"ASIA[0-9A-Z]{16}(?![0-9A-Za-z])"),
    b"AIza": re.compile(rb"AIza[0-9A-Za-z_\-]{35}(?![0-9A-Za-z_\-])"),
    b"-----BEGIN ": re.compile(
        rb"-----BEGIN (?:[A-Z]+ ){0,2}PRIVATE KEY(?: BLOCK)?-----[^-]{40,20000}(?:-----END [A-Z ]{11,40}-----)?"
    ),
    b"github_pat_": re.compile(rb"github_pat_[0-9A-Za-z_]{60,255}"),
    b"glpat-": re.compile(rb"glpat-[0-9A-Za-z_\-]{20,64}"),
    b"xox": re.compile(rb"xox[abeoprs]-(?:[0-9A-Za-z]{8,}-)+[0-9A-Za-z]{8,}"),
    b"sk_live_": re.compile(rb"sk_live_[0-9A-Za-z]{24,128}"),
    b"pypi-AgEI": re.compile(rb"pypi-AgEI[0-9A-Za-z_\-]{50,1000}"),
}
_SHORT_SECRET: Final = re.compile(
    rb"(?:gh[pousr]_[0-9A-Za-z]{36,255}|npm_[0-9A-Za-z]{36}|hf_[A-Za-z]{34})(?![0-9A-Za-z])"
)
_LOOK_BACK: Final = 64  # longest local part of an address, RFC 5321


@dataclass(frozen=True, slots=True)
class MaskPII:
    """A stage: replace what was found by its placeholder, and count in the column ``masked``.

    ``masked`` is int32: replacements in this document. A row that is dropped already is masked all the same, for what
    is dropped is kept on disk.

    Attributes:
        kinds: what to mask, of ``KINDS``.
    """

    kinds: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(f"no kind of personal data '{kind}'{nearest(kind, KINDS)}; use {', '.join(KINDS)}")

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the batch with ``text`` masked and the column ``masked``."""
        column = batch.column("text")
        flat, offsets = record.flat(column)
        spans = find(flat, offsets, self.kinds)
        counts = np.zeros(len(column), np.int32)
        if spans:
            rows = np.searchsorted(offsets, [start for start, _, _ in spans], side="right") - 1
            np.add.at(counts, rows, 1)
            batch = set_column(batch, "text", _spliced(flat, offsets, spans))
        return set_column(batch, "masked", pa.array(counts))


def find(flat: NDArray[np.uint8], offsets: NDArray[np.int64], kinds: tuple[str, ...] = KINDS) -> list[Span]:
    """Return what would be masked in rows of text, in order and without overlaps.

    Args:
        flat: the bytes of all rows, (B,).
        offsets: where rows begin and the last ends, (N + 1,); nothing is found across rows.
        kinds: what to look for.
    """
    if len(flat) == 0:
        return []
    whole = flat.tobytes()
    found: list[Span] = []
    for kind in KINDS:
        if kind in kinds:
            found.extend((start, end, kind) for start, end in _FINDERS[kind](flat, whole, offsets))
    # A secret may contain what looks like an address: of overlapping spans the one that begins first stays.
    found.sort(key=lambda span: (span[0], -span[1]))
    kept: list[Span] = []
    for span in found:
        if not kept or span[0] >= kept[-1][1]:
            kept.append(span)
    return kept


def _emails(flat: NDArray[np.uint8], whole: bytes, offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    at = np.flatnonzero(flat == ord("@"))
    at = at[(at > 0) & (at + 4 < len(flat))]
    at = at[_LOCAL_END[flat[at - 1]] & _WORD[flat[at + 1]]]  # not a decorator, not "@ 3"
    for place, low, high in _windows(at, offsets):
        start = place
        while start > max(low, place - _LOOK_BACK) and _LOCAL_BYTE[whole[start - 1]]:
            start -= 1
        while start < place and whole[start] in b".-+%":  # an address begins with a letter or digit
            start += 1
        match = _EMAIL.match(whole, start, high)
        if match and (start == low or whole[start - 1] != ord("@")) and not _RESERVED.search(match[0]):
            yield match.span()


def _addresses(flat: NDArray[np.uint8], whole: bytes, offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    dots = np.flatnonzero(flat == ord("."))
    dots = dots[(dots > 0) & (dots + 1 < len(flat))]
    dots = dots[_DIGIT[flat[dots - 1]] & _DIGIT[flat[dots + 1]]]
    if len(dots) > 2:
        near = np.diff(dots)
        fours = dots[:-2][(near[:-1] <= 4) & (near[1:] <= 4)]
        for place, low, high in _windows(fours, offsets):
            start = place - 1
            while start > max(low, place - 4) and _DIGIT[whole[start - 1]]:
                start -= 1
            match = _IPV4.match(whole, start, high) if start >= low else None
            if match and not _is_version(whole, low, match) and _is_public(match[0]):
                yield match.span()
    colons = np.flatnonzero(flat == ord(":"))
    colons = colons[(colons >= 4) & (colons + 2 < len(flat))]
    colons = colons[_HEX[flat[colons - 1]] & ((flat[colons - 4] == ord("2")) | (flat[colons - 4] == ord("3")))]
    for place, low, high in _windows(colons, offsets):
        start = place - 4
        match = _IPV6.match(whole, start, high) if start >= low else None
        if match and (start == low or not _IPV6_BEFORE[whole[start - 1]]):
            address = match[0][:-1] if match[0].endswith(b":") and not match[0].endswith(b"::") else match[0]
            if _is_public(address):
                yield start, start + len(address)


def _cards(flat: NDArray[np.uint8], whole: bytes, offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    if len(flat) < 14:
        return
    digit = (flat - np.uint8(ord("0"))) < 10  # wraps round below "0"
    two = digit[:-1] & digit[1:]
    four = two[:-2] & two[2:]
    starts = np.flatnonzero(four[1:] & ~digit[: len(four) - 1]) + 1  # where a run of four digits or more begins
    rows = np.unique(offsets[:-1][offsets[:-1] < len(four)])
    rows = rows[four[rows] & ((rows == 0) | digit[rows - 1])]  # or a row, where the one before ends with a digit
    starts = np.concatenate([starts, rows])
    first = flat[starts]
    starts = starts[(first >= ord("2")) & (first <= ord("6")) & (starts + 14 <= len(flat))]
    after = flat[starts + 4]
    # A whole number has four digits more at 4 and at 8; a grouped one a separator at 4 and four digits after it.
    eight = (starts + 8 < len(four)) & four[np.minimum(starts + 8, len(four) - 1)]
    solid = four[np.minimum(starts + 4, len(four) - 1)] & eight
    parted = ((after == ord(" ")) | (after == ord("-"))) & four[np.minimum(starts + 5, len(four) - 1)]
    for start, low, high in _windows(starts[solid | parted], offsets):
        if start > low and _CARD_BEFORE[whole[start - 1]]:
            continue
        match = _CARD.match(whole, start, high)
        column = match and match.lastindex and _FOUR_BEFORE.search(whole, max(low, start - 6), start)
        if match and not column and _is_card(bytes(c for c in match[0] if _DIGIT[c])):
            yield match.span()


def _secrets(flat: NDArray[np.uint8], whole: bytes, offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    for needle, expression in _SECRET.items():
        places = []
        place = whole.find(needle)
        while place >= 0:
            places.append(place)
            place = whole.find(needle, place + 1)
        yield from _matches(expression, np.array(places, np.int64), whole, offsets)
    # Prefixes too short to search for one by one: from the underscore backwards.
    bars = np.flatnonzero(flat[3:] == ord("_")) + 3
    third, second, first = flat[bars - 3], flat[bars - 2], flat[bars - 1]
    three = (third == ord("g")) & (second == ord("h"))
    three |= (third == ord("n")) & (second == ord("p")) & (first == ord("m"))
    two = (second == ord("h")) & (first == ord("f"))
    starts = np.concatenate([bars[three] - 3, bars[two] - 2, np.zeros(int(whole[:3] == b"hf_"), np.int64)])
    yield from _matches(_SHORT_SECRET, starts, whole, offsets)


def _matches(
    expression: re.Pattern[bytes], places: NDArray[np.int64], whole: bytes, offsets: NDArray[np.int64]
) -> Iterator[tuple[int, int]]:
    """Yield where the expression matches at the places given, unless a word goes on there."""
    for place, low, high in _windows(places, offsets):
        if place == low or not _WORD[whole[place - 1]]:
            match = expression.match(whole, place, high)
            if match:
                yield match.span()


_FINDERS: Final[dict[str, Callable[[NDArray[np.uint8], bytes, NDArray[np.int64]], Iterator[tuple[int, int]]]]] = {
    "email": _emails,
    "ip": _addresses,
    "card": _cards,
    "secret": _secrets,
}


def _windows(places: NDArray[np.int64], offsets: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Yield each place with the first byte of its row and the byte after its last."""
    rows = np.searchsorted(offsets, places, side="right") - 1
    yield from zip(places.tolist(), offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)


def _spliced(flat: NDArray[np.uint8], offsets: NDArray[np.int64], spans: list[Span]) -> pa.StringArray:
    """Return the rows with every span replaced by its placeholder."""
    pieces: list[bytes | memoryview] = []
    view, done = flat.data, 0
    ends, growth = np.zeros(len(spans), np.int64), np.zeros(len(spans) + 1, np.int64)
    for number, (start, end, kind) in enumerate(spans):
        mask = PLACEHOLDERS[kind].encode()
        pieces += [view[done:start], mask]
        ends[number], growth[number + 1], done = end, growth[number] + len(mask) - (end - start), end
    pieces.append(view[done:])
    moved = offsets + growth[np.searchsorted(ends, offsets, side="right")]
    data = pa.py_buffer(b"".join(pieces))
    return pa.StringArray.from_buffers(len(offsets) - 1, pa.py_buffer(moved.astype(np.int32)), data)


def _is_version(whole: bytes, low: int, match: re.Match[bytes]) -> bool:
    """Tell whether four numbers with dots are rather a version."""
    start = match.start()
    before = whole[max(low, start - 2) : start]
    after_slash = before[-1:] == b"/" and _WORD[before[0]] if len(before) == 2 else False
    return (
        bool(before and _IPV4_BEFORE[before[-1]]) or after_slash or all(len(part) < 3 for part in match[0].split(b"."))
    )


def _is_public(address: bytes) -> bool:
    try:
        known = ipaddress.ip_address(address.decode())
        return known.is_global and not known.is_multicast
    except ValueError:
        return False


def _is_card(digits: bytes) -> bool:
    """Tell whether digits have a brand's prefix and length and the right check digit (Luhn)."""
    if not _BRAND.fullmatch(digits) or len(set(digits)) < 2:
        return False
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = (digit - 48) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def _members(text: str, multibyte: bool = False) -> NDArray[np.bool_]:
    """Return which of the 256 bytes are in ``text``; all above 127 too if ``multibyte``."""
    table = np.zeros(256, np.bool_)
    table[list(text.encode())] = True
    table[128:] |= multibyte
    return table


_DIGITS = "0123456789"
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DIGIT: Final = _members(_DIGITS)
_HEX: Final = _members(_DIGITS + "abcdefABCDEF")
_WORD: Final = _members(_DIGITS + _LETTERS, multibyte=True)
_LOCAL_BYTE: Final = _members(_DIGITS + _LETTERS + "._%+-")
_LOCAL_END: Final = _members(_DIGITS + _LETTERS + "_%+-")
_IPV4_BEFORE: Final = _members(_DIGITS + _LETTERS + "_.-", multibyte=True)
_IPV6_BEFORE: Final = _members(_DIGITS + _LETTERS + "_:.-", multibyte=True)
_CARD_BEFORE: Final = _members(_DIGITS + _LETTERS + "_.,-+#/", multibyte=True)
