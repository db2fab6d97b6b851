"""Text to token ids: a byte-level BPE trained on the corpus in seconds, or any ``tokenizer.json``.

A borrowed vocabulary on a small corpus leaves most embedding rows untrained, so training one is the default.
Source: R. Sennrich, B. Haddow, A. Birch, "Neural machine translation of rare words with subword units",
ACL 2016 (arXiv 1508.07909); byte level as in A. Radford et al., "Language models are unsupervised multitask
learners", 2019. The work is done by Hugging Face ``tokenizers``.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from poise.core.errors import UserError

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
)


class Tokenizer:
    """A tokenizer and the id that ends a document.

    Attributes:
        end_of_text: id written after every document.
        vocab_size: the largest id, plus one.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        inner.no_truncation()
        inner.no_padding()
        # The text of a document must not be able to end the document: "<|endoftext|>" written in a file
        # is thirteen characters.
        inner.encode_special_tokens = True
        ends = [inner.token_to_id(name) for name in _KNOWN_ENDS]
        known = [i for i in ends if i is not None]
        if not known:
            inner.add_special_tokens([END_OF_TEXT])
            known = [inner.token_to_id(END_OF_TEXT)]
        self.end_of_text = int(known[0])
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the ids of every text, without the end of text; uses all cores."""
        parts, owners = [], []
        for owner, text in enumerate(texts):
            for part in _segments(text):
                parts.append(part)
                owners.append(owner)
        ids: list[list[NDArray[np.uint32]]] = [[] for _ in texts]
        for owner, encoding in zip(owners, self._inner.encode_batch_fast(parts, add_special_tokens=False), strict=True):
            ids[owner].append(np.array(encoding.ids, dtype=np.uint32))
        return [np.concatenate(pieces) if pieces else np.zeros(0, np.uint32) for pieces in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; with a byte-level vocabulary the inverse of ``encode``."""
        return str(self._inner.decode([int(i) for i in ids], skip_special_tokens=False))

    def to_json(self) -> str:
        """Return the tokenizer as the text of a ``tokenizer.json``."""
        return str(self._inner.to_str(pretty=True))

    def hash(self) -> str:
        """Return a 128-bit hash of ``to_json``, as 32 hexadecimal digits."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()


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


def train(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with ``vocab_size`` ids, of which 0 is ``<|endoftext|>``.

    Deterministic: the same texts give the same tokenizer. Decoding gives back every text exactly.

    Raises:
        UserError: the texts do not have that many different merges.
    """
    assert vocab_size >= MIN_VOCAB, vocab_size
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
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


def load(path: str | Path) -> Tokenizer:
    """Load a ``tokenizer.json`` of Hugging Face ``tokenizers``, or the one in a folder.

    The end of text is ``<|endoftext|>``, ``</s>`` or another usual name; a vocabulary without any gets
    ``<|endoftext|>`` as its last id.

    Raises:
        UserError: there is no such file, or it is not a tokenizer.
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
    return Tokenizer(inner)


def _segments(text: str) -> Iterable[str]:
    """Cut a very long text after line breaks, so that memory stays bounded; joined, the text again."""
    start = 0
    while len(text) - start > _SEGMENT:
        cut = text.rfind("\n", start + _SEGMENT // 2, start + _SEGMENT) + 1
        cut = cut or start + _SEGMENT
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]
