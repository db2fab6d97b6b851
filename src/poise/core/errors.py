"""Errors that a user can mend. Everything else that goes wrong is a bug and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A user's mistake: one line that says what is wrong, the value, and the mend.

    The command line prints it without a traceback and exits with code 2.
    """


class Conflict(UserError):  # noqa: N818 - the name a reader expects: two methods are in conflict
    """Two choices that cannot hold together; the message names both and the mend."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``", did you mean 'x'?"`` for the closest known word, or an empty string.

    >>> nearest("grad_nrom", ["grad_norm", "loss"])
    ", did you mean 'grad_norm'?"
    >>> nearest("zzz", ["grad_norm"])
    ''
    """
    names = list(known)
    same_leaf = [name for name in names if name.rpartition(".")[2] == word.rpartition(".")[2] and name != word]
    close_whole = difflib.get_close_matches(word, names, n=1, cutoff=0.75)
    if same_leaf and not close_whole:
        return f", did you mean '{same_leaf[0]}'?"
    leaves = {name.rsplit(".", 1)[-1]: name for name in names}
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if not close:
        leaf = difflib.get_close_matches(word.rsplit(".", 1)[-1], list(leaves), n=1, cutoff=0.7)
        close = [leaves[leaf[0]]] if leaf else []
    return f", did you mean '{close[0]}'?" if close else ""
