"""Leaving documents out of prepared data by what is known of them: ``poise data inspect DIR --drop RULE --out DIR2``.

A rule is ``COLUMN OPERATOR VALUE``; several joined by `` & `` must all hold.

===========================  =======================================================================
``scores.compression<1.5``   numbers: ``<  <=  >  >=  =  !=``; a value that is not known matches nothing
``source=web,books``         one of several values; ``!=`` none of them
``origin~notes/``            the text occurs in it; ``~/regular expression/`` (RE2); ``!~`` the opposite
``document=12,val:77``       numbers of documents, of train if nothing else is said
``text~lorem ipsum``         the text of the document; ``text~/regular expression/i``
===========================  =======================================================================
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data import staging, store
from poise.data.look import browse
from poise.data.look.health import coverage
from poise.data.look.inspect import column
from poise.data.look.odd import quantiles
from poise.data.store import SPLITS, Split, Tokens, open_tokens
from poise.data.writer import SplitWriter

REASON: Final = "inspect"
"""What stands before the rule in the reason of a document that was left out."""

_CLAUSE: Final = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(<=|>=|!=|!~|==|<|>|=|~)\s*(.*?)\s*", re.S)
_ORDERS: Final = {"<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}


@dataclass(frozen=True, slots=True)
class Clause:
    """One comparison.

    Attributes:
        column: as in ``inspect.column``, or ``text``.
        operator: ``< <= > >= = != ~ !~``.
        value: as written.
    """

    column: str
    operator: str
    value: str


def parse(rule: str) -> tuple[Clause, ...]:
    """Return the clauses of a rule, all of which must hold.

    Raises:
        UserError: it is no rule.

    >>> parse("scores.compression<1.5 & source=web")
    (Clause(column='scores.compression', operator='<', value='1.5'), Clause(column='source', operator='=', value='web'))
    """
    clauses = []
    for part in rule.split(" & "):
        match = _CLAUSE.fullmatch(part)
        if not match or not match[3]:
            raise UserError(
                f"'{part.strip()}' is no rule; give COLUMN<VALUE, COLUMN=VALUE or COLUMN~TEXT, e.g. bytes<100"
            )
        operator = "=" if match[2] == "==" else match[2]
        if match[1] == "text" and operator not in ("~", "!~"):
            raise UserError(
                f"the text of a document is only searched; write text~{match[3]} instead of '{part.strip()}'"
            )
        clauses.append(Clause(match[1], operator, match[3]))
    return tuple(clauses)


def matching(folder: str | Path, rule: str) -> dict[str, NDArray[np.bool_]]:
    """Return which documents of each split a rule matches, (N,).

    Raises:
        UserError: no prepared data, no such column, or a value that does not fit it.
    """
    tokens = open_tokens(folder)
    found = {}
    for name in SPLITS:
        split = tokens.split(name)
        chosen = np.ones(split.table.num_rows, np.bool_)
        for clause in parse(rule):
            chosen &= _holds(tokens, split, clause)
        found[name] = chosen
    return found


def drop(
    folder: str | Path,
    rules: Sequence[str],
    out: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write prepared data without the documents that any of the rules matches; return its manifest.

    Tokens, provenance, scores and repeats are copied, the order stays. What was left out is kept, decoded, in
    ``dropped/`` with the reason ``inspect.<rule>``, the first that matched, beside what ``folder`` had left out. The
    manifest's ``dropped`` counts what lies there; its ``derived`` names the folder, its fingerprint, what each rule
    took, and as ``not_kept`` what ``folder`` had left out and no longer has.

    Args:
        folder: prepared data; it is not changed.
        rules: see the head of this file.
        out: another folder; prepared data there is replaced.
        progress: called with (tokens done, all tokens).

    Raises:
        UserError: a bad rule, a rule that matches nothing, nothing left, the same folder, damaged data, a full disk.
    """
    tokens = open_tokens(folder)
    place = Path(out).expanduser().absolute()
    _refuse(tokens, rules, place)
    store.check(tokens, dropped=True)
    taken_by = _first_rule(tokens, rules)
    splits = {name: tokens.split(name) for name in SPLITS}
    counts = [
        {name: _sizes(splits[name], taken == number) for name, taken in taken_by.items()}
        for number in range(len(rules))
    ]
    summed = [
        {key: sum(side[key] for side in each.values()) for key in ("documents", "tokens", "bytes")} for each in counts
    ]
    if all((taken >= 0).all() for taken in taken_by.values()):
        raise UserError(f"the rules match every document of '{folder}'; nothing would be left, use narrower ones")
    with staging.staged(place) as aside:
        shutil.copyfile(tokens.tokenizer_path, aside / store.TOKENIZER)
        _write_kept(tokens, splits, taken_by, aside, progress or (lambda *_: None))
        (aside / store.DROPPED).mkdir()
        already, files = _copy_dropped(tokens, aside / store.DROPPED)
        _write_dropped(tokens, splits, taken_by, rules, aside / store.DROPPED / f"{files:05}.parquet")
        manifest = _manifest(tokens, splits, taken_by, rules, summed, already)
        manifest["vocabulary"] = coverage(Tokens(aside, manifest))
        manifest["quantiles"] = quantiles(store.documents_table(aside, "train"))
        return store.seal(aside, manifest)


def _refuse(tokens: Tokens, rules: Sequence[str], out: Path) -> None:
    if not rules:
        raise UserError("no rule says what to leave out; give --drop RULE, e.g. --drop 'bytes<100'")
    here, there = tokens.dir.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(f"'{out}' is or touches the folder that is read; give --out another folder")
    staging.refuse_foreign(out)


def _first_rule(tokens: Tokens, rules: Sequence[str]) -> dict[str, NDArray[np.int16]]:
    """Return for each document the number of the first rule that matches it, or -1."""
    taken = {name: np.full(tokens.split(name).table.num_rows, -1, np.int16) for name in SPLITS}
    for number, rule in enumerate(rules):
        found = matching(tokens.dir, rule)
        if not any(chosen.any() for chosen in found.values()):
            raise UserError(f"the rule '{rule}' matches no document of '{tokens.dir}'; mend it or leave it out")
        for name, chosen in found.items():
            taken[name][chosen & (taken[name] < 0)] = number
    return taken


def _holds(tokens: Tokens, split: Split, clause: Clause) -> NDArray[np.bool_]:
    if clause.column == "text":
        return _text_holds(tokens, split, clause)
    if clause.column == "document" and clause.operator in ("=", "!="):
        places = [browse.place_of(tokens, value) for value in clause.value.split(",")]
        chosen = np.zeros(split.table.num_rows, np.bool_)
        chosen[[number for name, number in places if name == split.name]] = True
        return chosen if clause.operator == "=" else ~chosen
    values = column(split, clause.column)
    if pa.types.is_string(values.type):
        result = _text_compare(values, clause)
    else:
        result = _number_compare(values, clause)
    return np.asarray(pc.fill_null(result, False))


def _number_compare(values: pa.Array, clause: Clause) -> pa.BooleanArray:
    if clause.operator in ("~", "!~"):
        raise UserError(f"column '{clause.column}' holds numbers; compare it with <, <=, >, >=, = or !=")
    try:
        numbers = [float(value) for value in clause.value.split(",")]
    except ValueError:
        raise UserError(f"'{clause.value}' is no number for column '{clause.column}'; give one, e.g. 1.5") from None
    values = values.cast(pa.float64())
    if clause.operator in _ORDERS:
        if len(numbers) > 1:
            raise UserError(f"'{clause.operator}' compares with one number, not with '{clause.value}'; give one")
        return _ORDERS[clause.operator](values, numbers[0])
    chosen = pc.is_in(values, pa.array(numbers))
    return pc.and_(chosen if clause.operator == "=" else pc.invert(chosen), values.is_valid())


def _text_compare(values: pa.StringArray, clause: Clause) -> pa.BooleanArray:
    if clause.operator in _ORDERS:
        raise UserError(f"column '{clause.column}' holds text; compare it with =, !=, ~ or !~")
    if clause.operator in ("=", "!="):
        chosen = pc.is_in(values, pa.array([value.strip() for value in clause.value.split(",")]))
    elif match := re.fullmatch(r"/(.+)/(i?)", clause.value):
        try:
            chosen = pc.match_substring_regex(values, match[1], ignore_case=bool(match[2]))
        except pa.ArrowInvalid as error:
            raise UserError(f"'{clause.value}' is no regular expression ({error}); mend it") from None
    else:
        chosen = pc.match_substring(values, clause.value)
    negative = clause.operator.startswith("!")
    return pc.and_(pc.invert(chosen) if negative else chosen, values.is_valid())


def _text_holds(tokens: Tokens, split: Split, clause: Clause) -> NDArray[np.bool_]:
    chosen = np.zeros(split.table.num_rows, np.bool_)
    for hit in browse.search(tokens.dir, clause.value, splits=(split.name,)):
        chosen[hit.document] = True
    return chosen if clause.operator == "~" else ~chosen


def _write_kept(
    tokens: Tokens,
    splits: dict[str, Split],
    taken_by: dict[str, NDArray[np.int16]],
    aside: Path,
    progress: Callable[[int, int], None],
) -> None:
    total, done = sum(len(split.tokens) for split in splits.values()), 0
    for name, split in splits.items():
        writer = SplitWriter(aside, name, store.token_dtype(tokens.vocab_size))
        try:
            starts = np.cumsum(split.index.lengths, dtype=np.int64) - split.index.lengths
            owner = np.searchsorted(starts, split.repeats["start"], side="right") - 1
            for first, last in browse.blocks(split):
                _write_block(writer, split, first, last, taken_by[name][first:last] < 0, starts, owner)
                done += int(split.index.lengths[first:last].sum())
                progress(done, total)
            writer.close()
        except BaseException:
            writer.abandon()
            raise


def _write_block(
    writer: SplitWriter,
    split: Split,
    first: int,
    last: int,
    keep: NDArray[np.bool_],
    starts: NDArray[np.int64],
    owner: NDArray[np.int64],
) -> None:
    """Append what is kept of documents ``first .. last - 1``; ``owner`` is the document of each repeat."""
    lengths = split.index.lengths[first:last].astype(np.int64)
    begin = int(starts[first])
    ids = split.tokens[begin : begin + int(lengths.sum())][np.repeat(keep, lengths)]
    low, high = np.searchsorted(owner, [first, last])
    repeats, of = split.repeats[low:high].copy(), owner[low:high] - first
    gone = np.cumsum(np.where(keep, 0, lengths))  # tokens left out before the end of each document
    repeats["start"] -= begin + gone[of]
    rows = split.table.slice(first, last - first).filter(pa.array(keep)).combine_chunks().to_batches()
    if rows:
        writer.add_block(ids, rows[0], repeats[keep[of]])


def _copy_dropped(tokens: Tokens, folder: Path) -> tuple[dict[str, dict[str, int]], int]:
    """Put what was left out before into ``folder``; return its counts by reason and the first number of a file."""
    names = [name for name in tokens.manifest["files"] if name.startswith(f"{store.DROPPED}/")]
    documents, sizes, first = Counter[str](), Counter[str](), 0
    for name in names:
        old, new = tokens.dir / name, folder / Path(name).name
        if not old.exists():
            continue  # what was dropped may be removed
        try:
            table = pq.read_table(old, columns=["reason", "bytes"])
        except (pa.ArrowException, OSError) as error:
            raise store.damaged(tokens.dir, f"{name} cannot be read ({str(error).splitlines()[0]})") from None
        for row in table.group_by("reason").aggregate([("bytes", "sum"), ("bytes", "count")]).to_pylist():
            documents[row["reason"]] += row["bytes_count"]
            sizes[row["reason"]] += row["bytes_sum"]
        _link_or_copy(old, new)
        first = max(first, int(new.stem) + 1 if new.stem.isdecimal() else 0)
    return {reason: {"documents": documents[reason], "bytes": sizes[reason]} for reason in sorted(documents)}, first


def _link_or_copy(old: Path, new: Path) -> None:
    """Make ``new`` a second name of ``old``, which is never written to again; where that cannot be, a copy."""
    try:
        if os.access(old, os.W_OK):  # sealing opens files for writing
            os.link(old, new)
            return
    except OSError:  # another disk, or one without links
        pass
    shutil.copyfile(old, new)


def _write_dropped(
    tokens: Tokens,
    splits: dict[str, Split],
    taken_by: dict[str, NDArray[np.int16]],
    rules: Sequence[str],
    path: Path,
) -> None:
    texts = browse.Texts(tokens)
    out: pq.ParquetWriter | None = None
    try:
        for name, split in splits.items():
            for first, last in browse.blocks(split):
                taken = taken_by[name][first:last]
                rows = np.flatnonzero(taken >= 0)
                if len(rows) == 0:
                    continue
                data, offsets = texts.block(split, first, last)
                text = [data[offsets[row] : offsets[row + 1]].decode("utf-8", "replace") for row in rows]
                table = split.table.slice(first, last - first).take(pa.array(rows))
                table = table.drop_columns(["token_start", "token_length"]).add_column(
                    0, "text", pa.array(text, pa.string())
                )
                reasons = pa.array([f"{REASON}.{rules[number]}" for number in taken[rows]], pa.string())
                table = table.append_column("reason", reasons)
                out = out or pq.ParquetWriter(path, table.schema, compression="zstd")
                out.write_table(table)
    finally:
        if out is not None:
            out.close()


def _manifest(
    tokens: Tokens,
    splits: dict[str, Split],
    taken_by: dict[str, NDArray[np.int16]],
    rules: Sequence[str],
    counts: Sequence[dict[str, int]],
    already: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """Return the manifest of what is kept: the old one with new counts, and what was left out, now and before."""
    manifest = {k: v for k, v in tokens.manifest.items() if k not in ("format", "version", "files")}
    kept = {name: taken < 0 for name, taken in taken_by.items()}
    manifest["splits"] = {name: _sizes(split, kept[name]) for name, split in splits.items()}
    sources = []
    for number, source in enumerate(manifest["sources"]):
        per_split = {}
        for name, split in splits.items():
            span = split.sources[number]
            inside = np.zeros(len(kept[name]), np.bool_)
            inside[span.document_start : span.document_start + span.documents] = True
            per_split[name] = _sizes(split, kept[name] & inside)
        sources.append({**source, "splits": per_split})
    manifest["sources"] = sources
    dropped = {reason: dict(facts) for reason, facts in already.items()}
    for rule, each in zip(rules, counts, strict=True):
        if each["documents"]:  # else earlier rules took all
            facts = dropped.setdefault(f"{REASON}.{rule}", {"documents": 0, "bytes": 0})
            facts.update({key: facts[key] + each[key] for key in facts})
    lost = {reason: facts for reason, facts in manifest.get("dropped", {}).items() if facts != already.get(reason)}
    step = {
        "from": tokens.dir.name,
        "fingerprint": tokens.fingerprint,
        "rules": [{"rule": rule, **each} for rule, each in zip(rules, counts, strict=True)],
    } | ({"not_kept": lost} if lost else {})
    key = json.dumps([manifest["source"]["fingerprint"], step], sort_keys=True)
    fingerprint = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    manifest["source"] = {**manifest["source"], "fingerprint": fingerprint}
    return {**manifest, "dropped": dropped, "derived": [*manifest.get("derived", []), step]}


def _sizes(split: Split, chosen: NDArray[np.bool_]) -> dict[str, int]:
    sizes = np.asarray(split.table["bytes"].to_numpy(), np.int64)
    return {
        "documents": int(chosen.sum()),
        "tokens": int(split.index.lengths[chosen].sum(dtype=np.int64)),
        "bytes": int(sizes[chosen].sum()),
    }
