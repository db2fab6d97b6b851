"""Running forwards again on the side, the last good batch, losses of single sequences, curvature."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.types import IGNORE
from poise.guard.signals.curvature import adam_scales, gradient_curvature
from poise.guard.signals.probe import LastBatch, extract_loss, per_sequence_loss, probe
from poise.model.build import build
from poise.model.spec import Spec

SPEC = Spec(vocab_size=61, seq_len=16, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)


def ids(seed: int = 0, rows: int = 4) -> tuple[Tensor, Tensor]:
    found = torch.randint(0, 61, (rows, 17), generator=torch.Generator().manual_seed(seed))
    return found[:, :-1].contiguous(), found[:, 1:].contiguous()


class Small(nn.Module):
    """A language model with dropout and a buffer that moves; ``form`` is what its forward returns."""

    def __init__(self, form: str = "tuple", dropout: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(61, 16), nn.BatchNorm1d(16), nn.Linear(16, 61)
        self.dropout, self.form = nn.Dropout(dropout), form

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        x = self.norm(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        logits = self.head(self.dropout(x))
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return {"tuple": (logits, loss), "dict": {"loss": loss}, "tensor": loss, "logits": logits}[self.form]


def test_a_probe_leaves_nothing_behind() -> None:
    model, (inputs, targets) = Small().train(), ids()
    model.zero_grad()
    model(inputs, targets)[1].backward()
    grads = [p.grad.clone() for p in model.parameters()]
    pending = model(inputs, targets)[1]  # a graph that is still to be gone through
    buffers = [b.clone() for b in model.buffers()]
    rng = torch.get_rng_state()
    found = probe(model, lambda: model(inputs, targets))
    assert found.loss is not None and not found.loss.requires_grad
    assert torch.equal(rng, torch.get_rng_state()) and model.training
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))
    pending.backward()
    model(inputs, targets)
    assert not all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    with pytest.raises(IndexError):
        probe(model, lambda: model(inputs + 1000, targets))
    assert torch.is_grad_enabled()


def test_a_probe_of_the_decoder_reads_its_layers_and_its_loss() -> None:
    model, (inputs, targets) = build(SPEC, seed=0), ids()
    expected = model(inputs, targets).loss.detach()
    found = probe(model, lambda: model(inputs, targets))
    assert found.loss is not None and torch.allclose(found.loss, expected, rtol=1e-5)
    assert {"attn_entropy@block.1", "out_rms@block.0.qkv", "embed_variability"} <= set(found.readings)


@pytest.mark.parametrize("form", ["tuple", "dict", "tensor"])
def test_the_loss_is_found_in_any_output(form: str) -> None:
    loss = extract_loss(Small(form)(*ids()))
    assert loss is not None and loss.dim() == 0
    assert extract_loss(Small("logits")(*ids())) is None
    assert extract_loss((torch.ones(()).long(), "x", None)) is None
    assert extract_loss({"a": torch.tensor(2.0)}, lambda out: out["a"] * 2) == 4.0


def test_one_odd_sequence_stands_out_and_padding_does_not_count() -> None:
    model, (inputs, targets) = build(SPEC, seed=0), ids()
    with torch.no_grad():
        model.embedding.weight *= 20
    targets[2] = (targets[2] + 1) % 61
    targets[0, 5:] = IGNORE
    found = per_sequence_loss(model, (inputs, targets))
    assert found is not None and found.shape == (4,)
    for row in range(4):
        logits = model.logits(inputs[row : row + 1])[0].detach()
        expected = F.cross_entropy(logits, targets[row], ignore_index=IGNORE)
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("form", ["tuple", "dict", "tensor"])
def test_losses_of_sequences_of_foreign_models(form: str) -> None:
    model, (inputs, targets) = Small(form).eval(), ids()
    found = per_sequence_loss(model, (inputs,), {"targets": targets})
    logits = model(inputs)
    expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(-1)
    assert found is not None and torch.allclose(found, expected, atol=1e-5)


def test_a_model_of_logits_is_judged_by_the_next_token() -> None:
    model, (inputs, _) = Small().eval(), ids()
    found = per_sequence_loss(model, (inputs,))
    expected = F.cross_entropy(model(inputs)[:, :-1].transpose(1, 2), inputs[:, 1:], reduction="none").mean(-1)
    assert found is not None and torch.allclose(found, expected, atol=1e-5)
    assert per_sequence_loss(nn.Linear(3, 3), (torch.ones(2, 3),)) is None


# -- the last good batch --------------------------------------------------------------------------------


def train(model: nn.Module, last: LastBatch, steps: int, lr: float = 0.1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for seed in range(steps):
        model(*ids(seed))[1].backward()
        last.accept()
        optimizer.step()
        optimizer.zero_grad()


def test_damaged_weights_and_odd_batches_are_told_apart() -> None:
    model = Small(dropout=0.0)
    last = LastBatch(model, age=0)
    assert last.readings() == {} and last.sequence_losses() == {}
    train(model, last, 5)
    inputs, targets = ids(9)
    model(inputs, targets)  # an odd batch comes: seen, not accepted
    sound = last.readings()
    assert sound["probe_loss"] == pytest.approx(sound["probe_expected"], abs=0.2)
    with torch.no_grad():
        model.head.weight.mul_(50)
    damaged = last.readings()
    assert damaged["probe_expected"] == sound["probe_expected"]
    assert damaged["probe_loss"] > sound["probe_loss"] + 2.0
    losses = last.sequence_losses()
    expected = per_sequence_loss(model, (inputs, targets))
    assert expected is not None
    assert losses["sequence_loss_max"] == pytest.approx(float(expected.max()))
    assert losses["sequence_loss_median"] == pytest.approx(float(expected.median()))


def test_a_model_that_returns_logits_is_judged_by_the_next_tokens() -> None:
    model = Small("logits", dropout=0.0).eval().train()
    model.norm.eval()  # so that a forward of two sequences is the same alone
    last, (inputs, targets) = LastBatch(model, age=0), ids()
    F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
    last.accept()
    logits = model(inputs[:2])[:, :-1].flatten(0, 1)
    expected = float(F.cross_entropy(logits, inputs[:2, 1:].flatten()).detach())
    assert last.readings() == {"probe_expected": pytest.approx(expected), "probe_loss": pytest.approx(expected)}
    with torch.no_grad():
        model.head.weight.mul_(5.0)
    assert last.readings()["probe_loss"] > expected + 0.1


def test_the_batch_kept_is_some_steps_old() -> None:
    model = Small(dropout=0.0)
    last, expected = LastBatch(model, age=4), []
    for seed in range(10):
        loss = model(*ids(seed))[1]
        expected.append(float(loss.detach()))
        last.accept()
        with torch.no_grad():
            next(model.parameters()).mul_(0.9)
    assert last.readings()["probe_expected"] == pytest.approx(expected[4])


def test_a_loop_that_refills_its_buffers_and_evaluates_in_between() -> None:
    model = Small(dropout=0.0)
    last = LastBatch(model, age=0)
    inputs, targets = ids(0)
    model(inputs, targets)[1].backward()
    last.accept()
    before = last.readings()
    inputs.copy_(ids(7)[0])
    model.eval()
    with torch.no_grad():
        model(*ids(8))
    model.train()
    assert last.readings() == before
    last.remove()
    assert not model._forward_hooks and last.readings() == {}


def test_what_cannot_be_probed_is_not(caplog: pytest.LogCaptureFixture) -> None:
    nameless = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    last = LastBatch(nameless, age=0)
    nameless(torch.randn(3, 4))
    last.accept()
    assert last.probe() is None and last.readings() == {}
    with caplog.at_level(logging.WARNING, "poise"):
        moody = Small(dropout=0.0)
        last = LastBatch(moody, age=0)
        moody(*ids())
        last.accept()
        moody.forward = lambda *a: 1 / 0  # type: ignore[method-assign]
        assert last.readings() == {} and last.readings() == {} and last.sequence_losses() == {}
        broken = LastBatch(Small(), loss_of=lambda out: out.nothing, age=0)
        broken._model(*ids())
        broken.accept()
        assert broken.readings() == {}
    assert len(caplog.records) == 2 and "ZeroDivisionError" in caplog.text and "AttributeError" in caplog.text


# -- curvature ------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """½ wᵀ A w of one parameter in two pieces, with a known Hessian A."""

    def __init__(self, n: int = 6, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        root = rng.normal(size=(n, n))
        self.A = root @ root.T
        self.register_buffer("a", torch.tensor(self.A, dtype=torch.float32))
        w = torch.tensor(rng.normal(size=n))
        self.one, self.two = nn.Parameter(w[:2].to(dtype)), nn.Parameter(w[2:].to(dtype))
        self.unused, self.frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self) -> Tensor:
        w = torch.cat([self.one, self.two]).float()
        return 0.5 * w @ self.a @ w + 0.0 * self.frozen.sum()


def test_curvature_of_a_quadratic_is_exact() -> None:
    model = Quadratic()
    weights = [p.detach().clone() for p in model.parameters()]
    grads = [torch.ones(2), None, None]
    model.one.grad = grads[0]
    found = gradient_curvature(model, model, lr=0.01)
    w = torch.cat(weights[:2]).double().numpy()
    g = model.A @ w
    assert found["curvature"] == pytest.approx(g @ model.A @ g / (g @ g), rel=1e-3)
    assert found["curvature_limit"] == 200.0
    assert all(torch.equal(a, p) for a, p in zip(weights, model.parameters(), strict=True))
    assert model.one.grad is grads[0] and torch.equal(grads[0], torch.ones(2)) and model.two.grad is None
    given = {model.one: torch.ones(2), model.two: torch.zeros(4)}
    along = gradient_curvature(model, model, lr=0.01, gradient=given)
    ones = np.array([1, 1, 0, 0, 0, 0])
    assert along["curvature"] == pytest.approx(ones @ model.A @ ones / 2, rel=1e-3)


def test_preconditioned_curvature_is_that_of_adams_formula() -> None:
    model = Quadratic()
    optimizer = torch.optim.Adam([model.one, model.two], lr=1e-3, betas=(0.9, 0.99))
    for _ in range(3):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    found = gradient_curvature(model, model, lr=0.01, optimizer=optimizer)
    w = torch.cat([model.one, model.two]).detach().double().numpy()
    v = np.concatenate([optimizer.state[p]["exp_avg_sq"].double().numpy() for p in (model.one, model.two)])
    P = np.sqrt(v / (1 - 0.99**3)) + 1e-8
    d = model.A @ w / P
    assert found["curvature"] == pytest.approx(d @ model.A @ d / (d @ (P * d)), rel=1e-3)
    assert found["curvature_limit"] == pytest.approx(200 * 1.9 / 0.1)
    assert adam_scales(torch.optim.SGD([model.one], lr=1.0), [model.one]) == (None, 0.0)


def test_the_limit_tells_descent_from_divergence() -> None:
    """The module's claim on its own ground: below the limit the next step descends along g, above it grows."""
    for factor, grows in ((0.9, False), (1.1, True)):
        model = Quadratic()
        value = gradient_curvature(model, model, lr=1.0)["curvature"]
        lr = factor * 2 / value
        assert (value > gradient_curvature(model, model, lr=lr)["curvature_limit"]) is grows
        before = model()
        (g_one, g_two) = torch.autograd.grad(before, (model.one, model.two))
        with torch.no_grad():
            model.one -= lr * g_one
            model.two -= lr * g_two
        assert bool(model() > before) is grows


def test_coarse_weights_are_measured_as_they_moved_and_restored() -> None:
    model = Quadratic(dtype=torch.bfloat16)
    weights = [p.detach().clone() for p in model.parameters()]
    found = gradient_curvature(model, model, lr=0.01, radius=4e-3)  # less than one bf16 digit for most elements
    w = torch.cat(weights[:2]).double()
    d = torch.tensor(model.A @ w.numpy()).bfloat16().double()  # the gradient is a bf16 tensor, as the weight is
    size = 4e-3 * w.norm() / d.norm()
    moved = ((w + size * d).bfloat16().double() - (w - size * d).bfloat16().double()).numpy()
    assert found["curvature"] == pytest.approx(moved @ model.A @ moved / (moved @ moved), rel=0.1)
    assert np.linalg.norm(moved) != pytest.approx(float(2 * size * d.norm()), rel=0.05)  # the rounding matters here
    free = gradient_curvature(model, model, lr=0.01)
    assert free["curvature"] == pytest.approx(float(d @ torch.tensor(model.A) @ d / (d @ d)), rel=0.05)
    assert all(torch.equal(a, p) for a, p in zip(weights, model.parameters(), strict=True))


def test_curvature_of_a_decoder_without_second_derivatives_and_with_dropout() -> None:
    inputs, targets = ids()
    model = build(SPEC, seed=0)
    found = gradient_curvature(model, lambda: model(inputs, targets).loss, lr=1e-3)
    assert math.isfinite(found["curvature"])
    noisy = Small().train()
    rng = torch.get_rng_state()
    call = lambda: noisy(inputs, targets)[1]  # noqa: E731
    assert gradient_curvature(noisy, call, lr=1e-3) == gradient_curvature(noisy, call, lr=1e-3)
    assert torch.equal(rng, torch.get_rng_state())


def test_where_there_is_no_curvature_there_is_no_reading() -> None:
    model = Quadratic()
    assert gradient_curvature(model, lambda: torch.tensor(1.0), lr=0.1) == {}
    assert gradient_curvature(model, lambda: model() * float("nan"), lr=0.1) == {}
    with pytest.raises(UserError, match="lr is 0"):
        gradient_curvature(model, model, lr=0.0)
    weights = [p.detach().clone() for p in model.parameters()]
    calls = iter([model, model])
    with pytest.raises(StopIteration):  # an error half-way restores the weights as well
        gradient_curvature(model, lambda: next(calls)(), lr=0.1)
    assert all(torch.equal(a, p) for a, p in zip(weights, model.parameters(), strict=True))
