"""What decides the contents of prepared data, besides the sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from poise.core.errors import UserError, nearest
from poise.data.clean.presets import PRESETS
from poise.data.tokens.augment import SENTINELS
from poise.data.tokens.tokenizer import MIN_VOCAB


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the contents of prepared data, besides the sources. Nothing is dropped that is not asked for here.

    Attributes:
        vocab_size: ids of the trained vocabulary, the special tokens included; unused with ``tokenizer``.
        tokenizer: path of a ``tokenizer.json`` to use instead of training one.
        special_tokens: further ids that no text can produce, for the training of a vocabulary.
        val_fraction: share of the documents held out, 0 to 0.5; they are chosen by their content.
        seed: chooses which documents are held out.
        text_field: the field or column of JSON lines, Parquet and Arrow that holds the text.
        filters: names of presets; a document that fails a rule of any is dropped.
        clean_lines: edit the text as C4 does: lines without an end of sentence, with JavaScript and the like go.
        repair: turn UTF-8 that was once read as cp1252 back, where that is certain.
        mask_pii: replace e-mail and IP addresses and the like by placeholders.
        languages: keep documents in these languages (rough); empty keeps all.
        block_urls: path of a file with hosts and URLs whose documents are dropped.
        dedup: ``none``; ``exact``: equal texts; ``near``: also texts that share most word 5-grams (MinHash).
        dedup_keep: of a cluster of duplicates ``one`` stays, or 1 + log2(size) of them (``log``).
        minhash: what computes signatures: ``numpy``, or ``rensa`` where that is installed; as good, and not comparable.
        similarity: estimated Jaccard similarity from which texts are near-duplicates.
        decontaminate: paths of evaluation texts; a document that shares a word 13-gram with one is dropped.
        fim_rate: share of documents rearranged for fill-in-the-middle, whose three special tokens are added.
        bpe_dropout: share of the tokenizer's merges left out at random, so that a word has several spellings.
        strict: a damaged or vanished file is an error instead of being skipped and counted.
    """

    vocab_size: int = 8192
    tokenizer: str | None = None
    special_tokens: tuple[str, ...] = ()
    val_fraction: float = 0.01
    seed: int = 0
    text_field: str = "text"
    filters: tuple[str, ...] = ()
    clean_lines: bool = False
    repair: bool = False
    mask_pii: bool = False
    languages: tuple[str, ...] = ()
    block_urls: str | None = None
    dedup: Literal["none", "exact", "near"] = "none"
    dedup_keep: Literal["one", "log"] = "one"
    minhash: Literal["numpy", "rensa"] = "numpy"
    similarity: float = 0.8
    decontaminate: tuple[str, ...] = ()
    fim_rate: float = 0.0
    bpe_dropout: float = 0.0
    strict: bool = False

    def __post_init__(self) -> None:
        if self.vocab_size < MIN_VOCAB:
            raise UserError(f"vocab_size is {self.vocab_size}; a byte-level vocabulary needs at least {MIN_VOCAB} ids")
        if self.vocab_size > 2**31 - 1:
            raise UserError(f"vocab_size is {self.vocab_size}; at most 2**31 - 1 ids have a place in the files")
        if not 0.0 <= self.val_fraction <= 0.5:
            raise UserError(f"val_fraction is {self.val_fraction}; give a share from 0 to 0.5, e.g. 0.01")
        if not self.text_field:
            raise UserError("text_field is empty; give the name of the field that holds the text, e.g. text")
        for name in self.filters:
            if name not in PRESETS:
                raise UserError(f"no filter '{name}'{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
        for name, allowed in (
            ("dedup", ("none", "exact", "near")),
            ("dedup_keep", ("one", "log")),
            ("minhash", ("numpy", "rensa")),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"{name} is {value!r}{nearest(str(value), allowed)}; use {', '.join(allowed)}")
        if not 0.0 < self.similarity <= 1.0:
            raise UserError(f"similarity is {self.similarity}; give a number above 0 and up to 1, e.g. 0.8")
        for name in ("fim_rate", "bpe_dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"{name} is {getattr(self, name)}; give a share from 0 to 1, e.g. 0.1")
        if self.fim_rate and self.bpe_dropout:
            raise UserError("fim_rate and bpe_dropout are both on; choose one")

    @property
    def all_special_tokens(self) -> tuple[str, ...]:
        """The special tokens a trained vocabulary gets besides the end of text."""
        return (*self.special_tokens, *(SENTINELS if self.fim_rate else ()))
