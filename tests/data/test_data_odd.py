"""What is odd about a document."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from poise.data.clean.features import FEATURES
from poise.data.look import odd as module
from poise.data.look.odd import AT, odd, quantiles
from poise.data.store import DOCUMENT_SCHEMA, Tokens


def table(lengths: list[int], digits: list[float | None]) -> pa.Table:
    kind = DOCUMENT_SCHEMA.field("scores").type
    zeros = dict.fromkeys(FEATURES, 0.0)
    scores = [None if digit is None else zeros | {"digits": digit} for digit in digits]
    return pa.table({"token_length": pa.array(lengths, pa.int32()), "scores": pa.array(scores, kind)})


def test_quantiles_by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).permutation(1001)
    found = quantiles(table(values.tolist(), [v / 1000 for v in values.tolist()]))
    assert found["token_length"] == [round(q * 1000) for q in AT]
    assert np.allclose(found["digits"], AT, atol=1e-6)
    assert not {"characters", "words"} & set(found)  # they only say how long it is
    monkeypatch.setattr(module, "ROWS", 100)  # of a large corpus every so many
    some = quantiles(table(sorted(values.tolist()), [None] * 1001))
    assert set(some) == {"token_length"} and abs(some["token_length"][AT.index(0.5)] - 500) <= 10
    assert quantiles(table([], [])) == {}


def test_the_manifest_has_them(cleaned: Tokens) -> None:
    lengths = cleaned.split("train").table["token_length"].to_numpy()
    found = cleaned.manifest["quantiles"]
    assert np.allclose(found["token_length"], np.quantile(lengths, AT), rtol=1e-5)
    assert {"entropy", "digits"} <= set(found)


def test_what_is_odd_in_words() -> None:
    known = {"token_length": [float(n) for n in range(len(AT))], "digits": [0.0] * 5 + [0.1] * 6}
    high, low = AT.index(0.99), AT.index(0.01)
    plain = {"token_length": 5, "scores": {"digits": 0.05}, "repeat_count": None, "cluster_size": 1}
    assert odd(plain, known, 100, 32) == []
    assert odd({"token_length": 5}, known, 100, 32) == []
    (long,) = odd(plain | {"token_length": high + 1}, known, 100, 32)
    assert long.startswith("token_length 9 is above 99.0% of the documents")
    assert odd(plain | {"token_length": high + 1}, known, 10**4, 32) == []  # one of 10,000 has to be rarer
    (short,) = odd(plain | {"token_length": low - 1}, known, 100, 32)
    assert short.startswith("token_length 1 is below 99.0%")
    (digits,) = odd(plain | {"scores": {"digits": 0.5}}, known, 100, 32)
    assert digits.startswith("digits 0.5 is above 99.0% of the documents (")
    repeats = {"repeat_count": 32, "repeat_tokens": 1234}
    assert odd(plain | repeats, known, 100, 33) == []
    assert odd(plain | repeats, known, 100, 32) == ["an n-gram of it repeats itself 32 times (1,234 tokens)"]
    assert odd(plain | {"replaced_bytes": 7}, known, 100, 32) == ["7 bytes of it were not readable text"]
    assert odd(plain | {"cluster_size": 2}, known, 100, 32) == ["it had 1 near or equal copy"]
    assert odd(plain | {"cluster_size": 9}, known, 100, 32) == ["it had 8 near or equal copies"]
