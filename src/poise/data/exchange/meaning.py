"""What imported ids mean: the tokenizer that made them, or numbers where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers

from poise.core.errors import UserError
from poise.data import store
from poise.data.exchange.incoming import Import, Reading
from poise.data.tokens.tokenizer import END_OF_TEXT, Tokenizer, load


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and whether it only stands for one that is not known: its texts are then numbers."""

    inner: Tokenizer
    stand_in: bool


def vocabulary_of(source: Path, readings: Sequence[Reading], how: Import) -> Vocabulary:
    """Return the given tokenizer, the one beside the tokens, or one whose texts are numbers."""
    path = _tokenizer_path(source, how)
    if path is not None:
        inner = load(path)
        if how.end_of_text is not None and how.end_of_text != inner.end_of_text:
            raise UserError(
                f"end_of_text is {how.end_of_text}, but in '{path}' it is {inner.end_of_text}; leave it off or give "
                "the tokenizer of these tokens"
            )
        return Vocabulary(inner, False)
    assert how.vocab_size is not None
    end = _usual_end(readings) if how.end_of_text is None else how.end_of_text
    if end >= how.vocab_size:
        raise UserError(f"end_of_text is {end}, outside of {how.vocab_size} ids; give a larger vocab_size")
    return Vocabulary(_numbers(how.vocab_size, end), True)


def _tokenizer_path(source: Path, how: Import) -> str | None:
    """Return the tokenizer to use; None if there is none and a ``vocab_size`` stands for it."""
    if how.tokenizer is not None or how.vocab_size is not None:
        return how.tokenizer
    for folder in (source, source.parent):
        if (folder / store.TOKENIZER).is_file():
            return str(folder / store.TOKENIZER)
    raise UserError(f"no tokenizer for '{source}'; give its tokenizer.json, or vocab_size if there is none")


def _usual_end(readings: Sequence[Reading]) -> int:
    """Return the id that the first documents all end with."""
    last = {int(d.ids[-1]) for d in islice(readings[0].documents(None), 1000) if len(d.ids)}
    if len(last) != 1:
        raise UserError(f"documents of '{readings[0].path}' end with different ids; give end_of_text, the id to use")
    return last.pop()


def _numbers(vocab_size: int, end_of_text: int) -> Tokenizer:
    """Return a tokenizer whose token i is the number i, so that everything that shows text shows ids."""
    words = {str(i): i for i in range(vocab_size) if i != end_of_text} | {END_OF_TEXT: end_of_text}
    inner = tokenizers.Tokenizer(models.WordLevel(words))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(inner)


def vocab_size(source: Path, how: Import) -> int:
    """Return the number of ids that an import of ``source`` would have.

    Raises:
        UserError: no tokenizer and no size, or a bad tokenizer.
    """
    path = _tokenizer_path(source, how)
    if path is not None:
        return int(load(path).vocab_size)
    assert how.vocab_size is not None
    return how.vocab_size
