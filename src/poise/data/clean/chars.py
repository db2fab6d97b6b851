"""Classes of characters as bits for UTF-8 bytes: one table look-up a byte, decoding only what is not ASCII.

The classes follow Python's ``str`` methods and ``unicodedata``, so that ``isalpha`` and ``isspace`` of the standard
library are the definition. A character's class stands at its first byte; white space and sentence ends are marked on
all bytes of the character, so that both ends of a word or line can be tested.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

SPACE: Final = 1
"""White space: ``str.isspace``."""
LETTER: Final = 2
"""``str.isalpha``."""
DIGIT: Final = 4
"""A decimal digit of any script: ``str.isdecimal``."""
PLAIN: Final = 8
"""Neither white space nor punctuation, symbol or control character: what makes a word more than a symbol."""
INNER: Final = 16
"""Not the first byte of its character."""
TERMINAL: Final = 32
"""Ends a sentence in some script: . ? ! and their like."""
LOWER: Final = 64
"""``str.islower``."""
CLOSER: Final = 128
"""A closing quote or bracket in ASCII, which may follow the end of a sentence."""

# Unicode 16, PropList.txt, Sentence_Terminal, in hexadecimal.
_TERMINAL_RANGES: Final = """
21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736
17d4-17d5 1803 1809 1944-1945 1aa8-1aab 1b4e-1b4f 1b5a-1b5b 1b5e-1b5f 1b7d-1b7f 1c3b-1c3c 1c7e-1c7f 2024
203c-203d 2047-2049 2cf9-2cfb 2e2e 2e3c 2e53-2e54 2e60-2e61 3002 a4ff a60e-a60f a6f3 a6f7 a876-a877
a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb fe12 fe15-fe16 fe52 fe56-fe57 ff01 ff0e ff1f ff61
10a56-10a57 10f55-10f59 10f86-10f89 11047-11048 110be-110c1 11141-11143 111c5-111c6 111cd 111de-111df
11238-11239 1123b-1123c 112a9 113d4-113d5 1144b-1144c 115c2-115c3 115c9-115d7 11641-11642 1173c-1173e 11944
11946 11a42-11a43 11a9b-11a9c 11c41-11c42 11ef7-11ef8 11f43-11f44 16a6e-16a6f 16af5 16b37-16b38 16b44
16d6e-16d6f 16e98 1bc9f 1da88
"""
_CLOSERS: Final = "\"')]}"
_ALL_CODES: Final = 0x110000
_LETTER_BLOCKS: Final = ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0x20000, 0x2A6E0), (0x30000, 0x3134B))
_LAST_LOOKED_AT: Final = 0x323B0


def _class_of(char: str) -> int:
    bits = SPACE if char.isspace() else 0
    bits |= LETTER if char.isalpha() else 0
    bits |= DIGIT if char.isdecimal() else 0
    bits |= LOWER if char.islower() else 0
    bits |= CLOSER if char in _CLOSERS else 0
    return bits | (PLAIN if unicodedata.category(char)[0] in "LMN" else 0)


@cache
def byte_classes() -> NDArray[np.uint8]:
    """Return the class of every ASCII byte, 0 for the others but ``INNER``, (256,)."""
    table = np.zeros(256, np.uint8)
    table[:128] = code_classes()[:128]
    table[0x80:0xC0] = INNER
    table.flags.writeable = False
    return table


@cache
def code_classes() -> NDArray[np.uint8]:
    """Return the class of every code point, (0x110000,); made once a process, in some tens of milliseconds."""
    table = np.zeros(_ALL_CODES, np.uint8)
    at = 0
    for first, end in (*_LETTER_BLOCKS, (_LAST_LOOKED_AT, _ALL_CODES)):
        if first > at:
            table[at:first] = [_class_of(chr(code)) for code in range(at, first)]
        if first < _LAST_LOOKED_AT:
            table[first:end] = LETTER | PLAIN
        at = end
    table[0xE0100:0xE01F0] = PLAIN  # variation selectors: marks
    for group in _TERMINAL_RANGES.split():
        first_code, _, last_code = group.partition("-")
        table[int(first_code, 16) : int(last_code or first_code, 16) + 1] |= TERMINAL
    table.flags.writeable = False
    return table


def classes(bytes_N: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the class bits of every byte of valid UTF-8, (N,).

    >>> marks = classes(np.frombuffer("é. ".encode(), np.uint8))
    >>> [bool(m & LETTER) for m in marks], [bool(m & SPACE) for m in marks]
    ([True, False, False, False], [False, False, False, True])
    """
    marks_N = np.take(byte_classes(), bytes_N)
    leads_C = np.flatnonzero(bytes_N >= 0xC0)
    if len(leads_C) == 0:
        return marks_N
    last = len(bytes_N) - 1
    code_C, size_C = _decode(bytes_N, leads_C, last)
    class_C = code_classes()[code_C]
    marks_N[leads_C] = class_C
    both_C = class_C & (SPACE | TERMINAL)
    chosen = np.flatnonzero(both_C)  # few: most characters are neither
    for step in (1, 2, 3):
        chosen = chosen[size_C[chosen] > step]
        marks_N[np.minimum(leads_C[chosen] + step, last)] |= both_C[chosen]
    return marks_N


def _decode(
    bytes_N: NDArray[np.uint8], leads_C: NDArray[np.int64], last: int
) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
    """Return code point and size in bytes of the characters that begin at ``leads_C``."""
    lead_C = bytes_N[leads_C].astype(np.int32)
    size_C = (2 + (lead_C >= 0xE0).astype(np.int8) + (lead_C >= 0xF0)).astype(np.int8)
    code_C = lead_C & np.array([0, 0, 0x1F, 0x0F, 0x07], np.int32)[size_C]
    for step in (1, 2, 3):
        rows = slice(None) if step == 1 else np.flatnonzero(size_C > step)
        inner = bytes_N[np.minimum(leads_C[rows] + step, last)] & 0x3F
        code_C[rows] = (code_C[rows] << 6) | inner
    return np.minimum(code_C, _ALL_CODES - 1), size_C
