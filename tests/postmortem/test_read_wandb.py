"""W&B's binary files, and its CSV exports."""

from __future__ import annotations

import json
import math
import random
import struct
import zlib
from pathlib import Path

import pytest

from poise.core.errors import UserError
from poise.postmortem import Log, read_log
from poise.postmortem.readers import wandb_file
from poise.postmortem.readers.source import RESTARTED, Source

# -- a writer ------------------------------------------------------------------------------------------

BLOCK = 1 << 15


def logged(records: list[bytes], header: bytes = b":W&B\xe1\xbe\x00") -> bytes:
    """Put records into blocks as LevelDB's log format says."""
    out = bytearray(header)
    for record in records:
        rest, first = record, True
        while first or rest:
            room = BLOCK - len(out) % BLOCK
            if room < 7:
                out += bytes(room)
                continue
            part, rest = rest[: room - 7], rest[room - 7 :]
            kind = (1 if first else 4) if not rest else (2 if first else 3)
            out += struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part
            first = False
    return bytes(out)


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def item(name: str | tuple[str, ...], value: str) -> bytes:
    path = field(1, name.encode()) if isinstance(name, str) else b"".join(field(2, part.encode()) for part in name)
    return path + field(16, value.encode())


def history(step: int, **values: object) -> bytes:
    return raw_history(step, *(item(name, json.dumps(value)) for name, value in values.items()))


def raw_history(step: int, *items: bytes) -> bytes:
    inside = b"".join(field(1, item) for item in items) + field(2, field(1, step) if step else b"")
    return field(1, step + 3) + field(2, inside) + field(200, field(1, b"stream"))


def config(*items: bytes) -> bytes:
    return field(17, field(1, b"abcd1234") + field(4, b"".join(field(1, item) for item in items)))


EXIT = field(18, b"")


def write(tmp_path: Path, data: bytes, name: str = "run-abcd1234.wandb") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def read(tmp_path: Path, *records: bytes) -> Log:
    return read_log(write(tmp_path, logged([*records, EXIT])))


def said(log: Log, text: str) -> bool:
    return any(text in note for note in log.notes)


# -- history -------------------------------------------------------------------------------------------


def test_history(tmp_path: Path) -> None:
    log = read(tmp_path, *(history(i, loss=3.0 - i / 100, grad_norm=1, lr=i * 1e-3, _step=i) for i in range(200)))
    assert log.format == "wandb"
    assert log.series["loss"][0].tolist() == list(range(200))
    assert log.series["loss"][1].tolist() == [3.0 - i / 100 for i in range(200)]
    assert log.series["lr"][1].tolist() == [i * 1e-3 for i in range(200)]
    assert not any("left out" in note or "killed" in note for note in log.notes)


def test_the_step_of_the_record_where_no_item_says_it(tmp_path: Path) -> None:
    log = read(tmp_path, *(history(i, loss=2.0) for i in (0, 5, 300, 2**40)))
    assert log.series["loss"][0].tolist() == [0, 5, 300, 2**40]


def test_the_users_own_step_counts(tmp_path: Path) -> None:
    records = []
    for i in range(50):
        fields = {"train/loss": 2.0, "train/global_step": 10 * i, "_step": 2 * i}
        records.append(raw_history(2 * i, *(item((name,), json.dumps(value)) for name, value in fields.items())))
        records.append(raw_history(2 * i + 1, item(("_step",), str(2 * i + 1)), item(("gpu",), "7")))
    log = read(tmp_path, *records)
    assert log.series["loss"][0].tolist() == list(range(0, 500, 10))


def test_paths_and_objects_are_one_column_each(tmp_path: Path) -> None:
    new = raw_history(1, item(("opt", "deep", "x"), "5"), item(("train/loss",), "2.5"))
    old = raw_history(2, item("opt", '{"deep": {"x": 6}}'), item("train/loss", "2.25"))
    log = read(tmp_path, new, old)
    assert log.series["opt.deep.x"][1].tolist() == [5.0, 6.0]
    assert log.series["loss"][1].tolist() == [2.5, 2.25]


@pytest.mark.parametrize(
    ("text", "value"),
    [("NaN", math.nan), ('"NaN"', math.nan), ("Infinity", math.inf), ('"-Infinity"', -math.inf), ("-1e3", -1000.0)],
)
def test_values_that_are_no_plain_numbers(tmp_path: Path, text: str, value: float) -> None:
    log = read(tmp_path, raw_history(1, item("loss", text)), raw_history(2, item("loss", "2.0")))
    found = log.series["loss"][1].tolist()
    assert found[1] == 2.0 and (found[0] == value or (math.isnan(value) and math.isnan(found[0])))


def test_texts_flags_and_media_are_no_columns(tmp_path: Path) -> None:
    histogram = {"_type": "histogram", "values": [1, 2], "bins": [0, 1, 2]}
    odd = {"text": "hello", "digits": "12", "flag": True, "none": None, "hist": histogram, "list": [1, 2]}
    log = read(tmp_path, history(1, loss=2.0, **odd), history(2, loss=1.0, **odd))
    assert log.series.keys() == {"loss"}


def test_a_name_with_the_bytes_of_a_key_in_it(tmp_path: Path) -> None:
    """The value's key is looked for by its bytes; a name that holds them must not be cut there."""
    name = "x\u0081\u0001y".encode("latin-1")
    odd = [field(1, name + b"\x82\x01" + tail) + field(16, b"7") for tail in (b"a", b"bb")]
    records = [raw_history(i, *odd, item("loss", str(i)), item("loss" * 40, str(i))) for i in range(1, 6)]
    log = read(tmp_path, *records)
    assert log.series["loss"][1].tolist() == [1, 2, 3, 4, 5]
    assert log.series["loss" * 40][1].tolist() == [1, 2, 3, 4, 5]
    assert sorted(values.tolist() for key, (_, values) in log.series.items() if key.startswith("x")) == [[7.0] * 5] * 2


def test_long_values_and_further_fields(tmp_path: Path) -> None:
    """A name is known again by its bytes; the value behind it may be long, or not the last."""
    long = "1" + "0" * 200 + "e-200"
    items = [item("loss", "1.0"), item("loss", "2.0") + field(20, b"new"), item("loss", long), item("loss", "3.0")]
    log = read(tmp_path, *(raw_history(i, found) for i, found in enumerate(items)))
    assert log.series["loss"][1].tolist() == [1.0, 2.0, 1.0, 3.0]


def test_config_is_settings(tmp_path: Path) -> None:
    nested = item("model", '{"dim": 128, "rope": {"base": 1e4}, "layers": [1, 2]}')
    plain = [item("lr", "0.0003"), item("_wandb", '{"v": 1}'), item("none", "null"), item("name", '"x y"')]
    later = field(5, field(1, item(("model", "late"), "7")) + field(1, item("batch", '{"desc": null, "value": 64}')))
    log = read(tmp_path, config(*plain, nested), history(1, loss=2.0), later)
    assert log.settings == {
        "lr": "0.0003",
        "name": "x y",
        "model.dim": "128",
        "model.rope.base": "10000.0",
        "model.layers": "[1, 2]",
        "model.late": "7",
        "batch": "64",
    }


def test_how_the_run_ended(tmp_path: Path) -> None:
    records = [history(i, loss=2.0) for i in range(3)]
    killed = read_log(write(tmp_path, logged(records)))
    assert said(killed, "no closing record")
    failed = read_log(write(tmp_path, logged([*records, field(18, field(1, 255))])))
    assert said(failed, "exit code 255") and not said(failed, "killed")


# -- framing and damage --------------------------------------------------------------------------------


def many(count: int = 3000) -> list[bytes]:
    return [history(i, loss=float(i), _step=i) for i in range(count)]


def test_records_across_blocks(tmp_path: Path) -> None:
    long = raw_history(500, item("loss", "500.0"), item("table", json.dumps("x" * 100_000)))
    records = many(500) + [long] + [history(i, loss=float(i)) for i in range(501, 2000)]
    data = logged([*records, EXIT])
    assert len(data) > 5 * BLOCK
    log = read_log(write(tmp_path, data))
    assert log.series["loss"][1].tolist() == [float(i) for i in range(2000)]
    assert not said(log, "left out")


@pytest.mark.parametrize("left", range(9))
def test_every_rest_of_a_block(tmp_path: Path, left: int) -> None:
    first = history(0, loss=0.0)
    fill = BLOCK - 7 - (7 + len(first)) - 7 - left
    filler = field(13, bytes(fill - len(field(13, bytes(fill))) + fill))
    data = logged([first, filler, history(1, loss=1.0), history(2, loss=2.0), EXIT])
    assert (len(logged([first, filler])) - BLOCK) == -left
    assert read_log(write(tmp_path, data)).series["loss"][1].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("cut", [1, 3, 7, 20, 30])
def test_cut_off(tmp_path: Path, cut: int) -> None:
    log = read_log(write(tmp_path, logged(many(100))[:-cut]))
    assert log.series["loss"][0].tolist() == list(range(99))
    assert said(log, "cut off") or cut >= len(logged([many(1)[0]])) - 14


def test_a_flipped_bit_costs_one_record(tmp_path: Path) -> None:
    data = bytearray(logged([*many(), EXIT]))
    at = len(logged(many(1000))) + 20  # in the data of the next record
    data[at] ^= 4
    log = read_log(write(tmp_path, bytes(data)))
    assert log.series["loss"][0].tolist() == [i for i in range(3000) if i != 1000]
    assert said(log, "damaged record left out")


def test_a_damaged_length_costs_a_block_at_most(tmp_path: Path) -> None:
    data = bytearray(logged([*many(), EXIT]))
    at = len(logged(many(1000)))
    data[at + 4 : at + 6] = b"\xff\xff"
    kept = read_log(write(tmp_path, bytes(data))).series["loss"][0].tolist()
    assert kept[:1000] == list(range(1000)) and kept[-1] == 2999 and len(kept) > 2000


def test_a_lost_block_in_a_long_record(tmp_path: Path) -> None:
    long = raw_history(50, item("loss", "50.0"), item("table", json.dumps("x" * 100_000)))
    data = bytearray(logged([*many(50), long, *(history(i, loss=float(i)) for i in range(51, 60)), EXIT]))
    data[BLOCK + 100 : BLOCK + 110] = bytes(10)
    log = read_log(write(tmp_path, bytes(data)))
    assert log.series["loss"][0].tolist() == [i for i in range(60) if i != 50]
    assert said(log, "damaged record left out") and not said(log, "no message")


def test_sniff(tmp_path: Path) -> None:
    def score(data: bytes) -> float:
        return wandb_file.sniff(Source(write(tmp_path, data)))

    assert score(logged(many(3))) == 1.0
    assert score(logged(many(3), header=b":W&B\xe1\xbf\x01")) == 0.9
    for other in (b":W&B is a tracker\nstep,loss\n1,2\n", b"step,loss\n1,2\n", b"", b":W&B"):
        assert score(other) == 0.0


def test_nothing_in_it_is_a_mistake_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no loss in"):
        read(tmp_path, config(item("lr", "1")))


def test_parts_of_a_resumed_run(tmp_path: Path) -> None:
    first = write(tmp_path, logged([history(i, loss=1.0) for i in range(10)]), "a.wandb")
    second = write(tmp_path, logged([*(history(i, loss=2.0) for i in range(8, 12)), EXIT]), "b.wandb")
    found = list(wandb_file.read(Source(first, (first, second))))
    assert found[10] is RESTARTED and found.count(RESTARTED) == 1 and found[11] == {"loss": 2.0, "_step": 8.0}


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_never_crash(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = logged([config(item("lr", "1")), *many(40), EXIT])
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(broken))
            match rng.randrange(4):
                case 0:
                    broken[at] ^= 1 << rng.randrange(8)
                case 1:
                    del broken[at : at + rng.randrange(1, 60)]
                case 2:
                    broken[at:at] = rng.randbytes(rng.randrange(1, 60))
                case 3:
                    broken[at : at + 8] = bytes(8)
        path = write(tmp_path, bytes(broken))
        for row in wandb_file.read(Source(path)):
            assert isinstance(row, dict) and row["loss"] == row["_step"]  # whatever is read has its checksum


# -- CSV export ----------------------------------------------------------------------------------------

EXPORT = (
    '"Step","run-7 - train/loss","run-7 - train/loss__MIN","run-7 - train/loss__MAX"\n'
    '"0","7.5","7.5","7.5"\n"10","NaN","NaN","NaN"\n"20","2.25","2.0","2.5"\n"30","Infinity","2.0","Infinity"\n'
)


def test_csv_export(tmp_path: Path) -> None:
    log = read_log(write(tmp_path, EXPORT.encode(), "wandb_export.csv"))
    assert log.format == "table"
    steps, values = log.series["loss"]
    assert steps.tolist() == [0, 10, 20, 30]
    assert values[0] == 7.5 and math.isnan(values[1]) and values[2] == 2.25 and values[3] == math.inf


def test_csv_export_over_the_users_own_step(tmp_path: Path) -> None:
    text = '"train/global_step","a - _step","a - _step__MIN","a - _step__MAX","a - train/loss","a - train/loss__MIN"\n'
    for step, cells in ((10, '"1","1","1","2.5","2.5"'), (20, '"2","2","2","2.25","2.25"'), (30, '"3","3","3","",""')):
        text += f'"{step}",{cells}\n'
    log = read_log(write(tmp_path, text.encode(), "wandb_export.csv"))
    assert log.series["loss"][0].tolist() == [10, 20]
