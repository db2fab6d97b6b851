"""The same four tests for every method in the table; a method without a twin fails.

off      the model without the method is what it was; the identity setting, if there is one, is bit-equal
acts     the method changes loss, gradients or starting values
resumes  stopping in the middle and loading gives the same bits as going on
parity   the loss of the model equals a plain NumPy transcription of the whole forward pass, in float64
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.model.reference_decoder import Reference
from tests.model.twin import all_twins

from poise.model.build import build
from poise.model.methods import METHODS, apply_methods, load
from poise.model.spec import Spec

TINY = Spec(vocab_size=31, seq_len=12, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24)

TWINS = all_twins()
NAMES = [name for name in METHODS if name in TWINS]


def plain_of(name: str) -> Spec:
    return replace(TINY, **TWINS[name].sizes)


def treated_of(name: str) -> Spec:
    return apply_methods(plain_of(name), TWINS[name].settings or (name,))


def batch(seed: int = 0, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TINY.vocab_size, (rows, TINY.seq_len + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def outcome(spec: Spec, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Loss and gradients of one step of a fresh model."""
    model = build(spec, seed=1, compute_dtype=dtype)
    out = model(*batch())
    out.loss.backward()
    return {"loss": out.loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def ends(name: str, endings: Any) -> bool:
    return any(name.endswith(ending) for ending in endings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_off_equals_absent(name: str, dtype: torch.dtype) -> None:
    known, plain, on = TWINS[name], plain_of(name), treated_of(name)
    before = outcome(plain, dtype)
    treated_outcome = outcome(on, dtype)
    assert all(torch.isfinite(value).all() for value in treated_outcome.values())
    after = outcome(plain, dtype)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    old, new = (dict(build(s, seed=1).named_parameters()) for s in (plain, on))
    lost = [key for key in old if key not in new or not torch.equal(old[key], new[key])]
    assert all(ends(key, known.replaces) for key in lost), f"taken away or started otherwise, unsaid: {lost}"
    assert all(any(key.endswith(ending) for key in lost) for ending in known.replaces), "said, but not so"

    if known.identity:
        off = outcome(apply_methods(plain, known.identity), dtype)
        assert before.keys() <= off.keys()
        assert all(torch.equal(before[key], off[key]) for key in before)


@pytest.mark.parametrize("name", NAMES)
def test_acts(name: str) -> None:
    before, after = outcome(plain_of(name)), outcome(treated_of(name))
    shared = [key for key in before if key in after and key != "loss"]
    # Some methods leave the loss of the first step as it is and change gradients only, and some the step alone.
    changed = [key for key in shared if (before[key] - after[key]).norm() > 1e-6 * before[key].norm()]
    said = bool(build(treated_of(name), seed=1, device="meta").lr_multipliers())
    acts_later = getattr(load(name), "ACTS_LATER", "")
    assert changed or before["loss"] != after["loss"] or said or acts_later, f"{name} is inert"


@pytest.mark.parametrize("name", NAMES)
def test_resumes(name: str) -> None:
    spec = treated_of(name)

    def steps(model: Any, optimizer: Any, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            model(*batch(step)).loss.backward()
            optimizer.step()

    model = build(spec, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    start = copy.deepcopy(model.state_dict())
    steps(model, optimizer, 0, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), spec.to_dict()))
    steps(model, optimizer, 3, 6)

    other = build(Spec.from_dict(saved[2]), seed=2)  # other starting values: only the state may bring them back
    again = torch.optim.AdamW(other.parameters(), lr=1e-2)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    steps(other, again, 3, 6)
    straight, resumed = model.state_dict(), other.state_dict()
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    names = [key for key, _ in model.named_parameters()]
    moved = [key for key in names if not torch.equal(straight[key], start[key])]
    assert [k for k in names if not ends(k, TWINS[name].still)] == [k for k in moved if not ends(k, TWINS[name].still)]


def parity(spec: Spec, reference: type, outside: tuple[str, ...], tolerance: float) -> tuple[float, dict[str, Any]]:
    model = build(spec, seed=3, compute_dtype=torch.float64).eval()
    with torch.no_grad():  # away from the start, where gains are 1 and branches are small
        for seed, (key, param) in enumerate(model.named_parameters()):
            if not ends(key, outside):
                param += 0.3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)).double()
    weights = {key: value.detach().double().numpy() for key, value in model.state_dict().items()}
    inputs, targets = batch(rows=1)
    wanted = reference(weights, spec).loss(inputs[0].numpy(), targets[0].numpy())
    assert model(inputs, targets).loss.item() == pytest.approx(wanted, rel=tolerance)
    return wanted, weights


def test_the_plain_decoder_equals_its_transcription() -> None:
    for changes in ({}, {"tied": False}):
        parity(replace(TINY, **changes), Reference, (), 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_parity_with_a_plain_transcription(name: str) -> None:
    known = TWINS[name]
    parity(treated_of(name), known.reference, known.outside, known.tolerance)


def test_every_method_has_its_twin_and_a_full_header() -> None:
    assert set(TWINS) == set(METHODS)
    for name in METHODS:
        header = load(name).__doc__ or ""
        for word in ("Citation:", "Formula:", "Differs from the paper in:", "Cost:", "Acts:", "Off:", "Numerics:"):
            assert word in header, f"{name}: the header lacks '{word}'"
        assert load(name).CARD.name == name and load(name).CARD.kind == "model"
