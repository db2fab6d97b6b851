"""Curvature of the loss along the direction of the step, against what the step size can bear.

Gradient descent, direction g:          curvature = gᵀ H g / gᵀ g        limit = 2 / η
Adam, d = P⁻¹ g, P = diag(√v̂ + ε):      curvature = dᵀ H d / dᵀ P d      limit = 2 / η · (1 + β₁) / (1 − β₁)

The second is the Rayleigh quotient of P^(−1/2) H P^(−1/2) along P^(−1/2) g, so both say: on the quadratic that fits the
loss here, the component along the gradient grows where the curvature is above the limit. Bai et al. (arXiv 2506.04805)
take gᵀ Ĥ g / gᵀ g with Ĥ = (1 − β₁) / (1 + β₁) · P⁻¹ H against 2 / η, and find loss spikes where it is exceeded; the
factor of momentum, from heavy-ball descent with a moving average, is theirs and that of Cohen et al. (arXiv
2207.14484), who state the limit 38 / η for β₁ = 0.9. Differs: their P⁻¹ H is not symmetric; ours weighs the direction
by P, and equals theirs where g is an eigenvector. v̂ is bias-corrected; the factor 1 − β₁ᵗ of the first steps is left
out.

H d comes from one difference of gradients, so kernels without a second derivative will do (fused attention, custom
functions): with δ = w₊ − w₋ as the weights really hold them, curvature = δᵀ (g(w₊) − g(w₋)) / (δᵀ P δ), exact for a
quadratic whatever the rounding of the weights. The weights move by ``radius`` of their norm each way, about one step,
and are restored bit for bit. Noise: gradients computed in bf16 are known to about 1 %, so a curvature far below the
limit is only known to be small. Costs two forward and backward passes (three without ``gradient``) and four copies of
the weights in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from poise.core.errors import UserError
from poise.guard.signals.probe import aside


def gradient_curvature(
    model: nn.Module,
    call: Callable[[], Tensor],
    lr: float,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    gradient: Mapping[nn.Parameter, Tensor] | None = None,
    radius: float | None = None,
) -> dict[str, float]:
    """Return ``curvature`` and ``curvature_limit`` (module header), or nothing where they cannot be measured.

    Waits for the device. Gradients in ``.grad``, weights, buffers and random generators are as before afterwards.
    Nothing is measured where the parameters are sharded (FSDP2, out of autograd's reach) or the gradient is zero or
    not finite. Each rank measures its own batch.

    Args:
        model: the module whose trainable parameters move; give the one inside DDP.
        call: a forward of it that returns the loss (0-dim); called with gradients on, each time with the same random
            numbers.
        lr: learning rate η.
        optimizer: with second moments in its state (``exp_avg_sq``): the preconditioned form; else the plain one.
        gradient: the gradient at the present weights; computed with one more ``call`` if not given.
        radius: how far the weights move, relative to their norm; by default 1e-3, and 3e-2 where some are 16-bit:
            their gradients are too, and a smaller difference would drown in rounding.

    Raises:
        UserError: a learning rate or radius that is not above 0.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if radius is None:
        radius = 3e-2 if any(p.element_size() < 4 for p in params) else 1e-3
    if not (lr > 0 and radius > 0):
        raise UserError(f"lr is {lr} and radius is {radius}; both have to be above 0")
    if any(hasattr(p, "device_mesh") for p in params):
        return {}
    at_first = _gradients(model, params, call) if gradient is None else [gradient.get(p) for p in params]
    used = [(p, g) for p, g in zip(params, at_first, strict=True) if g is not None and not g.is_sparse]
    if not used:
        return {}
    moving, grads = [p for p, _ in used], [g.detach().float() for _, g in used]
    scales, beta1 = adam_scales(optimizer, moving) if optimizer is not None else (None, 0.0)
    steps = grads if scales is None else [g / s for g, s in zip(grads, scales, strict=True)]
    value = _along(model, moving, steps, scales, call, radius)
    if value is None:
        return {}
    return {"curvature": value, "curvature_limit": 2.0 / lr * (1.0 + beta1) / (1.0 - beta1)}


def adam_scales(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter]) -> tuple[list[Tensor] | None, float]:
    """Return P = √v̂ + ε of each parameter and β₁, read from an Adam-like state; (``None``, 0) where there is none.

    Read are ``exp_avg_sq`` and ``step`` of the state, and ``betas`` and ``eps`` of the group as in
    ``torch.optim.Adam``; of an optimizer made of ``links`` (poise's chain) ``beta1``, ``beta2`` and ``eps`` of the link
    that has them.
    """
    rule = next((link for link in getattr(optimizer, "links", ()) if hasattr(link, "beta2")), None)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    scales: list[Tensor] = []
    beta1 = 0.0
    for p in params:
        group, state = groups.get(p, {}), optimizer.state.get(p, {})
        if "exp_avg_sq" not in state or ("betas" not in group and rule is None):
            return None, 0.0
        beta1, beta2 = group["betas"] if rule is None else (rule.beta1, rule.beta2)
        eps = group.get("eps", 1e-8) if rule is None else rule.eps
        correction = 1.0 - beta2 ** max(1.0, float(state.get("step", math.inf)))
        scales.append((state["exp_avg_sq"].float() / correction).sqrt() + eps)
    return scales, float(beta1)


def _along(
    model: nn.Module,
    params: list[nn.Parameter],
    steps: list[Tensor],
    scales: list[Tensor] | None,
    call: Callable[[], Tensor],
    radius: float,
) -> float | None:
    """Return δᵀ (g(w + rd) − g(w − rd)) / δᵀ P δ; ``None`` if something in it is zero or not finite."""
    weights, length = _norm([p.detach() for p in params]), _norm(steps)
    if not (0.0 < length < math.inf and 0.0 < weights < math.inf):
        return None
    kept = [p.detach().clone() for p in params]
    size = radius * weights / length
    try:
        with torch.no_grad():
            for p, before, d in zip(params, kept, steps, strict=True):
                p.copy_(before.float() + size * d)
            ahead = [p.detach().float().clone() for p in params]
        up = _gradients(model, params, call)
        with torch.no_grad():
            for p, before, d in zip(params, kept, steps, strict=True):
                p.copy_(before.float() - size * d)
            moved = [there - p.detach().float() for there, p in zip(ahead, params, strict=True)]
        down = _gradients(model, params, call)
    finally:
        with torch.no_grad():
            for p, before in zip(params, kept, strict=True):
                p.copy_(before)
    bend = sum(
        _dot(m, u.float() - d.float())
        for m, u, d in zip(moved, up, down, strict=True)
        if u is not None and d is not None
    )
    weighed = moved if scales is None else [m * s for m, s in zip(moved, scales, strict=True)]
    below = sum(_dot(m, w) for m, w in zip(moved, weighed, strict=True))
    value = float(bend) / float(below) if float(below) else math.nan
    return value if math.isfinite(value) else None


def _gradients(model: nn.Module, params: Sequence[nn.Parameter], call: Callable[[], Tensor]) -> Sequence[Any]:
    """Return d loss / d params of one call; ``None`` for a parameter the loss does not depend on.

    ``autograd.grad`` touches no ``.grad`` and calls no hook that waits for an accumulated gradient (DDP's reducer,
    an optimizer fused into the backward pass).
    """
    with aside(model), torch.enable_grad():
        loss = call()
        if not loss.requires_grad:
            return [None] * len(params)
        return torch.autograd.grad(loss, params, allow_unused=True)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(float(sum(_dot(t, t) for t in tensors)))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    # float64 sums: the difference of two gradients keeps few digits, and they must not be lost here
    return torch.sum(a.flatten().float() * b.flatten().float(), dtype=torch.float64)
