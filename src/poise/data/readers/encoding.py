"""Bytes to text: which encoding, what is repaired, what is refused. Everything that is changed is counted.

The rule, in order:

1. A byte-order mark says UTF-8, UTF-16 or UTF-32.
2. NUL bytes at only the even or only the odd places, at least 30 % of those, and all is printable as UTF-16: UTF-16
   without a mark (of a language with Latin letters).
3. Valid UTF-8 is UTF-8.
4. The file names its encoding in its first lines (XML, HTML, ``coding:``), and the bytes are valid in that.
5. No control characters, and bytes above 127 that are hardly ever valid UTF-8, all defined in cp1252, few beside the
   ASCII ones, and nearly all of them letters inside words that also have ASCII letters (or typographic marks): cp1252,
   which holds Latin-1. The languages of Central Europe and Turkish can be mistaken for it.
6. Else UTF-8 with U+FFFD for what is invalid; if that is more than 30 %, or 5 % and over 16 bytes, it is not used.

Steps 3 to 6 are decided for each document alone, so files put together from different encodings are read right.
"""

from __future__ import annotations

import codecs
import re
from typing import Final, NamedTuple

from poise.data.readers.document import Tally

HEAD: Final = 64 * 2**10
"""Bytes looked at to tell text from other files."""

_INVALID_SHARE: Final = 0.30
_INVALID_SHARE_OF_MANY: Final = 0.05  # a few bad bytes in a short line say little
_MANY: Final = 16
_NUL_SHARE: Final = 0.3
_LEAST_NULS: Final = 4
_BINARY_CONTROLS: Final = 0.10  # random bytes have 10 % of them beside 50 % invalid ones; text has none
_DOUBTFUL: Final = 0.001  # control characters and invalid bytes, both: compiled code, message catalogues

_LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")
# Backspace and escape occur in manuals and logs, so they are no sign of a binary file, but they are no text either.
_STRANGE: Final = bytes(byte for byte in range(32) if byte not in b"\t\n\r\f\b\x1b")
_CONTROLS: Final = tuple(chr(code) for code in range(1, 32) if chr(code) not in "\t\n\r\f")
_CONTROL: Final = re.compile("[" + "".join(_CONTROLS) + "]")
_SHORT: Final = 4096
_REMOVE: Final = dict.fromkeys(map(ord, _CONTROLS))
_MARKS: Final = (
    (b"\xff\xfe\0\0", "utf-32-le"),
    (b"\0\0\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
_MAGIC: Final = (
    (0, b"%PDF-"),
    (0, b"\x7fELF"),
    (0, b"\x89PNG"),
    (0, b"\xff\xd8\xff"),
    (0, b"GIF8"),
    (0, b"PK\x03\x04"),
    (0, b"\x1f\x8b\x08"),
    (0, b"BZh"),
    (0, b"\xfd7zXZ"),
    (0, b"\x28\xb5\x2f\xfd"),
    (0, b"SQLite format 3\0"),
    (0, b"PAR1"),
    (0, b"ARROW1"),
    (0, b"\xde\x12\x04\x95"),
    (0, b"!<arch>\n"),
    (257, b"ustar"),
)

_NAMED: Final = re.compile(
    rb"(?:encoding\s*=\s*[\"']?|charset\s*=\s*[\"']?|coding[:=]\s*)([A-Za-z][A-Za-z0-9_-]{2,20})"
)
_NAMED_WITHIN: Final = 1024
# Encodings that add something to UTF-8 and whose bytes for newline and space mean nothing else inside a character.
_LEGACY: Final = re.compile(
    "iso8859-[0-9]+|cp(125[0-8]|437|850|852|855|862|864|866|874|932|949|950)|koi8-[rtu]|mac-[a-z]+|ptcp154|tis-620"
    "|shift_jis|euc_(jp|kr)|gb2312|gbk|gb18030|big5|johab"
)

_ASCII: Final = bytes(range(128))
_UTF8: Final = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_UNDEFINED_1252: Final = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")
_LETTERS_1252: Final = rb"\xc0-\xd6\xd8-\xf6\xf8-\xff\x8a\x8c\x8e\x9a\x9c\x9e\x9f\xaa\xba"
_WORD_1252: Final = re.compile(rb"[A-Za-z" + _LETTERS_1252 + rb"]*[A-Za-z][A-Za-z" + _LETTERS_1252 + rb"]*")
# Quotation marks, dashes, dots, the euro, no-break space, section and degree signs, fractions, ...: marks of prose.
_SIGNS_1252: Final = re.compile(
    rb"[\x80\x82\x84-\x87\x8b\x91-\x97\x99\x9b\xa0-\xa3\xa7\xa9\xab\xad\xae\xb0-\xb3\xb7\xbb-\xbf]"
)
_SIGN_IN_WORD: Final = re.compile(rb"(?<=[A-Za-z])[\xa1-\xa9\xac\xae-\xb1\xb3\xb9\xbb-\xbf](?=[A-Za-z])")
_MOST_ABOVE_ASCII: Final = 0.35
_GOOD_1252: Final = 0.9

# UTF-8 read as cp1252: the characters that the bytes C2-F4 and 80-BF become (undefined ones stay C1 controls).
_AS_1252: Final = "".join(
    bytes([byte]).decode("cp1252") if byte not in b"\x81\x8d\x8f\x90\x9d" else chr(byte) for byte in range(256)
)
_BACK: Final = {ord(character): byte for byte, character in enumerate(_AS_1252)}


def _some(first: int, last: int) -> str:
    return "[" + "".join(re.escape(character) for character in _AS_1252[first : last + 1]) + "]"


_MOJIBAKE: Final = re.compile(
    f"{_some(0xC2, 0xDF)}{_some(0x80, 0xBF)}|{_some(0xE0, 0xEF)}{_some(0x80, 0xBF)}{{2}}"
    f"|{_some(0xF0, 0xF4)}{_some(0x80, 0xBF)}{{3}}"
)
_LEAST_MOJIBAKE: Final = 3


class Text(NamedTuple):
    """Decoded bytes: the text, the bytes replaced by U+FFFD, and the encoding if it was not UTF-8."""

    text: str
    replaced: int
    encoding: str | None


def decode(raw: bytes) -> tuple[str, int]:
    r"""Return UTF-8 bytes as text, and how many bytes were invalid and became U+FFFD.

    >>> decode(b"caf\xc3\xa9 \xff\xfe!")
    ('café ��!', 2)
    """
    try:
        return raw.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = raw.decode("utf-8", "replace")
    # A genuine U+FFFD in the input is EF BF BD and is not a replacement.
    marks = text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")
    return text, len(raw) - (len(text.encode("utf-8")) - 3 * marks)


def read(raw: bytes, named: str | None = None) -> Text:
    r"""Return bytes as text by steps 3 to 6 of the rule; ``named`` is the encoding the file names.

    >>> read("Über den Flüssen".encode("cp1252"))
    Text(text='Über den Flüssen', replaced=0, encoding='cp1252')
    """
    try:
        return Text(raw.decode("utf-8"), 0, None)
    except UnicodeDecodeError:
        pass
    if named:
        try:
            return Text(raw.decode(named), 0, named)
        except UnicodeDecodeError:
            pass
    if is_cp1252(raw):
        return Text(raw.decode("cp1252"), 0, "cp1252")
    text, replaced = decode(raw)
    return Text(text, replaced, None)


def named(head: bytes) -> str | None:
    r"""Return the encoding that the first lines of a file name, if it is one of the older ones (step 4).

    >>> named(b'<?xml version="1.0" encoding="windows-1251"?>'), named(b"# -*- coding: utf-8 -*-")
    ('cp1251', None)
    """
    match = _NAMED.search(head[:_NAMED_WITHIN])
    if match is None:
        return None
    try:
        name = codecs.lookup(match[1].decode("ascii")).name
    except LookupError:
        return None
    return name if _LEGACY.fullmatch(name) else None


def is_cp1252(raw: bytes) -> bool:
    """Say whether bytes that are not valid UTF-8 are text in cp1252 (step 5 of the rule)."""
    if _UNDEFINED_1252.search(raw) or len(raw) != len(raw.translate(None, _STRANGE)):
        return False
    above = len(raw) - len(raw.translate(None, bytes(range(128, 256))))
    valid = sum(map(len, _UTF8.findall(raw)))
    letters = len(raw.translate(None, b" \t\r\n\f"))
    if above == 0 or 10 * valid > above or above > _MOST_ABOVE_ASCII * letters:
        return False
    in_words = sum(len(word.translate(None, _ASCII)) for word in _WORD_1252.findall(raw))
    outside = _WORD_1252.sub(b" ", raw)
    signs = len(_SIGNS_1252.findall(outside)) - 2 * len(_SIGN_IN_WORD.findall(raw))
    # A document of signs alone says too little.
    return in_words > 0 and in_words + signs >= _GOOD_1252 * above


def wide(head: bytes) -> str | None:
    r"""Return the encoding if the beginning of a file is UTF-16 or UTF-32 (steps 1 and 2 of the rule).

    >>> wide("plain".encode("utf-16-be")), wide(b"plain"), wide(b"\0\1\2\3\4\5\6\7")
    ('utf-16-be', None, None)
    """
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    if len(head) < 8 or b"\0" not in head:
        return None
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if min(even, odd) > 0 or max(even, odd) < max(_LEAST_NULS, _NUL_SHARE * len(head) / 2):
        return None
    name = "utf-16-le" if odd else "utf-16-be"
    try:
        text = head[: len(head) // 2 * 2].decode(name)
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return None
        text = head[: error.start].decode(name)
    return name if all(character.isprintable() or character in "\t\n\r\f" for character in text) else None


def why_not_text(raw: bytes, text: Text, first: bool) -> str:
    """Return why decoded bytes are no text, or an empty string; ``first`` if they begin a file."""
    if first and any(raw.startswith(magic, at) for at, magic in _MAGIC):
        return "binary file"
    strange = len(raw) - len(raw.translate(None, _STRANGE))
    invalid = text.replaced > _DOUBTFUL * len(raw)
    if strange > (_DOUBTFUL if invalid else _BINARY_CONTROLS) * len(raw):
        return "binary file"
    return "file in an unknown encoding" if is_unknown(raw, text) else ""


def is_unknown(raw: bytes, text: Text) -> bool:
    """Say whether so much was replaced that the bytes are in some encoding that is not known (step 6)."""
    share = _INVALID_SHARE_OF_MANY if text.replaced > _MANY else _INVALID_SHARE
    return text.replaced > share * len(raw)


def clean(text: str) -> tuple[str, int]:
    r"""Replace lone surrogates (JSON can hold them, UTF-8 cannot); return the text and the bytes replaced.

    >>> clean("a\ud800")
    ('a�', 3)
    """
    if text.isascii():
        return text, 0
    try:
        text.encode("utf-8")  # three times as fast as a search
    except UnicodeEncodeError:
        pass
    else:
        return text, 0
    text, count = _LONE_SURROGATE.subn("\ufffd", text)
    return text, 3 * count


def tidy(text: str, tally: Tally) -> str:
    r"""Remove NULs and control characters (all of C0 but tab, newlines and form feed), make CR LF one LF; count.

    >>> tally = Tally()
    >>> tidy("a\0b\r\nc\x1b", tally), dict(tally.removed)
    ('ab\nc', {'NUL': 1, 'control character': 1, 'CR of CR LF': 1})
    """
    if "\0" in text:
        tally.removed["NUL"] += text.count("\0")
        text = text.replace("\0", "")
    # A search for each of them is four times as fast as one regular expression for all, but starts more slowly.
    short = len(text) < _SHORT
    if _CONTROL.search(text) if short else any(control in text for control in _CONTROLS):
        less = text.translate(_REMOVE)
        tally.removed["control character"] += len(text) - len(less)
        text = less
    if "\r\n" in text:
        tally.removed["CR of CR LF"] += text.count("\r\n")
        text = text.replace("\r\n", "\n")
    return text


def repair(text: str) -> str:
    r"""Turn UTF-8 that was read as cp1252 back, if that is nearly all of the text above ASCII; else return it as it is.

    Only whole, valid sequences are turned back; there must be three, and at least nine in ten of the characters above
    ASCII must be in one. So a text about mojibake, or one damaged here and there, stays as it is.

    >>> repair("naÃ¯ve, cafÃ©, hÃ´tel")
    'naïve, café, hôtel'
    """
    if text.isascii():
        return text
    found = _MOJIBAKE.findall(text)
    above = len(text) - len(text.encode("ascii", "ignore"))
    if len(found) < _LEAST_MOJIBAKE or sum(map(len, found)) < _GOOD_1252 * above:
        return text
    return _MOJIBAKE.sub(_back, text)


def _back(match: re.Match[str]) -> str:
    try:
        return bytes(_BACK[ord(character)] for character in match[0]).decode("utf-8")
    except UnicodeDecodeError:
        return match[0]
