"""The journal survives crashes and gives back what was written."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core import journal
from poise.core.errors import UserError
from poise.core.journal import FIELDS, Journal, read, timeline


def step(number, **more):
    values = {"step": number, "loss": 2.0, "grad_norm": 1.0, "lr": 1e-3, "tokens": 10 * number}
    return values | more


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


def test_writes_one_line_a_record_and_reads_it_back(path):
    log = Journal(path)
    written = [
        log.write("step", **step(1, loss=0.1 + 0.2)),
        log.write("eval", step=1, loss=3.0),
        log.write("save", step=1, path="checkpoints/step-1", text="line\nbreak \u2028 Größe"),
    ]
    log.close()
    assert read(path) == written
    assert written[0]["type"] == "step"
    assert written[0]["loss"] == 0.1 + 0.2
    assert abs(written[0]["time"] - path.stat().st_mtime) < 5
    assert len(path.read_text().split("\n")) == 4


def test_a_record_is_on_its_way_to_the_disk_when_write_returns(path):
    log = Journal(path)
    log.write("step", **step(1))
    assert [r["step"] for r in read(path)] == [1]
    log.sync()
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.write("step", **step(2))


def test_a_missing_field_or_unknown_type_is_a_bug(path):
    log = Journal(path)
    with pytest.raises(AssertionError, match="grad_norm"):
        log.write("step", step=1, loss=1.0, lr=0.1, tokens=1)
    with pytest.raises(KeyError):
        log.write("stpe", step=1)
    log.close()
    assert path.read_text() == ""


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_non_finite_numbers_are_valid_json_and_come_back(path, value, text):
    log = Journal(path)
    log.write("step", **step(1, loss=value, extra={"layers": [1.0, value]}))
    log.close()
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["loss"] == text
    (record,) = read(path)
    for got in (record["loss"], record["extra"]["layers"][1]):
        assert isinstance(got, float)
        assert got == value or (math.isnan(got) and math.isnan(value))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text().filter(lambda s: s not in journal._NON_FINITE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(value=JSON)
@settings(max_examples=100, deadline=None)
def test_any_value_survives(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("j") / "journal.jsonl"
    log = Journal(path)
    log.write("event", **dict.fromkeys(FIELDS["event"], value))
    log.close()
    (record,) = read(path)
    assert repr(record["value"]) == repr(value)  # repr: NaN is not equal to itself


@given(cut=st.integers(1, 120))
@settings(max_examples=30, deadline=None)
def test_a_torn_last_line_costs_that_line_only(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("j") / "journal.jsonl"
    log = Journal(path)
    log.write("step", **step(1))
    whole = path.stat().st_size
    log.write("step", **step(2, note="Größe"))
    log.close()
    data = path.read_bytes()
    keep = max(len(data) - cut, whole)
    path.write_bytes(data[:keep])
    lost = keep < len(data) - 1  # without its line end, the record itself is whole
    assert [r["step"] for r in read(path)] == ([1] if lost else [1, 2])

    log = Journal(path)
    log.write("step", **step(3))
    log.close()
    assert [r["step"] for r in read(path)] == ([1, 3] if lost else [1, 2, 3])


def test_foreign_lines_are_left_out(path):
    log = Journal(path)
    log.write("step", **step(1))
    log.close()
    with path.open("ab") as file:
        file.write(b'\nhello\n[1, 2]\n17\n{"type": "other"}\n{"no": "type"}\n\xff\xfe\x00\n{"type": ["step"]}\n')
    log = Journal(path)
    log.write("step", **step(2))
    log.close()
    assert [r["step"] for r in read(path)] == [1, 2]


def test_reading_nothing(path):
    with pytest.raises(FileNotFoundError):
        read(path)
    path.touch()
    assert read(path) == []


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Journal(tmp_path / "gone" / "journal.jsonl")


def records(text):
    """ "1 2 e2 r1 3" is steps 1 and 2, an evaluation after 2, a rollback to 1, step 3."""
    out = []
    for i, word in enumerate(text.split()):
        match word[0]:
            case "e":
                out.append({"type": "eval", "step": int(word[1:]), "at": i})
            case "r":
                out.append({"type": "rollback", "step": 99, "to": int(word[1:]), "at": i})
            case "s":
                out.append({"type": "save", "step": int(word[1:]), "path": "", "at": i})
            case _:
                out.append({"type": "step", "step": int(word), "at": i})
    return out


@pytest.mark.parametrize(
    ("written", "counts"),
    [
        ("", []),
        ("1 2 3", [0, 1, 2]),
        ("1 2 e2 3 s3", [0, 1, 2, 3]),
        ("1 2 3 2 3", [0, 3, 4]),  # resumed from 1
        ("1 2 e2 3 e3 3", [0, 1, 2, 5]),  # resumed from 2: its evaluation counts, that of 3 does not
        ("1 2 3 4 r2 3", [0, 1, 5]),
        ("1 2 e2 3 e3 r2", [0, 1, 2]),  # ended right after a rollback
        ("1 2 3 r1 2 3 r1", [0]),
        ("1 2 3 1", [3]),  # from scratch
    ],
)
def test_timeline_is_the_history_that_counts(written, counts):
    assert [r["at"] for r in timeline(records(written))] == counts


@given(st.lists(st.tuples(st.sampled_from(["step", "rollback"]), st.integers(0, 12)), max_size=30))
@settings(max_examples=200, deadline=None)
def test_timeline_steps_always_ascend_and_the_last_one_wins(events):
    written = []
    for i, (kind, number) in enumerate(events):
        written.append({"type": kind, "step": number, "to": number, "at": i})
    kept = timeline(written)
    numbers = [r["step"] for r in kept]
    assert numbers == sorted(set(numbers))
    for record in kept:
        later = [r for r in written[record["at"] + 1 :] if r["type"] == "step"]
        assert all(r["step"] > record["step"] for r in later)


def test_one_writer_at_a_time(tmp_path):
    """A second process (here: a second opening) that would write into the same run is refused in one line."""
    first = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(UserError, match="another process is writing") as error:
        Journal(tmp_path / "journal.jsonl")
    assert "\n" not in str(error.value)
    first.close()
    Journal(tmp_path / "journal.jsonl").close()
