"""Which language a document is in: a rough guess by script and function words, or ``py3langid`` if asked for.

The rough guess needs no model and no download. It counts letters by script, read off the first bytes of UTF-8
characters; a script that one of our languages owns decides by itself. Among languages that share Latin, Cyrillic or
Arabic letters the function words decide (``_WORDS``: the few dozen shortest and commonest; a word that several
languages have counts for each in part). It is meant for documents of a paragraph or more. What it cannot do: tell
Norwegian from Danish, or Croatian from Slovene, reliably on short text; know a language that is not in ``LANGUAGES``
(it calls it ``und`` or its nearest relative); read code, of which it sees the comments (nearly always ``en``).

Measured on 676 translated manual pages in 23 languages (those that it and py3langid 0.4 both call English left out):
right on 94 %, py3langid on 99 %; on pieces of 400 characters 91 % and 98 %. Nearly all its errors call a page English
that is half English. It reads 150 MB of code a processor second, py3langid under 5.

Only a sample of a long document is looked at: three pieces of ``SAMPLE // 3`` bytes from its begin, middle and end.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.core.errors import UserError, nearest
from poise.data import record
from poise.data.record import drop, set_column

UNDETERMINED: Final = "und"
"""The language of a text that has none or none that is known (ISO 639-2)."""

SAMPLE: Final = 12 * 1024
"""Bytes of a document that are looked at, at most."""

MODELS: Final = ("rough", "py3langid")

_SURE: Final = 0.15  # share of function words from which more of them make the guess no surer
_LEAST: Final = 0.02  # share of function words under which it is no running text of that language
_QUOTED: Final = 0.25  # share of letters under which a script is a name or a quotation in a text of something else

# At most 8 bytes of UTF-8 a word: a word is compared as one 64-bit number.
_WORDS: Final = {
    "en": "the of and to in is that for it with as was on be are this by at from or an not have which you but has they "
    "were will can if its their more when",
    "de": "der die und das den von zu mit ist des im für auf nicht ein eine dem sich als auch es an werden aus er bei "
    "oder nach wird einer um wie nur zum zur sie dass",
    "fr": "le la les de des et est du que un une dans pour qui sur par pas au avec ce il plus sont ne se ou cette être "
    "aux en vous si",
    "es": "el la los las de que y en un una por con para no se del es al lo como más su o este si son pero ser esta",
    "pt": "o a os as de que e do da em um uma para com não no na por se dos das ao é mais como ou ser são pelo esta",
    "it": "il la di che e non per un una del della in con si sono i le da al come più dei nel gli lo è questo alla "
    "viene se o",
    "ca": "el la els les de i que en un una per amb no es del al és com més o són aquest ha si",
    "nl": "de het een van en in is dat op te zijn voor met die niet aan er om ook als door naar bij uit wordt worden "
    "deze of",
    "sv": "och att det i en som är på för av med den till inte ett om har de kan från eller ska vid",
    "da": "og at det i en som er på for af med den til ikke et om har de kan fra eller skal ved efter bliver hvis",
    "nb": "og å det i en som er på for av med den til ikke et om har de kan fra eller skal ved etter blir hvis",
    "fi": "ja on ei se että joka ovat tai jos kun myös mutta voi sen niin kuin ole hän sitä tämä",
    "pl": "i w na z do nie się jest to że o od dla po jak ze lub przez za są oraz tym być ten",
    "cs": "a v na je se že s z do o pro k jako nebo pokud jsou by být ale po od si tak který není lze",
    "sk": "a v na je sa že s z do o pre k ako alebo sú by byť ale po od ktorý nie",
    "hr": "i u je na se da za od su s ne ili koji kao što bi nije to iz ako koje ovaj",
    "sl": "in je na se da za so ne ali kot pa ki s z tudi bo ni če od lahko",
    "hu": "a az és hogy nem is egy ha van meg ez de vagy csak mint kell lehet el",
    "ro": "și şi de în la a cu nu pe este un o se din care pentru sau să mai sunt că dacă fi ca",
    "tr": "ve bir bu için ile de da olarak daha gibi olan ya veya çok en ne değil her",
    "id": "yang dan di untuk dengan ini dari pada tidak dalam adalah itu akan atau ke oleh",
    "vi": "và của là có được các một cho không trong người với những đã này từ để khi",
    "ru": "и в не на что с по для из как это или от к за его но если при а о бы до",
    "uk": "і в не на що з до та для як це або від за у якщо є й а його",
    "bg": "и на в за се да не от с е са по или като ще",
    "sr": "и у је на се да за од су не или као што би ако",
    "ar": "في من على أن إلى هذا ما لا هو عن أو كان مع هذه",
    "fa": "در و به از که را با این است یا هر آن می",
    "ur": "کے میں کی ہے اور سے کا کو پر نے یہ",
}
_SCRIPT_OF: Final = {
    "ru": "cyrillic",
    "uk": "cyrillic",
    "bg": "cyrillic",
    "sr": "cyrillic",
    "ar": "arabic",
    "fa": "arabic",
    "ur": "arabic",
}  # the rest of _WORDS is Latin
# First two bytes of UTF-8, both ends included, and what one letter weighs against a Latin one.
_SCRIPTS: Final[tuple[tuple[str, int, int, int], ...]] = (
    ("latin", 0xC380, 0xC9BF, 1),
    ("latin", 0xE1B8, 0xE1BB, 1),
    ("greek", 0xCDB0, 0xCFBF, 1),
    ("cyrillic", 0xD080, 0xD4AF, 1),
    ("armenian", 0xD4B0, 0xD68F, 1),
    ("hebrew", 0xD690, 0xD7BF, 1),
    ("arabic", 0xD880, 0xDDBF, 1),
    ("devanagari", 0xE0A4, 0xE0A5, 1),
    ("bengali", 0xE0A6, 0xE0A7, 1),
    ("gurmukhi", 0xE0A8, 0xE0A9, 1),
    ("gujarati", 0xE0AA, 0xE0AB, 1),
    ("tamil", 0xE0AE, 0xE0AF, 1),
    ("telugu", 0xE0B0, 0xE0B1, 1),
    ("kannada", 0xE0B2, 0xE0B3, 1),
    ("malayalam", 0xE0B4, 0xE0B5, 1),
    ("sinhala", 0xE0B6, 0xE0B7, 1),
    ("thai", 0xE0B8, 0xE0B9, 1),
    ("lao", 0xE0BA, 0xE0BB, 1),
    ("georgian", 0xE182, 0xE183, 1),
    ("khmer", 0xE19E, 0xE19F, 1),
    ("kana", 0xE381, 0xE383, 2),
    ("han", 0xE390, 0xE9BF, 3),
    ("hangul", 0xEAB0, 0xED9E, 3),
)
_ONLY: Final = {
    "greek": "el",
    "armenian": "hy",
    "hebrew": "he",
    "devanagari": "hi",
    "bengali": "bn",
    "gurmukhi": "pa",
    "gujarati": "gu",
    "tamil": "ta",
    "telugu": "te",
    "kannada": "kn",
    "malayalam": "ml",
    "sinhala": "si",
    "thai": "th",
    "lao": "lo",
    "georgian": "ka",
    "khmer": "km",
    "hangul": "ko",
}
_NAMES: Final = tuple(dict.fromkeys(name for name, *_ in _SCRIPTS))

LANGUAGES: Final = tuple(sorted({*_WORDS, *_ONLY.values(), "ja", "zh"}))
"""What the rough guess can say, besides ``und``; ISO 639-1."""


@dataclass(frozen=True, slots=True)
class Language:
    """A stage: add ``language`` (string) and ``language_score`` (float32, 0 to 1).

    The score of the rough guess is the share of letters in the language's script, times, where function words decide,
    how far the best language is ahead of the second and how much running text there is. It orders documents; it is no
    probability. With ``py3langid`` it is that library's normalised probability.

    Attributes:
        model: ``rough``, or ``py3langid`` (97 languages, a small model inside its package, some MB).
    """

    model: str = "rough"

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise UserError(f"no language model '{self.model}'{nearest(self.model, MODELS)}; use {' or '.join(MODELS)}")
        if self.model == "py3langid":
            _langid()

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the batch with both columns."""
        column = batch.column("text")
        names, scores = guess(column) if self.model == "rough" else _guess_langid(column)
        batch = set_column(batch, "language", pa.array(names, pa.string()))
        return set_column(batch, "language_score", pa.array(scores, pa.float32()))


@dataclass(frozen=True, slots=True)
class KeepLanguage:
    """A stage: the reason ``language`` for documents that are in none of the languages wanted.

    The columns of ``Language`` are added if they are not there.

    Attributes:
        languages: ISO 639-1 codes to keep; ``und`` keeps what could not be told (code, tables, lists).
        at_least: least ``language_score`` of a document that is kept, 0 to 1; ``und`` documents need none.
        model: as in ``Language``.
    """

    languages: tuple[str, ...]
    at_least: float = 0.0
    model: str = "rough"

    def __post_init__(self) -> None:
        Language(self.model)
        if not self.languages:
            raise UserError("no language to keep; name at least one, e.g. en")
        known = (*LANGUAGES, UNDETERMINED) if self.model == "rough" else _langid_languages()
        for name in self.languages:
            if name not in known:
                mend = f"use one of {' '.join(known)}"
                raise UserError(f"the {self.model} language model knows no '{name}'{nearest(name, known)}; {mend}")
        if not 0.0 <= self.at_least <= 1.0:
            raise UserError(f"the least language score is {self.at_least}; give 0 to 1, e.g. 0.3")

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the batch with reasons set."""
        if batch.schema.get_field_index("language") < 0:
            batch = Language(self.model)(batch)
        names = batch.column("language")
        wanted = np.asarray(pa.compute.is_in(names, pa.array(self.languages)))
        sure = np.asarray(batch.column("language_score")) >= self.at_least
        sure |= np.asarray(pa.compute.equal(names, UNDETERMINED))
        return drop(batch, ~(wanted & sure), "language")


def guess(text: pa.StringArray) -> tuple[list[str], NDArray[np.float32]]:
    """Return the language of every row by the rough guess, and its score, (N,)."""
    sample, owners = _sampled(*record.flat(text))
    letters = _letters(sample, owners, len(text))  # (N, scripts)
    shares = letters / np.maximum(letters.sum(1, keepdims=True), 1)
    tables = _tables()
    hits = _function_words(sample, owners, len(text))  # (N, languages), share of all words
    points = np.zeros((len(text), len(LANGUAGES)))
    for script, column in tables.languages_of.items():
        of_script = hits[:, column]
        order = np.sort(of_script, axis=1)
        best, second = order[:, -1], order[:, -2]
        surety = np.where(best >= _LEAST, (best - second) / np.maximum(best, 1e-9), 0.0) * np.minimum(1, best / _SURE)
        rows = np.arange(len(text))
        points[rows, column[of_script.argmax(1)]] = shares[:, _NAMES.index(script)] * surety
    for script, language in _ONLY.items():
        points[:, LANGUAGES.index(language)] = shares[:, _NAMES.index(script)]
    han, kana = shares[:, _NAMES.index("han")], shares[:, _NAMES.index("kana")]
    japanese = kana > 0.1 * (han + kana)  # running Japanese is about half kana
    points[:, LANGUAGES.index("ja")] = (han + kana) * japanese
    points[:, LANGUAGES.index("zh")] = (han + kana) * ~japanese
    alone = [LANGUAGES.index(language) for language in (*_ONLY.values(), "ja", "zh")]
    points[:, alone] *= points[:, alone] >= _QUOTED
    best_of = points.argmax(1)
    scores = points.max(1, initial=0.0).astype(np.float32)
    return [LANGUAGES[i] if s > 0 else UNDETERMINED for i, s in zip(best_of, scores, strict=True)], scores


@dataclass(frozen=True, slots=True)
class _Tables:
    """Look-up tables, made once a process from the constants above."""

    script_of: NDArray[np.int8]  # (65536,): of the first two bytes of a character, -1 for no letter
    weight: NDArray[np.float64]  # (scripts,)
    keys: NDArray[np.uint64]  # (V,) sorted: function words as numbers
    first: NDArray[np.int64]  # (V + 1,): where a word's entries begin in the two below
    language: NDArray[np.int64]
    share: NDArray[np.float64]
    languages_of: dict[str, NDArray[np.int64]]


@lru_cache(maxsize=1)
def _tables() -> _Tables:
    script_of = np.full(65536, -1, np.int8)
    weight = np.ones(len(_NAMES))
    for name, low, high, heavy in _SCRIPTS:
        script_of[low : high + 1] = _NAMES.index(name)
        weight[_NAMES.index(name)] = heavy
    owners: dict[int, list[int]] = {}
    for language, words in _WORDS.items():
        for word in words.split():
            key = word.encode()
            assert len(key) <= 8, word
            owners.setdefault(int.from_bytes(key, "little"), []).append(LANGUAGES.index(language))
    entries = sorted(owners.items())
    scripts: dict[str, list[int]] = {}
    for language in _WORDS:
        scripts.setdefault(_SCRIPT_OF.get(language, "latin"), []).append(LANGUAGES.index(language))
    return _Tables(
        script_of,
        weight,
        np.array([key for key, _ in entries], np.uint64),
        np.cumsum([0, *(len(found) for _, found in entries)]),
        np.array([i for _, found in entries for i in found]),
        # One ASCII letter is as often a variable, an item of a list or an initial as a word.
        np.array([(0.3 if key < 256 else 1.0) / len(found) for key, found in entries for _ in found]),
        {script: np.array(members) for script, members in scripts.items()},
    )


def _sampled(flat: NDArray[np.uint8], offsets: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return what is looked at, with a line end after every piece and 8 more, and the row of each byte's piece.

    The second array gives (first byte of piece i, its row) as two rows: (2, P).
    """
    view = flat.data
    pieces: list[memoryview] = []
    rows: list[int] = []
    part = SAMPLE // 3
    for row, (low, high) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        if high - low <= SAMPLE:
            pieces.append(view[low:high])
            rows.append(row)
        else:
            middle = (low + high - part) // 2
            pieces += [view[low : low + part], view[middle : middle + part], view[high - part : high]]
            rows += [row, row, row]
    joined = b"\n".join([*pieces, b"\n" * 8])
    lengths = np.array([len(piece) + 1 for piece in pieces], np.int64)
    return np.frombuffer(joined, np.uint8), np.stack([np.cumsum(lengths) - lengths, np.array(rows, np.int64)])


def _row_of(places: NDArray[np.int64], owners: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the row of every place, (M,); places ascend."""
    counts = np.diff(np.append(np.searchsorted(places, owners[0]), len(places)))
    return np.repeat(owners[1], counts)


def _letters(sample: NDArray[np.uint8], owners: NDArray[np.int64], rows: int) -> NDArray[np.float64]:
    """Return weighted letters of every script in every row, (rows, scripts)."""
    tables, scripts = _tables(), len(_NAMES)
    leads = np.flatnonzero(sample[:-1] >= 0xC3)
    pairs = sample[leads].astype(np.int64) << 8 | sample[leads + 1]
    script = tables.script_of[pairs].astype(np.int64)
    known = script >= 0
    cells = _row_of(leads, owners)[known] * scripts + script[known]
    counts = np.bincount(cells, minlength=rows * scripts).reshape(rows, scripts) * tables.weight
    if rows:
        plain = np.add.reduceat(_ASCII_LETTER[sample], owners[0], dtype=np.int64)
        counts[:, _NAMES.index("latin")] += np.bincount(owners[1], plain, minlength=rows)
    return counts


def _function_words(sample: NDArray[np.uint8], owners: NDArray[np.int64], rows: int) -> NDArray[np.float64]:
    """Return the share of every language's function words among all words of every row, (rows, languages)."""
    tables, languages = _tables(), len(LANGUAGES)
    lower = _LOWER[sample]  # no letters become 0
    inside = lower != 0
    starts = np.flatnonzero(inside[1:] & ~inside[:-1]) + 1
    starts = np.concatenate([np.zeros(int(inside[0]), np.int64), starts])
    ends = np.flatnonzero(inside[:-1] & ~inside[1:]) + 1
    lengths = ends - starts
    row_of = _row_of(starts, owners)
    words = np.bincount(row_of, minlength=rows)
    short = lengths <= 8
    eight = np.ndarray(len(lower) - 7, "<u8", lower.data, strides=(1,))  # the 8 bytes from every place on
    keys = eight[starts[short]] & _MASKS[lengths[short]]
    at = np.minimum(np.searchsorted(tables.keys, keys), len(tables.keys) - 1)
    hit = tables.keys[at] == keys
    at, row_of = at[hit], row_of[short][hit]
    many = tables.first[at + 1] - tables.first[at]
    entry = np.repeat(tables.first[at] - (np.cumsum(many) - many), many) + np.arange(many.sum())
    cells = np.repeat(row_of, many) * languages + tables.language[entry]
    counts = np.bincount(cells, tables.share[entry], minlength=rows * languages).reshape(rows, languages)
    shares: NDArray[np.float64] = counts / np.maximum(words, 1)[:, None]
    return shares


def _lower_table() -> NDArray[np.uint8]:
    table = np.zeros(256, np.uint8)
    table[128:] = np.arange(128, 256)
    for letter in range(26):
        table[[65 + letter, 97 + letter]] = 97 + letter
    return table


_LOWER: Final = _lower_table()
_ASCII_LETTER: Final = (_lower_table() != 0) & (np.arange(256) < 128)
_MASKS: Final = np.array([2 ** (8 * n) - 1 for n in range(9)], np.uint64)


@lru_cache(maxsize=1)
def _langid() -> Any:
    try:
        module = importlib.import_module("py3langid.langid")  # not declared: few need it
        return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)
    except (ImportError, AttributeError):  # before 0.4 the model was a pickle
        mend = "pip install 'py3langid>=0.4', or use the rough guess"
        raise UserError(f"the language model py3langid is not installed; {mend}") from None


def _langid_languages() -> Iterable[str]:
    return tuple(sorted(str(name) for name in _langid().labels))


def _guess_langid(text: pa.StringArray) -> tuple[list[str], NDArray[np.float32]]:
    identifier = _langid()
    found = [identifier.classify(str(row)[:SAMPLE]) for row in text.to_pylist()]
    return [str(name) for name, _ in found], np.array([score for _, score in found], np.float32)
