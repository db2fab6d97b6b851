"""The same four tests for every method in the table; a method without a parity entry fails.

off      the model without the method is what it was; the identity setting, if there is one, is bit-equal
acts     the method changes loss or gradients
resumes  stopping in the middle and loading gives the same bits as going on
parity   the loss of the model equals a plain NumPy transcription of the whole forward pass, in float64

Shapes: T positions, D width, H heads, K head width, V vocabulary; the reference takes one sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from poise.model.build import build
from poise.model.methods import METHODS, apply_methods, load
from poise.model.spec import Spec

TINY = Spec(
    vocab_size=31,
    seq_len=12,
    n_layers=2,
    d_model=16,
    n_heads=4,
    n_kv_heads=2,
    d_ff=24,
)
Array = NDArray[np.float64]

IDENTITY: Mapping[str, str | None] = {
    "qk_norm": None,
    "z_loss": "z_loss:coefficient=0",
    "embed_norm": None,
    "embed_scale": "embed_scale:factor=1",
}
"""The setting with which a method does nothing; None where it has none."""


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_off_equals_absent(name: str, dtype: torch.dtype) -> None:
    before = outcome(TINY, dtype)
    on = apply_methods(TINY, [name])
    outcome(on, dtype)
    after = outcome(TINY, dtype)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    plain, treated = (dict(build(s, seed=1).named_parameters()) for s in (TINY, on))
    shared = plain.keys() & treated.keys()
    assert shared == plain.keys(), "a method took away parameters: state here which"
    assert all(torch.equal(plain[key], treated[key]) for key in shared), "starting values moved"

    identity = IDENTITY[name]
    if identity is not None:
        off = outcome(apply_methods(TINY, [identity]), dtype)
        assert off.keys() == before.keys()
        assert all(torch.equal(before[key], off[key]) for key in before)


@pytest.mark.parametrize("name", METHODS)
def test_acts(name: str) -> None:
    before, after = outcome(TINY), outcome(apply_methods(TINY, [name]))
    key = "embedding.weight"
    assert before["loss"] != after["loss"]
    assert (before[key] - after[key]).norm() > 1e-6 * before[key].norm()


@pytest.mark.parametrize("name", METHODS)
def test_resumes(name: str) -> None:
    spec = apply_methods(TINY, [name])

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
    moved = [key for key in straight if not torch.equal(straight[key], start[key])]
    assert moved == list(straight), "a parameter of the method does not train"


# --- parity: the decoder written out in NumPy, with hooks that a method may replace ---


def rms(x: Array, gain: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + TINY.norm_eps) * gain


def rope(x_HTK: Array) -> Array:
    half = x_HTK.shape[-1] // 2
    turn = np.exp(1j * np.arange(x_HTK.shape[1])[:, None] * TINY.rope_theta ** (-np.arange(half) / half))
    z = (x_HTK[..., :half] + 1j * x_HTK[..., half:]) * turn
    return np.concatenate([z.real, z.imag], -1)


def logsumexp(x: Array) -> Array:
    top = x.max(-1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[..., 0]


def reference(
    w: Mapping[str, Array],
    ids: NDArray[np.int64],
    targets: NDArray[np.int64],
    embed: Callable[[Array, Mapping[str, Array]], Array] = lambda x, w: x,
    qk: Callable[[Array, Mapping[str, Array], str], Array] = lambda x, w, name: x,
    term: Callable[[Array], float] = lambda logits: 0.0,
) -> float:
    """Loss of one sequence, by the formulas of the papers."""
    T, H, G, K = len(ids), TINY.n_heads, TINY.n_kv_heads, TINY.head_dim
    x_TD = embed(w["embedding.weight"][ids], w)
    for number in range(TINY.n_layers):
        at = f"trunk.blocks.{number}."
        a_TD = rms(x_TD, w[at + "attn_in.weight"])
        rows = w[at + "attn.qkv.weight"] @ a_TD.T
        q_HTK, k_GTK, v_GTK = (part.reshape(-1, K, T).swapaxes(1, 2) for part in np.split(rows, [H * K, (H + G) * K]))
        q_HTK, k_GTK = (rope(qk(z, w, f"{at}attn.qk.{n}.weight")) for z, n in ((q_HTK, "q"), (k_GTK, "k")))
        heads = []
        for head in range(H):
            group = head // (H // G)
            scores_TT = q_HTK[head] @ k_GTK[group].T / np.sqrt(K)
            scores_TT[np.triu_indices(T, 1)] = -np.inf
            heads.append(np.exp(scores_TT - logsumexp(scores_TT)[:, None]) @ v_GTK[group])
        x_TD = x_TD + np.concatenate(heads, -1) @ w[at + "attn.out.weight"].T
        gate_TF, up_TF = np.split(rms(x_TD, w[at + "mlp_in.weight"]) @ w[at + "mlp.inner.weight"].T, 2, -1)
        x_TD = x_TD + (gate_TF / (1 + np.exp(-gate_TF)) * up_TF) @ w[at + "mlp.out.weight"].T
    logits_TV = rms(x_TD, w["trunk.norm.weight"]) @ w["embedding.weight"].T
    ce = (logsumexp(logits_TV) - logits_TV[np.arange(T), targets]).mean()
    return float(ce + term(logits_TV))


PARITY: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "qk_norm": {"qk": lambda x_HTK, w, name: rms(x_HTK, w[name])},
    "z_loss": {"term": lambda logits_TV: 1e-4 * (logsumexp(logits_TV) ** 2).mean()},
    "embed_norm": {"embed": lambda x_TD, w: rms(x_TD, w["embed_out.weight"])},
    "embed_scale": {"embed": lambda x_TD, w: np.sqrt(TINY.d_model) * x_TD},
}
"""What the formula of each method replaces in ``reference``."""


@pytest.mark.parametrize("name", [None, *METHODS])
def test_parity_with_a_plain_transcription(name: str | None) -> None:
    spec = TINY if name is None else apply_methods(TINY, [name])
    model = build(spec, seed=3, compute_dtype=torch.float64)
    with torch.no_grad():  # away from the start, where gains are 1 and branches are small
        for seed, param in enumerate(model.parameters()):
            param += 0.3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)).double()
    weights = {key: value.detach().numpy() for key, value in model.named_parameters()}
    inputs, targets = batch(rows=1)
    hooks: Mapping[str, Callable[..., Any]] = {} if name is None else PARITY[name]
    wanted = reference(weights, inputs[0].numpy(), targets[0].numpy(), **hooks)
    assert model(inputs, targets).loss.item() == pytest.approx(wanted, rel=1e-12)
    if name is not None:
        base = {k: v for k, v in weights.items() if ".qk." not in k}
        assert abs(reference(base, inputs[0].numpy(), targets[0].numpy()) - wanted) > 1e-9, "the hook does nothing"


def test_every_method_has_its_entries_and_a_full_header() -> None:
    assert set(IDENTITY) == set(METHODS) == set(PARITY)
    for name in METHODS:
        header = load(name).__doc__ or ""
        for word in ("Citation:", "Formula:", "Differs from the paper in:", "Cost:", "Acts:", "Off:"):
            assert word in header, f"{name}: the header lacks '{word}'"
