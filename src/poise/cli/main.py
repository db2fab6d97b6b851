"""``poise``: one file a command, loaded when it is called, so that ``poise --help`` is instant."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from poise.core.errors import UserError, nearest

COMMANDS = {
    "train": ("poise.cli.train", "train a model from text: a stable model, a report and a resumable run"),
    "resume": ("poise.cli.resume", "go on with a run that was stopped, killed or crashed"),
    "demo": ("poise.cli.demo", "the same run with faults, bare and guarded: why this tool exists"),
    "diagnose": ("poise.cli.diagnose", "what happened to a run, from anybody's log: events, causes, cost, what to do"),
    "replay": ("poise.cli.replay", "show recorded logs to the guard: its alarms, and what it would have done"),
    "check": ("poise.cli.check", "will this configuration be stable? what is known to break, before it runs"),
    "blame": ("poise.cli.blame", "which documents were in that step?"),
    "study": ("poise.cli.study", "many small runs that answer a question: which method widens the usable rates?"),
    "data": ("poise.cli.data", "prepare text for training, or look at what was prepared"),
    "methods": ("poise.cli.methods", "list the stability methods, with formula, cost and citation"),
}

USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 success, 2 a user's mistake, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else ""
    # torch reads this when it first allocates: large tensors in huge pages, fewer page faults on Linux.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        if not words or name in ("-h", "--help"):
            print(_help(), flush=True)
            return 0 if words else USAGE_ERROR
        if name in ("-V", "--version"):
            from poise import __version__

            print(f"poise {__version__}", flush=True)
            return 0
        if name not in COMMANDS:
            raise UserError(f"unknown command '{name}'{nearest(name, COMMANDS)}; see poise --help")
        return int(importlib.import_module(COMMANDS[name][0]).main(words[1:]))
    except UserError as error:
        print(f"poise{' ' + name if name in COMMANDS else ''}: {_one_line(str(error))}", file=sys.stderr)
        return USAGE_ERROR
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("poise"):
            raise
        print(f"poise {name}: needs the package '{error.name}'; pip install 'poise[train]'", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print(f"poise {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, e.g. `poise methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a read-only folder, a file that has gone
        where = f"'{error.filename}': " if error.filename else ""
        mend = "free some space" if error.errno == errno.ENOSPC else "check the path and its permissions"
        print(f"poise {name}: {where}{error.strerror or error}; {mend}, then try again", file=sys.stderr)
        return USAGE_ERROR


def _one_line(text: str) -> str:
    """Return a message without what would break its line or steer a terminal: a path may hold anything."""
    shown = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "poise makes language-model pre-training stable.",
            "",
            "usage: poise COMMAND [options]      poise COMMAND --help shows them, with an example",
            "",
            *lines,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
