"""A damaged checkpoint is noticed before a tensor changes, and the one before it is used."""

import json
import random
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.hardware import manifest
from poise.hardware.checkpoint import CheckpointStore

OLD, NEW = 10, 20


def state(value):
    generator = torch.Generator().manual_seed(value)
    return {"w": torch.randn(300, generator=generator), "n": torch.tensor(value)}


def filled(folder):
    store = CheckpointStore(folder)
    for step in (OLD, NEW):
        store.save(step, state(step), {"step": step})
    return store


def check_falls_back(store, why):
    target = {"w": torch.zeros(300), "n": torch.tensor(0)}
    loaded = store.load(target)
    assert loaded.step == OLD
    assert loaded.meta == {"step": OLD}
    assert torch.equal(target["w"], state(OLD)["w"])
    assert target["n"] == OLD
    (line,) = loaded.rejected
    assert line.startswith("checkpoint of step 20 is not used: ")
    assert why in line


FILES = ["__0_0.distcp", ".metadata", manifest.NAME]


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_noticed(tmp_path, name):
    """Random places in each file, its first and last bytes among them; then the whole store falls back."""
    store = filled(tmp_path)
    path = tmp_path / f"step-{NEW:08d}" / name
    whole = path.read_bytes()
    places = [0, 1, len(whole) - 2, len(whole) - 1, *random.Random(5).sample(range(len(whole)), 40)]
    target = {"w": torch.zeros(300), "n": torch.tensor(0)}
    reader = CheckpointStore(tmp_path, read_only=True)
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        assert reader.load(target).step == OLD, f"byte {place} of {len(whole)}"
    check_falls_back(store, "the manifest is damaged" if name == manifest.NAME else f"{name} is damaged")


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_edit_of_a_manifest_passes(tmp_path, data):
    if not (tmp_path / "m" / manifest.NAME).exists():
        (tmp_path / "m").mkdir()
        entry = manifest.FileEntry("a", 3, "0" * 64)
        manifest.write(
            tmp_path / "m", manifest.Manifest(1, 0.5, {"k": [1]}, (entry,), {"x": ((2,), "float32")}, {}, "2")
        )
        shutil.copy(tmp_path / "m" / manifest.NAME, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    put = data.draw(st.binary(max_size=8))
    edited = whole[:start] + put + whole[stop:]
    (tmp_path / "m" / manifest.NAME).write_bytes(edited)
    if edited == whole:
        assert manifest.read(tmp_path / "m").meta == {"k": [1]}
    else:
        with pytest.raises(manifest.Damaged):
            manifest.read(tmp_path / "m")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_truncation_is_noticed(tmp_path, name, kept):
    store = filled(tmp_path)
    path = tmp_path / f"step-{NEW:08d}" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    check_falls_back(store, "the manifest is damaged" if name == manifest.NAME else "bytes instead of")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(tmp_path, name):
    store = filled(tmp_path)
    (tmp_path / f"step-{NEW:08d}" / name).unlink()
    check_falls_back(store, "the manifest is missing" if name == manifest.NAME else f"{name} is missing")


def test_files_of_another_checkpoint_are_noticed(tmp_path):
    """A mixture: each file is whole and was committed once, but not together."""
    store = filled(tmp_path)
    shutil.copy(tmp_path / f"step-{OLD:08d}" / "__0_0.distcp", tmp_path / f"step-{NEW:08d}" / "__0_0.distcp")
    check_falls_back(store, "__0_0.distcp is damaged")


def test_an_empty_or_foreign_folder_is_noticed(tmp_path):
    store = filled(tmp_path)
    shutil.rmtree(tmp_path / f"step-{NEW:08d}")
    (tmp_path / f"step-{NEW:08d}").mkdir()
    check_falls_back(store, "the manifest is missing")


def test_damage_is_set_aside_once_and_logged(tmp_path, caplog):
    store = filled(tmp_path)
    (tmp_path / f"step-{NEW:08d}" / "__0_0.distcp").write_bytes(b"")
    check_falls_back(store, "bytes instead of")
    assert [r.levelname for r in caplog.records if r.name == "poise"] == ["WARNING"]
    assert "step 20 is not used" in caplog.text
    assert store.steps() == [OLD]
    assert (tmp_path / "step-00000020.damaged").is_dir()
    assert store.load(state(0)).rejected == []
    store.save(NEW, state(NEW), {})  # the name is free again
    (tmp_path / f"step-{NEW:08d}" / "__0_0.distcp").write_bytes(b"")
    store.load(state(0))
    assert (tmp_path / "step-00000020.damaged-1").is_dir()
    store.save(30, state(30), {})
    assert [p.name for p in tmp_path.glob("*damaged*")] == ["step-00000020.damaged-1"]


def test_what_cannot_be_read_is_passed_over_but_not_called_damaged(tmp_path, monkeypatch):
    store = filled(tmp_path)
    healthy = manifest.hash_file

    def broken(path, sync=False):
        if path.parent.name.endswith("20"):
            raise OSError(5, "Input/output error")
        return healthy(path, sync)

    monkeypatch.setattr(manifest, "hash_file", broken)
    check_falls_back(store, "cannot be read (Input/output error)")
    assert store.steps() == [OLD, NEW]


def test_all_damaged_is_one_line_that_says_so(tmp_path):
    store = filled(tmp_path)
    for step in (OLD, NEW):
        (tmp_path / f"step-{step:08d}" / ".metadata").unlink()
    target = state(5)
    before = {name: value.clone() for name, value in target.items()}
    with pytest.raises(UserError, match=r"no good checkpoint is left .*step 20.*step 10") as caught:
        store.load(target)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], target[name]) for name in target)


def test_damage_falls_back_below_at_most_too(tmp_path):
    store = filled(tmp_path)
    store.save(30, state(30), {})
    (tmp_path / f"step-{NEW:08d}" / manifest.NAME).unlink()
    loaded = store.load(state(0), at_most=25)
    assert loaded.step == OLD
    assert store.latest() == 30


def test_the_digest_covers_the_order_and_spacing(tmp_path):
    """The same values written differently are not the file that was committed."""
    filled(tmp_path)
    path = tmp_path / f"step-{NEW:08d}" / manifest.NAME
    path.write_text(json.dumps(json.loads(path.read_text())))
    with pytest.raises(manifest.Damaged):
        manifest.read(path.parent)
