"""What the store keeps, gives back and refuses, on a healthy disk."""

import json
import logging
import math

import pytest
import torch
from torch import nn

from poise.core.errors import UserError
from poise.hardware.checkpoint import CheckpointStore, NonFiniteState
from poise.hardware.state import pack


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def adamw(model, **changes):
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 7e-4}]
    return torch.optim.AdamW(groups, lr=0.1 / 3, betas=(0.9, 0.95), fused=True, **changes)


def train(model, optimizer, first, last):
    losses = []
    for step in range(first, last + 1):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.param_groups[0]["lr"] *= 0.97
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def same(a, b):
    """Equal in every bit and every type, through all nesting."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def number(value):
    return {"x": torch.full((5,), float(value))}


def test_adamw_continues_bit_equal(tmp_path):
    straight, broken = small_model(), small_model()
    optimizer = adamw(straight)
    expected = train(straight, optimizer, 1, 8)

    first = adamw(broken)
    got = train(broken, first, 1, 4)
    store = CheckpointStore(tmp_path / "c")
    store.save(4, pack(broken, first), {})
    fresh = small_model(seed=9)
    second = adamw(fresh)
    loaded = store.restore(fresh, second)
    assert loaded.step == 4
    assert same(dict(broken.state_dict()), dict(fresh.state_dict()))
    assert same(first.state_dict(), second.state_dict())
    got += train(fresh, second, 5, 8)

    assert got == expected
    assert same(dict(straight.state_dict()), dict(fresh.state_dict()))
    assert same(optimizer.state_dict(), second.state_dict())


def test_restore_into_a_used_optimizer_goes_back(tmp_path):
    """A rollback in the running process: newer moments are overwritten, down to having none at all."""
    model = small_model()
    optimizer = adamw(model)
    store = CheckpointStore(tmp_path)
    store.save(0, pack(model, optimizer), {})
    once = train(model, optimizer, 1, 3)
    store.save(3, pack(model, optimizer), {})
    train(model, optimizer, 4, 6)
    store.restore(model, optimizer, at_most=2)
    assert not optimizer.state_dict()["state"]
    assert train(model, optimizer, 1, 3) == once


def test_float32_moments_of_bfloat16_weights_keep_their_digits(tmp_path):
    weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    model = nn.ParameterList([weight])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    fine = torch.tensor([1.0 + 2**-20, 1 / 3, 1e-30, 5.0])
    optimizer.state[weight] = {"momentum_buffer": fine.clone()}
    store = CheckpointStore(tmp_path)
    store.save(1, pack(model, optimizer), {})
    fresh = nn.ParameterList([nn.Parameter(torch.ones(4, dtype=torch.bfloat16))])
    other = torch.optim.SGD(fresh.parameters(), lr=1.0, momentum=0.9)
    store.restore(fresh, other)
    assert same(other.state[fresh[0]]["momentum_buffer"], fine)


def test_nested_state_and_meta_come_back_exactly(tmp_path):
    state = {
        "a": {
            0: torch.arange(5),
            "0x": (0.1 + 0.2, [None, True, "text", -7], {}),
            "bits": torch.tensor([True, False]),
            "scalar": torch.tensor(3.0, dtype=torch.float64),
            "empty": torch.zeros(0, 4),
            "half": torch.tensor([1 / 3], dtype=torch.bfloat16),
            "rng": torch.get_rng_state(),
            "view": torch.arange(12.0).reshape(3, 4).t(),
        },
    }
    meta = {"guard": {"best": math.inf, "window": [0.1, math.nan]}, "position": 2**60, "name": "Größe \u2028"}
    store = CheckpointStore(tmp_path)
    store.save(7, state, meta, metric=2.5)
    template = {
        "a": {0: torch.zeros(5, dtype=torch.int64)}
        | {k: torch.empty_like(v) for k, v in state["a"].items() if isinstance(v, torch.Tensor)}
    }
    loaded = store.load(template)
    assert same(loaded.state, state)
    assert same(loaded.meta, meta)
    assert template["a"]["rng"] is not state["a"]["rng"]
    assert torch.equal(template["a"]["rng"], state["a"]["rng"])  # in place


def test_only_plain_values_are_taken(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError, match="state 'a/1' is a set"):
        store.save(1, {"a": [torch.ones(1), {1, 2}]}, {})
    with pytest.raises(TypeError, match=r"meta 'g\.x' is a Tensor"):
        store.save(1, number(1), {"g": {"x": torch.ones(1)}})
    with pytest.raises(TypeError, match="keys are text"):
        store.save(1, number(1), {"g": {1: 2}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_non_finite_tensors_are_never_committed(tmp_path, dtype, bad):
    store = CheckpointStore(tmp_path)
    store.save(1, number(1), {})
    before = sorted(path.name for path in tmp_path.rglob("*"))
    tensor = torch.zeros(1000, dtype=dtype)
    tensor[617] = bad
    with pytest.raises(NonFiniteState, match="'w/bad'") as caught:
        store.save(2, {"w": {"good": torch.ones(3), "bad": tensor}}, {})
    assert caught.value.names == ["w/bad"]
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_non_finite_moment_is_refused_and_large_values_are_not(tmp_path):
    model = small_model()
    optimizer = adamw(model)
    train(model, optimizer, 1, 1)
    store = CheckpointStore(tmp_path)
    moment = optimizer.state[model[0].weight]["exp_avg_sq"]
    moment[0, 0] = torch.finfo(torch.float32).max  # a sum of squares would overflow, the state is finite
    moment[0, 1] = torch.finfo(torch.float32).max
    store.save(1, pack(model, optimizer), {})
    moment[0, 0] = math.nan
    with pytest.raises(NonFiniteState, match="'optimizer/state/0/exp_avg_sq'"):
        store.save(2, pack(model, optimizer), {})
    assert store.steps() == [1]


def test_complex_and_float8_are_looked_at(tmp_path):
    store = CheckpointStore(tmp_path)
    fine = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    store.save(1, {"x": fine, "c": torch.tensor([1 + 2j])}, {})
    with pytest.raises(NonFiniteState) as caught:
        store.save(2, {"x": torch.tensor([math.nan]).to(torch.float8_e4m3fn), "c": torch.tensor([1j * math.inf])}, {})
    assert caught.value.names == ["x", "c"]


def test_keeps_the_last_and_the_best(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2, keep_best=1)
    metrics = [(0, math.nan), (1, -math.inf), (2, 3.0), (3, math.nan), (4, None), (5, 4.0), (6, 3.5)]
    for step, metric in metrics:
        store.save(step, number(step), {}, metric)
    assert store.steps() == [2, 5, 6], "what is not finite is not the best"
    store.save(7, number(7), {}, 3.0)  # as good as step 2, and newer
    assert store.steps() == [6, 7]


def test_keep_last_one_keeps_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=0)
    for step in (1, 2, 3):
        store.save(step, number(step), {}, -step)
        assert store.steps() == [step]
    with pytest.raises(UserError, match="keep_last is 0"):
        CheckpointStore(tmp_path, keep_last=0)
    with pytest.raises(UserError, match="keep_best is -1"):
        CheckpointStore(tmp_path, keep_best=-1)


def test_latest_and_at_most(tmp_path):
    store = CheckpointStore(tmp_path / "a" / "b")
    assert store.steps() == []
    assert store.latest() is None
    for step in (10, 20, 30):
        store.save(step, number(step), {"step": step})
    assert store.latest() == 30
    assert store.latest(29) == 20
    assert store.latest(9) is None
    x = number(0)
    assert store.load(x, at_most=25).meta == {"step": 20}
    assert x["x"][0] == 20
    with pytest.raises(UserError, match="no checkpoint of step 9 or before"):
        store.load(x, at_most=9)


def test_saving_a_step_again_replaces_it_and_ends_the_history_there(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=5)
    for step in (10, 20, 30):
        store.save(step, number(step), {})
    store.save(20, number(21), {})
    assert store.steps() == [10, 20]
    x = number(0)
    assert store.load(x).step == 20
    assert x["x"][0] == 21
    store.save(25, number(25), {})
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [
        "step-00000010",
        "step-00000020",
        "step-00000025",
    ]


def test_discard_after_hides_newer_checkpoints_at_once(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (10, 20, 30):
        store.save(step, number(step), {})
    store.discard_after(10)
    assert store.steps() == [10]
    assert CheckpointStore(tmp_path).latest() == 10


def test_another_recipe_is_one_line_and_changes_nothing(tmp_path):
    store = CheckpointStore(tmp_path)
    model = small_model()
    store.save(3, pack(model, adamw(model)), {"recipe": "abc"})
    wide = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 3))
    before = {k: v.clone() for k, v in wide.state_dict().items()}
    with pytest.raises(UserError, match=r"another recipe: 'model/0.weight' is 8x6 there and 9x6 here") as caught:
        store.restore(wide, adamw(wide))
    assert "\n" not in str(caught.value)
    assert same(before, dict(wide.state_dict()))
    with pytest.raises(UserError, match="its recipe is 'abc', here it is 'xyz'"):
        store.restore(model, adamw(model), expect={"recipe": "xyz"})
    with pytest.raises(UserError, match="its optimizer is AdamW, here it is SGD"):
        store.restore(model, torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(UserError, match=r"'model/0\.weight' is float32 there and bfloat16 here"):
        store.load({"model": small_model().bfloat16().state_dict()})
    with pytest.raises(UserError, match=r"it has 'model/2\.bias', which is not wanted here"):
        store.load({"model": {k: v for k, v in model.state_dict().items() if k != "2.bias"}})
    with pytest.raises(UserError, match="'model/more' is not in it"):
        store.load({"model": {**model.state_dict(), "more": torch.ones(1)}})
    assert store.steps() == [3]  # nobody's fault but the reader's: not set aside


def test_other_parameter_groups_are_another_recipe(tmp_path):
    store = CheckpointStore(tmp_path)
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1, 1)
    store.save(1, pack(model, optimizer), {})
    with pytest.raises(UserError, match="another recipe: its optimizer has parameter groups of"):
        store.restore(model, adamw(model))


def test_a_section_can_be_loaded_alone(tmp_path):
    store = CheckpointStore(tmp_path)
    model = small_model()
    optimizer = adamw(model)
    train(model, optimizer, 1, 2)
    store.save(2, {**pack(model, optimizer), "ema": number(4)}, {})
    other = small_model(seed=3)
    loaded = store.load({"model": other.state_dict()})
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert list(loaded.state) == ["model"]
    extra = {"ema": number(0)}
    assert list(store.restore(other, adamw(other), extra=extra).state) == ["model", "optimizer", "ema"]
    assert extra["ema"]["x"][0] == 4


def test_a_read_only_store_leaves_everything_as_it_is(tmp_path):
    CheckpointStore(tmp_path).save(1, number(1), {})
    (tmp_path / "step-00000002.partial-1").mkdir()
    store = CheckpointStore(tmp_path, read_only=True)
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(UserError, match="the manifest is missing"):
        store.load(number(0))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [
        "step-00000001",
        "step-00000002.partial-1",
    ]
    assert CheckpointStore(tmp_path / "none", read_only=True).steps() == []
    assert not (tmp_path / "none").exists()


def test_leftovers_are_cleaned_at_the_start(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, number(1), {})
    (tmp_path / "step-00000002.partial-123").mkdir()
    (tmp_path / "step-00000002.partial-123" / "__0_0.distcp").write_bytes(b"x")
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001.replaced-123")  # died between two renames
    (tmp_path / "notes.txt").write_text("mine")
    again = CheckpointStore(tmp_path)
    assert again.steps() == [1]
    assert again.load(number(0)).step == 1
    names = {path.name for path in tmp_path.iterdir()}
    assert {"notes.txt", "step-00000001"} == names - {"attempts.json"}


def test_saved_says_size_and_speed(tmp_path):
    saved = CheckpointStore(tmp_path).save(1, {"x": torch.zeros(50_000)}, {})
    files = [p for p in saved.path.iterdir() if p.name != "manifest.json"]
    assert saved.bytes == sum(p.stat().st_size for p in files) > 200_000
    assert saved.bytes_per_second == pytest.approx(saved.bytes / saved.seconds)


def test_the_manifest_is_plain_json_with_every_file(tmp_path):
    saved = CheckpointStore(tmp_path).save(1, number(1), {"a": 1}, metric=0.5)
    values = json.loads((saved.path / "manifest.json").read_text())
    assert values["format"] == 1
    assert values["tensors"] == {"x": [[5], "float32"]}
    assert {entry["name"] for entry in values["files"]} == {
        p.name for p in saved.path.iterdir() if p.name != "manifest.json"
    }


def test_a_newer_format_is_no_damage(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("poise.hardware.manifest.FORMAT", 2)
    store = CheckpointStore(tmp_path)
    store.save(1, number(1), {})
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="format 2, this version reads 1"):
        store.load(number(0))
    assert store.steps() == [1]
