"""Event files as TensorBoard's writers make them, and as crashes leave them."""

from __future__ import annotations

import gzip
import math
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.postmortem import Log, read_log
from poise.postmortem.readers import dense, tensorboard, tfrecord, wire
from poise.postmortem.readers.source import RESTARTED, Block, Item, Rewound, Source

REAL = sorted((Path(__file__).resolve().parents[3] / "shared" / "logs").glob("events.out.tfevents.*"))

# -- a writer ------------------------------------------------------------------------------------------


def bitwise(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


TABLE = [bitwise(byte) for byte in range(256)]


def crc32c(data: bytes) -> int:
    """As TFRecord writes it: masked."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def framed(payload: bytes) -> bytes:
    size = struct.pack("<Q", len(payload))
    return size + struct.pack("<I", crc32c(size)) + payload + struct.pack("<I", crc32c(payload))


def varint(n: int) -> bytes:
    n &= 2**64 - 1
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def field(number: int, value: bytes | int | float) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def event(step: int, *values: bytes, wall: float = 1.7e9, more: bytes = b"") -> bytes:
    head = b"\x09" + struct.pack("<d", wall) + (field(2, step) if step else b"")
    return framed(head + more + (field(5, b"".join(field(1, value) for value in values)) if values else b""))


def simple(tag: str, value: float) -> bytes:
    return field(1, tag.encode()) + field(2, float(value))


def tensor(tag: str, body: bytes, plugin: str = "scalars") -> bytes:
    metadata = field(9, field(1, field(1, plugin.encode()))) if plugin else b""
    return field(1, tag.encode()) + field(8, body) + metadata


VERSION = event(0, more=field(3, b"brain.Event:2"))
START = field(7, field(1, 1))


def run(steps: range, tags: tuple[str, ...] = ("lm loss", "grad-norm", "learning-rate")) -> bytes:
    return b"".join(event(step, simple(tag, step + 0.25 * i)) for step in steps for i, tag in enumerate(tags))


def read(tmp_path: Path, data: bytes, name: str = "events.out.tfevents.1700000000.host.7.0") -> Log:
    path = tmp_path / name
    path.write_bytes(data)
    return read_log(path)


def items(*paths: Path) -> list[Item]:
    return list(tensorboard.read(Source(paths[0], paths)))


def said(log: Log, text: str) -> bool:
    return any(text in note for note in log.notes)


def points(found: list[Item], column: str) -> list[tuple[float, float]]:
    out: list[tuple[float, float]] = []
    for item in found:
        if isinstance(item, Block) and column in item.columns:
            out += zip(item.columns["step"].tolist(), item.columns[column].tolist(), strict=True)
        elif isinstance(item, dict) and column in item:
            out.append((item["step"], item[column]))
    return out


# -- scalars -------------------------------------------------------------------------------------------


def test_simple_values(tmp_path: Path) -> None:
    log = read(tmp_path, VERSION + run(range(1, 501)))
    assert log.format == "tensorboard"
    for name, offset in (("loss", 0.0), ("grad_norm", 0.25), ("lr", 0.5)):
        steps, values = log.series[name]
        assert steps.tolist() == list(range(1, 501))
        assert values.tolist() == [step + offset for step in range(1, 501)]
    assert not any("left out" in note for note in log.notes)


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (field(1, 1) + field(2, b"") + field(5, struct.pack("<f", 1.5)), 1.5),
        (field(1, 1) + field(2, b"") + varint(5 << 3 | 5) + struct.pack("<f", 1.5), 1.5),
        (field(1, 1) + field(2, field(2, field(1, 1))) + field(4, struct.pack("<f", 1.5)), 1.5),
        (field(1, 2) + field(6, struct.pack("<d", 1e-300)), 1e-300),
        (field(1, 2) + field(4, struct.pack("<d", 1e-300)), 1e-300),
        (field(1, 9) + field(10, varint(-7)), -7.0),
        (field(1, 9) + field(10, 2**40), 2.0**40),
        (field(1, 9) + field(4, struct.pack("<q", -7)), -7.0),
        (field(1, 3) + field(7, varint(-3)), -3.0),
        (field(1, 23) + field(17, varint(2**63)), 2.0**63),
        (field(1, 19) + field(13, varint(0x3E00)), 1.5),
        (field(1, 19) + field(4, struct.pack("<e", -0.5)), -0.5),
        (field(1, 14) + field(13, varint(0x3FC0)), 1.5),
        (field(1, 1) + field(2, b""), 0.0),
        (field(1, 1) + field(5, struct.pack("<f", math.inf)), math.inf),
    ],
)
def test_tensor_values(tmp_path: Path, body: bytes, value: float) -> None:
    data = VERSION + b"".join(event(step, tensor("train/loss", body)) for step in range(3))
    steps, values = read(tmp_path, data).series["loss"]
    assert steps.tolist() == [0, 1, 2]
    assert values.tolist() == [value] * 3


def test_tensors_change_from_step_to_step(tmp_path: Path) -> None:
    data = VERSION
    for step in range(300):
        body = field(1, 1) + field(2, b"") + field(5, struct.pack("<f", step / 2))
        wide = field(1, 2) + field(2, b"") + field(6, struct.pack("<d", step / 3))
        data += event(step, tensor("loss", body, "scalars" if step == 0 else ""), tensor("lr", wide))
    log = read(tmp_path, data)
    assert log.series["loss"][1].tolist() == [step / 2 for step in range(300)]
    assert log.series["lr"][1].tolist() == [step / 3 for step in range(300)]


def test_nan_inf_and_large_steps(tmp_path: Path) -> None:
    steps = [0, 5, 2**31, 2**31 + 1, 2**52]
    values = [math.nan, math.inf, -math.inf, 1.0, 2.0]
    data = VERSION + b"".join(event(s, simple("loss", v)) for s, v in zip(steps, values, strict=True))
    found_steps, found = read(tmp_path, data).series["loss"]
    assert found_steps.tolist() == steps
    np.testing.assert_array_equal(found, values)


def test_a_signalling_nan_is_a_nan(tmp_path: Path) -> None:
    plain = event(2, simple("loss", 2.0))
    payload = plain[12:-8] + b"\x01\x00\xa0\x7f"
    log = read(tmp_path, VERSION + event(1, simple("loss", 1.0)) + framed(payload) + event(3, simple("loss", 3.0)))
    np.testing.assert_array_equal(log.series["loss"][1], [1.0, math.nan, 3.0])


def test_steps_beyond_what_a_float_counts_are_left_out(tmp_path: Path) -> None:
    log = read(tmp_path, VERSION + run(range(1, 4)) + event(2**62, simple("lm loss", 1.0)) + event(-(2**63)))
    assert log.series["loss"][0].tolist() == [1, 2, 3]
    assert said(log, "without a whole number")


def test_other_summaries_are_passed_over_and_texts_are_settings(tmp_path: Path) -> None:
    histogram = field(1, b"weights") + field(5, struct.pack("<d", 1.0) * 40)
    picture = field(1, b"attention") + field(4, field(4, bytes(5_000)))
    vector = tensor("vector", field(1, 1) + field(2, field(2, field(1, 3))) + field(4, bytes(12)), "")
    tensors = tensor("hist", field(1, 2) + field(6, struct.pack("<d", 9.0)), "histograms")
    text = tensor("args/text_summary", field(1, 7) + field(8, b'{"seed": 42, "optim": {"lr": 1e-3}}'), "text")
    single = tensor("global_batch_size/text_summary", field(1, 7) + field(8, b"64"), "text")
    prose = tensor("sample/text_summary", field(1, 7) + field(8, b"Once\nupon a time"), "text")
    data = VERSION + event(0, text) + event(0, single) + event(0, prose)
    for step in range(1, 30):
        data += event(step, histogram, simple("loss", step), picture, vector, tensors)
    source_path = tmp_path / "e.tfevents"
    source_path.write_bytes(data)
    log = read_log(source_path)
    assert log.series.keys() == {"loss"}
    assert log.series["loss"][1].tolist() == list(range(1, 30))
    assert log.settings == {"seed": "42", "optim.lr": "0.001", "global_batch_size": "64"}


def test_tags_over_samples_do_not_mix_with_steps(tmp_path: Path) -> None:
    data = VERSION
    for step in range(1, 50):
        data += event(step, simple("lm loss", step)) + event(64 * step, simple("lm loss vs samples", step))
    log = read(tmp_path, data)
    assert log.series["loss"][0].tolist() == list(range(1, 50))
    assert said(log, "counted by samples")


def test_a_tag_called_step_is_not_the_step(tmp_path: Path) -> None:
    data = VERSION + b"".join(event(s, simple("step", 7), simple("loss", s)) for s in range(1, 20))
    assert read(tmp_path, data).series["loss"][0].tolist() == list(range(1, 20))


def test_sparse_tags_keep_their_own_steps(tmp_path: Path) -> None:
    data = VERSION
    for step in range(1, 101):
        data += event(step, simple("loss", step))
        if step % 7 == 0:
            data += event(step, simple("eval/loss", step / 2))
    log = read(tmp_path, data)
    assert log.series["loss"][0].tolist() == list(range(1, 101))
    assert log.series["val_loss"][0].tolist() == list(range(7, 101, 7))
    assert log.series["val_loss"][1].tolist() == [step / 2 for step in range(7, 101, 7)]


# -- damage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 5, 20, 30, 41])
def test_last_record_cut_off(tmp_path: Path, cut: int) -> None:
    log = read(tmp_path, (VERSION + run(range(1, 50), ("loss",)))[:-cut])
    assert log.series["loss"][0].tolist() == list(range(1, 49))
    assert said(log, "the last record is cut off")


@pytest.mark.parametrize("place", [2, 9, 14, 30, -2])
@pytest.mark.parametrize("which", [0, 20, 48])
def test_one_flipped_bit_costs_one_record(tmp_path: Path, place: int, which: int) -> None:
    records = [event(step, simple("loss", step)) for step in range(1, 50)]
    broken = bytearray(records[which])
    broken[place] ^= 0x10
    records[which] = bytes(broken)
    log = read(tmp_path, VERSION + b"".join(records))
    assert log.series["loss"][0].tolist() == [step for step in range(1, 50) if step != which + 1]
    assert said(log, "damaged record left out") or (which == 48 and said(log, "cut off"))


def test_the_log_goes_on_after_a_torn_record_and_after_garbage(tmp_path: Path) -> None:
    torn = event(50, simple("loss", 50.0))[:25]
    data = VERSION + run(range(1, 50), ("loss",)) + torn + run(range(51, 60), ("loss",))
    data += bytes(1000) + random.Random(0).randbytes(3000) + run(range(60, 70), ("loss",))
    log = read(tmp_path, data)
    assert log.series["loss"][0].tolist() == [*range(1, 50), *range(51, 70)]
    assert said(log, "damaged record")


def test_a_torn_record_longer_than_the_rest_of_the_file(tmp_path: Path) -> None:
    torn = event(9, field(1, b"x") + field(4, bytes(3000)))[:40]
    log = read(tmp_path, VERSION + run(range(1, 9), ("loss",)) + torn + run(range(10, 13), ("loss",)))
    assert log.series["loss"][0].tolist() == [*range(1, 9), 10, 11, 12]
    assert said(log, "damaged record")


def test_records_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = VERSION + run(range(1, 20)) + event(20, field(1, b"x") + field(4, bytes(3000))) + run(range(21, 30))
    whole = read(tmp_path, data, "a.tfevents").series["loss"]
    for chunk in (7, 64, 1000):
        monkeypatch.setattr(tfrecord, "CHUNK", chunk)
        log = read(tmp_path, data, "a.tfevents")
        np.testing.assert_array_equal(log.series["loss"], whole)
        assert not any("left out" in note for note in log.notes)
    monkeypatch.setattr(tfrecord, "MAX_RECORD", 2000)
    log = read(tmp_path, data, "a.tfevents")
    np.testing.assert_array_equal(log.series["loss"], whole)
    assert said(log, "left out")


def test_damage_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(VERSION + run(range(1, 60), ("loss",)))
    size = len(event(1, simple("loss", 1.0)))
    for step in (10, 11, 30):
        data[len(VERSION) + (step - 1) * size + 9] ^= 0xFF  # the length's checksum
    for chunk in (13, 64, 1 << 20):
        monkeypatch.setattr(tfrecord, "CHUNK", chunk)
        log = read(tmp_path, bytes(data))
        assert log.series["loss"][0].tolist() == [s for s in range(1, 60) if s not in (10, 11, 30)], chunk


def test_packed(tmp_path: Path) -> None:
    packed = gzip.compress(VERSION + run(range(1, 800)))
    assert len(read(tmp_path, packed, "e.tfevents.gz").series["loss"][0]) == 799
    steps, _ = read(tmp_path, packed[: len(packed) // 2], "e.tfevents.gz").series["loss"]
    assert 100 < len(steps) < 790


# -- recognising ---------------------------------------------------------------------------------------


def test_sniff(tmp_path: Path) -> None:
    def score(data: bytes) -> float:
        path = tmp_path / "x"
        path.write_bytes(data)
        return tensorboard.sniff(Source(path))

    whole = VERSION + run(range(1, 3))
    assert score(whole) == 1.0
    assert score(bytes([whole[0] ^ 1]) + whole[1:]) >= 0.9  # its first length is damaged
    assert score(run(range(1, 3))) > 0  # the first record is gone
    assert score(framed(b"\x0a\x05hello")) == 0.0  # records of something else
    for text in (b'w.add("\x1abrain.Event:2")\n', b"step,loss\n1,2.5\n2,2.25\n", b"", b"\x00" * 30):
        assert score(text) == 0.0


def test_only_a_version_record_is_a_mistake_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no loss in"):
        read(tmp_path, VERSION)


# -- several files, restarts ---------------------------------------------------------------------------


def files(tmp_path: Path, *contents: bytes, pids: tuple[int, ...] = ()) -> list[Path]:
    paths = []
    for i, content in enumerate(contents):
        paths.append(tmp_path / f"events.out.tfevents.{1700000000 + i}.host.{(pids or (7,) * 9)[i]}.{i}")
        paths[-1].write_bytes(content)
    return paths


def test_a_later_file_that_goes_back_is_a_restart(tmp_path: Path) -> None:
    found = items(*files(tmp_path, VERSION + run(range(1, 101)), VERSION + run(range(81, 121))))
    assert found.count(RESTARTED) == 1
    at = found.index(RESTARTED)
    assert points(found[:at], "lm loss")[-1][0] == 100 and points(found[at:], "lm loss")[0][0] == 81


@pytest.mark.parametrize(("pids", "restarts"), [((7, 7), 0), ((7, 8), 1)])
def test_a_later_file_that_goes_on(tmp_path: Path, pids: tuple[int, ...], restarts: int) -> None:
    paths = files(tmp_path, VERSION + run(range(1, 101)), VERSION + run(range(101, 121)), pids=pids)
    found = items(*paths)
    assert found.count(RESTARTED) == restarts
    assert [step for step, _ in points(found, "lm loss")] == list(range(1, 121))


def test_a_closing_evaluation_in_its_own_file_is_no_restart(tmp_path: Path) -> None:
    evaluation = VERSION + event(100, simple("eval/loss", 3.0))
    first = VERSION + run(range(1, 101)) + event(100, simple("eval/loss", 3.0))
    found = items(*files(tmp_path, first, evaluation))
    assert RESTARTED not in found and points(found, "eval/loss") == [(100, 3.0), (100, 3.0)]


def test_a_start_record_takes_back_what_it_says(tmp_path: Path) -> None:
    data = VERSION + run(range(1, 101)) + event(95, more=START) + run(range(97, 121))
    path = tmp_path / "e.tfevents"
    path.write_bytes(data)
    found = items(path)
    at = found.index(RESTARTED)
    assert found[at + 1] == Rewound(94)
    assert read_log(path).series["loss"][0].tolist() == [*range(1, 95), *range(97, 121)]


def test_a_start_record_before_anything_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "e.tfevents"
    path.write_bytes(VERSION + event(0, more=START) + run(range(20)))
    assert RESTARTED not in items(path)


# -- rows ----------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), max_size=60),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=150)
def test_rows_lose_nothing_and_keep_the_order(written: list[tuple[int, int]], rises: int) -> None:
    """Whatever is written comes out once, by column in the order written: rising steps, starting over, or wild."""
    if rises:
        written = sorted(written, key=lambda pair: pair[0]) * rises
    steps = np.array([step for step, _ in written], dtype=np.int64)
    columns = np.array([column for _, column in written], dtype=np.int64)
    values = np.arange(len(written), dtype=np.float64)
    names = ["a", "b", "c", "d"]
    out = list(dense.rows(steps, columns, values, names))
    for i, name in enumerate(names):
        assert points(out, name) == [(float(s), float(v)) for v, (s, c) in enumerate(written) if c == i]


def test_rows_of_other_columns_but_one_width_are_parted() -> None:
    steps = np.repeat(np.arange(40), 2)
    columns = np.array([0, 1] * 20 + [1, 2] * 20)
    out = list(dense.rows(steps, columns, np.arange(80.0), ["a", "b", "c"]))
    assert [set(item.columns) for item in out if isinstance(item, Block)] == [{"step", "a", "b"}, {"step", "b", "c"}]


def test_rows_of_equal_columns_are_blocks() -> None:
    steps = np.repeat(np.arange(100), 3)
    out = list(dense.rows(steps, np.tile(np.arange(3), 100), np.arange(300.0), ["a", "b", "c"]))
    assert len(out) == 1 and isinstance(out[0], Block)


# -- the wire ------------------------------------------------------------------------------------------


def test_wire() -> None:
    data = field(1, 300) + field(2, b"ab") + field(3, 1.5) + b"\x21" + bytes(8)
    assert [(n, k, v) for n, k, v, _ in wire.fields(data)] == [
        (1, 0, 300),
        (2, 2, b"ab"),
        (3, 5, struct.pack("<f", 1.5)),
        (4, 1, bytes(8)),
    ]
    assert [end for *_, end in wire.fields(data)][-1] == len(data)
    for bad in (b"\x0b", b"\x12\x05ab", b"\x80" * 11, b"\x08", b"\x0d\x01", b"\x02\x01a"):
        with pytest.raises(wire.Malformed):
            list(wire.fields(bad))


def test_checksums_of_any_length() -> None:
    rng = random.Random(3)
    blobs = [rng.randbytes(rng.randrange(1, 70)) for _ in range(50)]
    starts = np.cumsum([0, *map(len, blobs)])[:-1]
    raw = np.frombuffer(b"".join(blobs), dtype=np.uint8)
    found = tfrecord.checksums(raw, starts, np.array([len(blob) for blob in blobs]))
    assert found.tolist() == [crc32c(blob) for blob in blobs]


# -- fuzz, real file -----------------------------------------------------------------------------------


def mutated(data: bytes, seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    for _ in range(60):
        out = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(out))
            match rng.randrange(5):
                case 0:
                    out[at] ^= 1 << rng.randrange(8)
                case 1:
                    del out[at : at + rng.randrange(1, 60)]
                case 2:
                    out[at:at] = rng.randbytes(rng.randrange(1, 60))
                case 3:
                    out[at : at + 8] = bytes(8)
                case 4:
                    other = rng.randrange(len(out))
                    out[at : at + 50], out[other : other + 50] = out[other : other + 50], out[at : at + 50]
            out = out or bytearray(b"x")
        yield bytes(out)


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_files_never_crash(tmp_path: Path, seed: int) -> None:
    data = VERSION + run(range(1, 30)) + event(30, tensor("t", field(1, 1) + field(5, struct.pack("<f", 1.5))))
    path = tmp_path / "e.tfevents"
    for broken in mutated(data, seed):
        path.write_bytes(broken)
        for step, value in points(items(path), "lm loss"):
            assert step == value  # whatever is read has its checksum


@pytest.mark.skipif(not REAL, reason="the real file is not here")
def test_real_file() -> None:
    log = read_log(REAL[0])
    for name in ("loss", "grad_norm", "lr"):
        assert log.series[name][0].tolist() == list(range(10_001, 12_001))
    steps, norms = log.series["grad_norm"]
    assert steps[norms.argmax()] == 10_822 and norms.max() == np.float32(3.9078)
