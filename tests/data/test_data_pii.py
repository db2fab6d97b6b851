"""What is masked, what is left alone, and that rows never touch each other."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.data import record
from poise.data.clean.pii import PLACEHOLDERS, MaskPII
from poise.data.readers import Document

EMAIL, IP, CARD, SECRET = (PLACEHOLDERS[kind] for kind in ("email", "ip", "card", "secret"))

# Made for this test; put together here, so that no scanner takes this file for a leak.
AWS = "AKIA" + "IOSFODNN7EXAMPLQ"
GITHUB = "gh" + "p_" + "aB3" * 12
PEM = "-----BEGIN RSA PRIVATE" + " KEY-----\n" + "MIIEpAIBAAKCAQEA75\n" * 4 + "-----END RSA PRIVATE" + " KEY-----"


def batch(*texts: str) -> pa.RecordBatch:
    return record.of([Document(text, "s", f"{n}", 0, 0) for n, text in enumerate(texts)])


def masked(*texts: str) -> list[str]:
    out = MaskPII()(batch(*texts))
    out.validate(full=True)
    return list(out.column("text").to_pylist())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to jane.doe+x@mail.uni-bonn.de.", f"write to {EMAIL}."),
        ("<a_b@c.io>, -- d@e.co.uk", f"<{EMAIL}>, -- {EMAIL}"),
        ("naïve: größe@post.de", f"naïve: größ{EMAIL}"),  # the ASCII part of a name with umlauts goes
        ("mailto:me@there.org?subject=x", f"mailto:{EMAIL}?subject=x"),
        ("from 8.8.104.200 port 22", f"from {IP} port 22"),
        ("http://93.184.216.34/x", f"http://{IP}/x"),
        ("[2606:2800:220:1:248:1893:25c8:1946]:80", f"[{IP}]:80"),
        ("at 2001:4860:4860::8888.", f"at {IP}."),
        ("card 4111 1111 1111 1111, ok", f"card {CARD}, ok"),
        ("5555555555554444", CARD),
        ("4111 1111 1111 1111 12/27", f"{CARD} 12/27"),
        ("amex 3782-822463-10005", f"amex {CARD}"),
        ("diners 30569309025904", f"diners {CARD}"),
        (f"key={AWS};", f"key={SECRET};"),
        (f'"{GITHUB}"', f'"{SECRET}"'),
        (f"a\n{PEM}\nb", f"a\n{SECRET}\nb"),
        ("token hf_" + "aZ" * 17 + " and npm_" + "a1" * 18, f"token {SECRET} and {SECRET}"),
        ("hf_" + "aZ" * 17, SECRET),
        ("xoxb-123456789012-abcdefghijkl", SECRET),
    ],
)
def test_what_is_masked(text: str, expected: str) -> None:
    assert masked(text) == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "@decorator\ndef f(x): return a @ b",
        "x@y, user@localhost, user@example.com, me@mail.example.org",
        "A@B.transpose(0, 1) and A@B.T",
        "git clone git@host:owner/name",
        "127.0.0.1 10.200.3.4 192.168.1.100 203.0.113.7 224.0.0.251",
        "policy 3.5.5.0, dpkg (1.16.4.2), v120.1.2.3, Chrome/119.0.0.0, 1.2.3.400, 5.120.1.2.3",
        "std::dead::beef 12:34:56 2023:10:12 11:22:33 [::2] 2001:db8::1 fe80::1",
        "4111 1111 1111 1112",  # wrong check digit
        "2000 4111 1111 1111 1111 and 4111 1111 1111 1111 1234",  # a table
        "4111111111111111.5 and 0.4111111111111111 and x4111111111111111",
        "20230101120000 1234567890123 0000000000000000",
        "call +49 228 731234 or 555-0199",  # phone numbers stay, see the module's head
        "task_live_x thp_ ghp_short hf_model AKIAshort xoxo- -----BEGIN CERTIFICATE-----",
        "",
    ],
)
def test_what_stays(text: str) -> None:
    assert masked(text) == [text]


def test_counts_are_per_document_and_other_columns_stay() -> None:
    before = batch("a@b.de c@d.de", "clean", f"{AWS} 4111111111111111 e@f.org")
    before = record.drop(before, np.array([False, False, True]), "x.y")
    after = MaskPII()(before)
    assert after.column("masked").type == pa.int32() and after.column("masked").to_pylist() == [2, 0, 3]
    assert after.column("text").to_pylist()[2] == f"{SECRET} {CARD} {EMAIL}"
    assert after.drop_columns(["masked", "text"]).equals(before.drop_columns(["text"]))
    assert before.column("text")[0].as_py() == "a@b.de c@d.de"  # the input is not changed


def test_a_clean_batch_keeps_its_very_buffers() -> None:
    before = batch("nothing", "to see @ here 1.2.3")
    assert MaskPII()(before).column("text").buffers()[2].address == before.column("text").buffers()[2].address


def test_nothing_is_found_across_rows() -> None:
    token = "hf_" + "aZ" * 17
    for whole in ("me@there.org", "8.8.104.200", "2001:4860:4860::8888", "4111111111111111", AWS, GITHUB, token):
        for cut in range(1, len(whole)):
            first, second = masked(whole[:cut], whole[cut:])
            assert [first, second] == [masked(whole[:cut])[0], masked(whole[cut:])[0]]
        assert masked(whole) != [whole]
        # What stands in other rows has no say in whether something is a word of its own.
        assert masked("x9", whole, "9x") == ["x9", masked(whole)[0], "9x"]


def test_sliced_batches_and_chosen_kinds() -> None:
    whole = batch("skip a@b.de", "8.8.104.200 a@b.de ü", "c@d.de")
    part = MaskPII(("email",))(whole.slice(1, 1))
    assert part.column("text").to_pylist() == [f"8.8.104.200 {EMAIL} ü"]
    with pytest.raises(UserError, match="email"):
        MaskPII(("emial",))


def test_it_is_picklable_and_empty_batches_pass() -> None:
    stage = pickle.loads(pickle.dumps(MaskPII()))
    assert stage == MaskPII() and stage(batch()).num_rows == 0


PIECES = [
    "me@there.org", "8.8.104.200", "4111111111111111", AWS, GITHUB, "@", ".", ":", "é", "日", "\n", " ", "x", "9", "-",
    "_", "2001:4860:4860::8888", "-----BEGIN PRIVATE KEY-----", "🙂", "hf_", "1.2.3.4",
]  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), max_size=5))
def test_rows_are_masked_as_they_are_alone(texts: list[str]) -> None:
    once = masked(*texts)
    assert once == [masked(text)[0] for text in texts]
    # What is outside the placeholders is what was there, in its order.
    for text, new in zip(texts, once, strict=True):
        parts = re.split("|".join(PLACEHOLDERS.values()), new)
        assert re.fullmatch(".+?".join(map(re.escape, parts)), text, re.S)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join))
def test_masking_again_finds_nothing_new(text: str) -> None:
    once = masked(text)
    assert masked(*once) == once


def test_flat_text_is_the_bytes_of_the_rows() -> None:
    data, offsets = record.flat(pa.array(["", "aé", "", "b"]).slice(1))
    assert data.tobytes() == "aéb".encode() and offsets.tolist() == [0, 3, 3, 4]
