"""Facts about prepared data, for ``poise data inspect``: counts, columns by name, histograms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from poise.core.errors import UserError, nearest
from poise.data.look.health import coverage
from poise.data.store import SPLITS, Split, Tokens, open_tokens

_BINS: Final = 20
_VALUES: Final = 20  # texts shown in a histogram, the commonest ones
_SKEWED: Final = 20.0  # largest value over median from which a histogram gets logarithmic bins
_NUMBER_NAMES: Final = {"tokens": "token_length"}  # what people call it, what the column is called


def describe(folder: str | Path, most: int | None = None) -> dict[str, Any]:
    """Return counts of prepared data: whole numbers, text and one ratio, ready for JSON.

    How many ids are hardly seen is in the manifest, counted when it was written in ``tokens_counted`` of the tokens.
    Where it is not (an older folder) every token is read once, in bounded memory; with ``most`` about so many of them.

    Raises:
        UserError: the folder holds no prepared data, or it is damaged.
    """
    tokens = open_tokens(folder)
    splits = [tokens.split(name) for name in SPLITS]
    known = tokens.manifest.get("vocabulary") or coverage(tokens, most)
    per_split = tokens.manifest["splits"]
    total = {key: sum(facts[key] for facts in per_split.values()) for key in ("documents", "tokens", "bytes")}
    hashes = pa.chunked_array([chunk for s in splits for chunk in s.table["content_hash"].chunks], pa.binary(16))
    return {
        "dir": str(tokens.dir),
        "source": tokens.manifest["source"]["description"],
        **total,
        "splits": {name: dict(facts) for name, facts in per_split.items()},
        "sources": {each["name"]: dict(each["splits"]) for each in tokens.manifest.get("sources", [])},
        # Each document's end of text stands for no bytes.
        "bytes_per_token": round(total["bytes"] / max(1, total["tokens"] - total["documents"]), 3),
        "duplicate_documents": total["documents"] - len(hashes.unique()),
        "longest_document": _longest(tokens, splits),
        "vocab_size": tokens.vocab_size,
        "tokens_counted": known["tokens_counted"],
        "ids_never_seen": known["never"],
        "ids_seen_under_10_times": known["under_10"],
        "replaced_bytes": tokens.manifest["replaced_bytes"],
        "skipped": dict(tokens.manifest["skipped"]),
        "dropped": dict(tokens.manifest.get("dropped", {})),
    }


def column_names(split: Split) -> tuple[str, ...]:
    """Return the names that ``column`` knows: those of ``docs.arrow``, one a score, and ``document``, ``split``."""
    names: list[str] = ["document", "split", *_NUMBER_NAMES]
    for field in split.table.schema:
        if pa.types.is_struct(field.type):
            names += [f"{field.name}.{inner.name}" for inner in field.type]
        else:
            names.append(field.name)
    return tuple(names)


def column(split: Split, name: str) -> pa.Array:
    """Return one fact about every document of a split, (N,): numbers or text, null where it is not known.

    ``scores.compression`` is a score, ``compression`` the same where no column has that name; hashes come as
    hexadecimal text; ``document`` is the number in the split and ``split`` its name.

    Raises:
        UserError: there is no such column.
    """
    known = column_names(split)
    name = _NUMBER_NAMES.get(name, name)
    if name == "document":
        return pa.array(np.arange(split.table.num_rows))
    if name == "split":
        return pa.repeat(split.name, split.table.num_rows)
    if name not in known:
        leaves = [whole for whole in known if whole.rpartition(".")[2] == name]
        if len(leaves) != 1:
            raise UserError(f"no column '{name}'{nearest(name, known)}; the columns are {', '.join(known)}")
        name = leaves[0]
    whole, _, inner = name.partition(".")
    values = split.table[whole].combine_chunks()
    if isinstance(values, pa.ChunkedArray):  # of an empty table
        values = pa.nulls(0, split.table.schema.field(whole).type)
    if inner:
        values = pc.struct_field(values, inner)
    if pa.types.is_fixed_size_binary(values.type):
        values = pa.array([None if value is None else value.hex() for value in values.to_pylist()], pa.string())
    return values


def histogram(folder: str | Path, name: str, *, bins: int = _BINS) -> dict[str, Any]:
    """Return how a column is distributed over the documents of both splits, ready for JSON.

    Numbers: ``edges`` (bins + 1) and ``counts`` (bins), ``quantiles``; the bins grow like a logarithm if ``log``. A bin
    holds its lower edge, the last one both. Text: ``values``, the commonest first, and ``others``. ``missing`` counts
    documents for which it is not known.

    Raises:
        UserError: the folder holds no prepared data, or has no such column, or nothing is known in it.
    """
    if bins < 1:
        raise UserError(f"a histogram of {bins} bins has none; give 1 or more")
    tokens = open_tokens(folder)
    values = pa.concat_arrays([column(tokens.split(split), name) for split in SPLITS])
    missing = values.null_count
    values = values.drop_null()
    facts: dict[str, Any] = {"column": name, "documents": len(values), "missing": missing}
    if len(values) == 0:
        raise UserError(f"column '{name}' of '{folder}' is empty: that stage did not run; choose another")
    if pa.types.is_string(values.type):
        return facts | _of_text(values)
    return facts | _of_numbers(np.asarray(values).astype(np.float64), bins)


def bars(facts: Mapping[str, Any], width: int = 40) -> list[str]:
    """Return a histogram as lines of text with bars of at most ``width`` characters."""
    if "values" in facts:
        rows = [(_shortened(str(value)), count) for value, count in facts["values"]]
        rows += [("(others)", facts["others"])] if facts["others"] else []
    else:
        edges = [f"{edge:,.4g}" if abs(edge) < 1e4 else f"{edge:,.0f}" for edge in facts["edges"]]
        wide = max(map(len, edges))
        rows = [
            (f"{low:>{wide}} .. {high:>{wide}}", count)
            for low, high, count in zip(edges[:-1], edges[1:], facts["counts"], strict=True)
        ]
    rows += [("(not known)", facts["missing"])] if facts["missing"] else []
    most, total = max(count for _, count in rows), sum(count for _, count in rows)
    label, number = max(len(text) for text, _ in rows), max(len(f"{count:,}") for _, count in rows)
    return [
        f"{text:<{label}}  {count:>{number},}  {count / total:6.1%}  {'#' * -(-count * width // max(1, most))}".rstrip()
        for text, count in rows
    ]


def _of_text(values: pa.StringArray) -> dict[str, Any]:
    counted = sorted(
        ((entry["values"], entry["counts"]) for entry in pc.value_counts(values).to_pylist()),
        key=lambda entry: (-entry[1], entry[0]),
    )
    shown = counted[:_VALUES]
    return {
        "values": [list(entry) for entry in shown],
        "distinct": len(counted),
        "others": sum(count for _, count in counted[_VALUES:]),
    }


def _of_numbers(values: NDArray[np.float64], bins: int) -> dict[str, Any]:
    values = values[np.isfinite(values)]
    if len(values) == 0:
        raise UserError("the column holds no finite number; choose another")
    low, high, middle = float(values.min()), float(values.max()), float(np.median(values))
    log = low >= 0 and high > _SKEWED * max(middle, 1.0)
    whole = bool((values == np.round(values)).all())
    if low == high:
        edges = np.array([low, low])
    elif whole and high - low < bins:
        edges = np.arange(low, high + 2)
    elif log:
        edges = np.expm1(np.linspace(np.log1p(low), np.log1p(high), bins + 1))
        edges[0], edges[-1] = low, high
    else:
        edges = np.linspace(low, high, bins + 1)
    if whole and log:
        edges = np.unique(np.floor(edges))  # a bin without a whole number in it would look like a gap
    counts = np.histogram(values, edges)[0] if low < high else np.array([len(values)])
    quantiles = np.quantile(values, (0.01, 0.1, 0.5, 0.9, 0.99))
    return {
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "log": log,
        "mean": float(values.mean()),
        "quantiles": dict(zip(("1%", "10%", "50%", "90%", "99%"), quantiles.tolist(), strict=True)),
    }


def _shortened(text: str, most: int = 48) -> str:
    clean = "".join(c if c.isprintable() else " " for c in text)
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def _longest(tokens: Tokens, splits: list[Split]) -> dict[str, Any]:
    found: dict[str, Any] = {"tokens": 0, "split": "", "document": 0, "origin": ""}
    for split in splits:
        if len(split.index.lengths) == 0:
            continue
        number = int(np.argmax(split.index.lengths))
        length = int(split.index.lengths[number])
        if length > found["tokens"]:
            origin = split.table["origin"][number].as_py()
            found = {"tokens": length, "split": split.name, "document": number, "origin": origin}
    return found
