"""Text to token ids: a byte-level BPE trained on the corpus in seconds, or any ``tokenizer.json``.

A borrowed vocabulary on a small corpus leaves most embedding rows untrained, so training one is the default.
Source: R. Sennrich, B. Haddow, A. Birch, "Neural machine translation of rare words with subword units",
ACL 2016 (arXiv 1508.07909); byte level as in A. Radford et al., "Language models are unsupervised multitask
learners", 2019. The work is done by Hugging Face ``tokenizers``.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from poise.core.errors import UserError, nearest
from poise.data import record
from poise.data.tokens import fast_encoder

END_OF_TEXT: Final = "<|endoftext|>"
SAMPLE_BYTES: Final = 10_000_000
"""Text a vocabulary is trained on, at most; more changes it little and takes longer."""

MIN_VOCAB: Final = 257  # every byte, and the end of text
_SEGMENT: Final = 2**20  # characters encoded at once: ids take some 100 times the memory of their text
_KNOWN_ENDS: Final = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<EOS>",
    "[EOS]",
    "<|eos|>",
)


class Tokenizer:
    """A tokenizer and the id that ends a document.

    Attributes:
        end_of_text: id written after every document.
        vocab_size: the largest id, plus one.
        notes: what a user should know about the vocabulary, in words; usually empty.
    """

    def __init__(self, inner: Any, end_of_text: str | None = None) -> None:
        self._inner = inner
        self._fast: fast_encoder.FastEncoder | None = None
        inner.no_truncation()
        inner.no_padding()
        # The text of a document must not be able to end the document: "<|endoftext|>" written in a file
        # is thirteen characters.
        inner.encode_special_tokens = True
        names = _KNOWN_ENDS if end_of_text is None else (end_of_text,)
        known = [name for name in names if inner.token_to_id(name) is not None]
        notes = []
        if not known:
            inner.add_special_tokens([END_OF_TEXT])
            known = [END_OF_TEXT]
            notes.append(
                f"the tokenizer names no end of text, so '{END_OF_TEXT}' was added as id "
                f"{inner.token_to_id(END_OF_TEXT)}"
            )
        self.end_of_text = int(inner.token_to_id(known[0]))
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        if self.end_of_text in inner.encode(known[0], add_special_tokens=False).ids:
            notes.append(f"a text that holds '{known[0]}' gets the id of the end of text")
        self.notes = tuple(notes)

    def accelerate(self, sample_texts: Sequence[str]) -> str:
        """Use the fast encoder from now on if it gives the same ids, and return what was found in words."""
        verdict = fast_encoder.judge(self, sample_texts)
        self._fast = verdict.encoder
        return verdict.reason

    @property
    def is_fast(self) -> bool:
        """Whether the fast encoder is in use."""
        return self._fast is not None

    def trust_fast(self) -> None:
        """Use the fast encoder without a check: in a worker process, after ``accelerate`` has accepted it."""
        self._fast = fast_encoder.FastEncoder(self.to_json())

    @property
    def encoder(self) -> str:
        """Name and version of the library that encodes."""
        return f"gigatoken {self._fast.version}" if self._fast else f"tokenizers {tokenizers.__version__}"

    def encode(self, texts: Sequence[str], *, threads: int | None = None) -> list[NDArray[np.uint32]]:
        """Return the ids of every text, without the end of text; ``threads`` as in ``encode_flat``."""
        if self._fast is None:
            return self.encode_reference(texts, threads=threads)
        ids, offsets = self.encode_flat(pa.array(texts, pa.large_string()), threads=threads)
        return [ids[a:b] for a, b in itertools.pairwise(offsets.tolist())]

    def encode_reference(self, texts: Sequence[str], *, threads: int | None = None) -> list[NDArray[np.uint32]]:
        """Return what ``encode`` does, always by ``tokenizers``."""
        parts, owners = [], []
        for owner, text in enumerate(texts):
            for part in segments(text):
                parts.append(part)
                owners.append(owner)
        # One text at a time leaves the library's other threads without work.
        batches = [parts] if threads != 1 else [[part] for part in parts]
        encoded = (e for batch in batches for e in self._inner.encode_batch_fast(batch, add_special_tokens=False))
        ids: list[list[NDArray[np.uint32]]] = [[] for _ in texts]
        for owner, encoding in zip(owners, encoded, strict=True):
            ids[owner].append(np.array(encoding.ids, dtype=np.uint32))
        return [np.concatenate(pieces) if pieces else np.zeros(0, np.uint32) for pieces in ids]

    def encode_flat(
        self, text: pa.StringArray | pa.LargeStringArray, *, threads: int | None = None, end: bool = False
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return the ids of N texts in one array, and (N + 1,) where those of each begin; the pipeline's form.

        Args:
            text: (N,) texts, none of them null.
            threads: 1 keeps to one core, for worker processes; None leaves the number to the library.
            end: put the end of text after every text.
        """
        assert threads is None or threads == 1, threads
        if self._fast is None:
            each = self.encode_reference(text.to_pylist(), threads=threads)
            ids = np.concatenate([np.zeros(0, np.uint32), *each])
            offsets = np.zeros(len(each) + 1, np.int64)
            np.cumsum([len(part) for part in each], out=offsets[1:])
        else:
            data, places = record.flat(text)
            cuts, first = _cut(data, places)
            ids, offsets = self._fast.encode_flat(data, cuts, threads=threads)
            odd = np.flatnonzero(fast_encoder.unfamiliar(data, cuts)).tolist()
            if odd:
                texts = [data[cuts[n] : cuts[n + 1]].tobytes().decode() for n in odd]
                ids, offsets = _replaced(ids, offsets, odd, self.encode_reference(texts, threads=threads))
            offsets = offsets[first]
        return with_ends(ids, offsets, self.end_of_text) if end else (ids, offsets)

    def special_id(self, token: str) -> int | None:
        """Return the id of a special token, or None if there is none of that name."""
        found = self._inner.token_to_id(token)
        return int(found) if found in self._special else None

    def words(self, text: str) -> list[str]:
        """Return the pieces of a text that no token reaches over, in the letters of the vocabulary."""
        normal = self._inner.normalizer.normalize_str(text) if self._inner.normalizer else text
        splitter = self._inner.pre_tokenizer
        return [word for word, _ in splitter.pre_tokenize_str(normal)] if splitter else [normal]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; with a byte-level vocabulary the inverse of ``encode``."""
        return str(self._inner.decode([int(i) for i in ids], skip_special_tokens=False))

    @functools.cached_property
    def byte_level(self) -> bool:
        """Whether the letters of the vocabulary stand for bytes."""
        return _is_byte_level(json.loads(self.to_json()).get("decoder"))

    @functools.cached_property
    def _special(self) -> set[int]:
        return {i for i, token in self._inner.get_added_tokens_decoder().items() if token.special}

    @functools.cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """UTF-8 of what each id stands for, (vocab_size,); empty for special tokens and numbers without a token.

        A piece need not be whole characters. Marks of a vocabulary that stand for a blank are blanks here.
        """
        special = self._special | {self.end_of_text}
        pieces = [b""] * self.vocab_size
        for token, i in self._inner.get_vocab(with_added_tokens=True).items():
            if i not in special:
                pieces[i] = _piece(token, self.byte_level)
        return tuple(pieces)

    @functools.cached_property
    def blank_ids(self) -> NDArray[np.int64]:
        """Ids that stand for white space only, in increasing order."""
        blank = [i for i, piece in enumerate(self.pieces) if piece.decode("utf-8", "replace").isspace()]
        return np.array(blank, np.int64)

    def to_json(self) -> str:
        """Return the tokenizer as the text of a ``tokenizer.json``."""
        return str(self._inner.to_str(pretty=True))

    def hash(self) -> str:
        """Return a 128-bit hash of ``to_json``, as 32 hexadecimal digits."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        end = self._inner.id_to_token(self.end_of_text)
        return _restore, (self.to_json(), end, self._fast is not None, self.notes)


class Sample:
    """A deterministic sample of documents for training a vocabulary, at most ``limit`` bytes of them.

    It keeps the documents with the smallest keys. The keys are hashes, so the sample is spread over the
    corpus and does not depend on the order of the documents.
    """

    def __init__(self, limit: int = SAMPLE_BYTES) -> None:
        self._limit = limit
        self._heap: list[tuple[int, int, str]] = []
        self._bytes = 0

    def offer(self, key: int, text: str) -> None:
        """Take a document in if its key is among the smallest."""
        text = text[: self._limit // 4]  # one huge document is not a sample
        size = len(text.encode())
        heapq.heappush(self._heap, (-key, size, text))
        self._bytes += size
        while self._bytes > self._limit:
            self._bytes -= heapq.heappop(self._heap)[1]

    def texts(self) -> list[str]:
        """Return the sample, smallest key first."""
        return [text for _, _, text in sorted(self._heap, reverse=True)]


def train(texts: Sequence[str], vocab_size: int, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """Train a byte-level BPE with ``vocab_size`` ids, of which 0 is ``<|endoftext|>`` and the next are special.

    Deterministic: the same texts give the same tokenizer. Decoding gives back every text exactly.

    Args:
        texts: what the merges are learnt from.
        vocab_size: ids, special tokens included.
        special_tokens: further tokens that no text can hold, e.g. ``augment.SENTINELS``.

    Raises:
        UserError: the texts do not have that many different merges, or a special token is empty or there twice.
    """
    special = [END_OF_TEXT, *special_tokens]
    for token in special_tokens:
        if not token.strip() or special.count(token) > 1:
            raise UserError(f"special token '{token}' is empty or there twice; give different names, e.g. '<|pad|>'")
    least = MIN_VOCAB + len(special_tokens)
    if vocab_size < least:
        raise UserError(f"vocab_size is {vocab_size}; every byte and {len(special)} special tokens need {least} ids")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer, length=len(texts))
    reached = inner.get_vocab_size(with_added_tokens=True)
    if reached < vocab_size:
        fits = reached // 64 * 64 if reached >= 512 else reached
        raise UserError(
            f"the text is too small for a vocabulary of {vocab_size} ids: it supports {reached}; "
            f"use --data.vocab_size {fits} or more text"
        )
    return Tokenizer(inner)


def load(path: str | Path, end_of_text: str | None = None) -> Tokenizer:
    """Load a ``tokenizer.json`` of Hugging Face ``tokenizers``, or the one in a folder.

    The end of text is the token named, else ``<|endoftext|>``, ``</s>`` or another usual name; a vocabulary without
    any gets ``<|endoftext|>`` as its last id, and says so in ``Tokenizer.notes``.

    Raises:
        UserError: there is no such file, it is not a tokenizer, or it does not have the token named.
    """
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"no tokenizer '{path}'; give the path of a tokenizer.json, or none to train one")
    try:
        text = file.read_text(encoding="utf-8")
        inner = tokenizers.Tokenizer.from_str(text)
    except OSError as error:
        raise UserError(f"cannot read tokenizer '{path}': {error.strerror}; check its permissions") from None
    except Exception as error:  # the Rust side raises plain Exception, with the reason as its text
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"'{path}' is not a tokenizer.json ({first}); give one made by tokenizers") from None
    if end_of_text is not None and inner.token_to_id(end_of_text) is None:
        hint = nearest(end_of_text, inner.get_vocab(with_added_tokens=True))
        raise UserError(f"tokenizer '{path}' has no token '{end_of_text}'{hint}; name one it has, or none")
    return Tokenizer(inner, end_of_text)


def _restore(text: str, end_of_text: str, fast: bool, notes: tuple[str, ...]) -> Tokenizer:
    """Build a tokenizer in a worker process; what was accepted there is not checked again here."""
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(text), end_of_text)
    tokenizer.notes = notes
    if fast:
        tokenizer._fast = fast_encoder.FastEncoder(text)
    return tokenizer


def segments(text: str) -> Iterable[str]:
    """Cut a very long text after line breaks, so that memory stays bounded; joined, the text again."""
    start = 0
    while len(text) - start > _SEGMENT:
        cut = text.rfind("\n", start + _SEGMENT // 2, start + _SEGMENT) + 1
        cut = cut or start + _SEGMENT
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _cut(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut where ``segments`` cuts, so that both encoders see the same parts.

    Returns:
        offsets of the parts, and (N + 1,) which of them each text begins with.
    """
    long = np.flatnonzero(np.diff(offsets) > _SEGMENT)
    if not len(long):
        return offsets, np.arange(len(offsets))
    extra, counts = [], np.ones(len(offsets) - 1, np.int64)
    for row in long.tolist():
        parts = [len(part.encode()) for part in segments(data[offsets[row] : offsets[row + 1]].tobytes().decode())]
        counts[row] = len(parts)
        extra.append(offsets[row] + np.cumsum(parts[:-1], dtype=np.int64))
    first = np.concatenate([[0], np.cumsum(counts)])
    return np.sort(np.concatenate([offsets, *extra]), kind="stable"), first


def _replaced(
    ids: NDArray[np.uint32], offsets: NDArray[np.int64], rows: list[int], others: list[NDArray[np.uint32]]
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Return ids and offsets with the ids of some rows replaced."""
    lengths = np.diff(offsets)
    parts, done = [], 0
    for row, other in zip(rows, others, strict=True):
        parts += [ids[done : offsets[row]], other]
        done = offsets[row + 1]
        lengths[row] = len(other)
    return np.concatenate([*parts, ids[done:]]), np.concatenate([[0], np.cumsum(lengths)])


def with_ends(
    ids: NDArray[np.uint32], offsets: NDArray[np.int64], end: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Return ids and offsets with ``end`` after every text."""
    count = len(offsets) - 1
    moved = offsets + np.arange(count + 1)
    result = np.full(len(ids) + count, end, np.uint32)
    inside = np.ones(len(result), bool)
    inside[moved[1:] - 1] = False
    result[inside] = ids
    return result, moved


def gather(values: NDArray[np.uint32], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return the spans of ``values`` one after another."""
    ends = np.cumsum(lengths)
    at = np.repeat(starts - (ends - lengths), lengths)
    at += np.arange(len(at))
    return np.asarray(values[at])


def _is_byte_level(decoder: Any) -> bool:
    """Whether a decoder of a tokenizer.json turns letters into bytes."""
    if not isinstance(decoder, dict):
        return False
    return decoder["type"] == "ByteLevel" or any(_is_byte_level(d) for d in decoder.get("decoders") or ())


def _piece(token: str, by_byte: bool) -> bytes:
    """Return the bytes a token of a vocabulary stands for."""
    if by_byte and all(letter in _BYTES for letter in token):
        return bytes(_BYTES[letter] for letter in token)
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(match[1], 16)])
    return token.removeprefix("##").replace("\u2581", " ").encode()


def _byte_letters() -> dict[str, int]:
    """Return which byte each letter of a byte-level vocabulary stands for.

    Visible Latin-1 letters stand for themselves, all other bytes in order for the letters from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTES: Final = _byte_letters()
