"""An optimizer as a chain of links: shape the gradient, choose the direction, shape the update, act on
weights.

``Chain`` is an ordinary ``torch.optim.Optimizer``: parameter groups, ``state_dict``, learning-rate
schedulers and hooks work as they do there. On top of that it promises:

    * a step whose gradient has a NaN or an infinity anywhere changes nothing: weights, moments and step
      counters stay bit-identical, and nobody waits for the device to find that out. (The test is the norm,
      so a finite gradient whose norm overflows fp32 counts as infinite.)
    * the gradient norm that ``measure`` returns to the guard is the one that clipping uses: one pass.

Two ways of computing the same step. [ClipGlobalNorm,] AdamW on fp32 weights goes to torch's fused AdamW
kernel, which takes the clip as ``grad_scale`` and the test as ``found_inf``; it also leaves the scaled
gradient in ``p.grad``. Everything else goes tensor by tensor, at least in fp32; ``p.grad`` is left as it
was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from poise.core.errors import UserError
from poise.optim.facts import NormCache, working_dtype
from poise.optim.links import check_links, commit, on_trial, run_links, state_keys
from poise.optim.rules.adamw import AdamW
from poise.optim.shape.clip_global_norm import EPS, ClipGlobalNorm, clip_coefficient
from poise.optim.transform import Info, Link

FUSED_DEVICES = frozenset({"cpu", "cuda"})


class Chain(Optimizer):
    """A chain of links as one optimizer.

    Args:
        params: parameters, (name, parameter) pairs, or groups of them. A group may have its own ``lr``,
            ``weight_decay`` and ``lr_scale`` (its share of what ``set_lr`` sets).
        links: in the order gradient, direction, update, weights.
        lr: learning rate, 0 or more.
        fused: false keeps to the tensor-by-tensor way; none takes the fused kernel where it fits.

    Raises:
        UserError: a learning rate that is negative or not finite, or links that do not fit together.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        *links: Link,
        lr: float,
        fused: bool | None = None,
    ) -> None:
        _check_lr(lr)
        check_links(links)
        self._links: tuple[Link, ...] = links
        self._allow_fused = fused is not False
        self._norm = NormCache()
        self._skipped: Tensor | None = None
        decay = next((link.weight_decay for link in links if isinstance(link, AdamW)), 0.0)
        super().__init__(params, {"lr": lr, "weight_decay": decay, "lr_scale": 1.0})

    @property
    def links(self) -> tuple[Link, ...]:
        """The links, in order."""
        return self._links

    @property
    def lr(self) -> float:
        """The learning rate last set, before the groups' own ``lr_scale``."""
        group = self.param_groups[0]
        return float(group["lr"]) / group["lr_scale"] if group["lr_scale"] else float(group["lr"])

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of all groups, each times its ``lr_scale``.

        Raises:
            UserError: a negative or non-finite rate.
        """
        _check_lr(lr)
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]

    @property
    def skipped(self) -> Tensor | None:
        """Whether the last ``step`` changed nothing because of a non-finite gradient: 0-dim bool, on the
        device.

        ``None`` before the first step.
        """
        return self._skipped

    @torch.no_grad()
    def measure(self) -> Tensor:
        """Return the global L2 norm of the gradients, 0-dim fp32 on their device, without waiting for it.

        Sharded gradients count whole, so all ranks of their mesh call this together. The next ``step`` uses
        the same norm, unless the gradients have changed in between.
        """
        return self._norm.norm(self._parameters()).to(torch.float32)

    @torch.no_grad()
    def measure_each(self) -> dict[int, Tensor]:
        """Return the norm of every gradient by ``id`` of its parameter, from the same pass as ``measure``.

        Empty where gradients are sharded, in 16 bits, or on several devices.
        """
        return self._norm.each(self._parameters())

    @overload
    def step(self, closure: None = None, *, max_norm: float | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, max_norm: float | None = None) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, max_norm: float | None = None) -> float | None:
        """Take one step, or none at all if the gradient is not finite.

        Args:
            closure: computes the loss again; its value is returned.
            max_norm: for this step only, a bound on the global gradient norm on top of the chain's own.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.grad is not None for p in self._parameters()):
            norm = self._norm.norm(self._parameters())
            self._skipped = ~torch.isfinite(norm)
            if self._fits_fused():
                self._fused_step(norm, max_norm)
            else:
                self._general_step(norm, max_norm)
        self._norm.forget()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and what was measured of them."""
        super().zero_grad(set_to_none)
        self._norm.forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, exactly: tensors are copied and keep their precision.

        A state of ``torch.optim.AdamW`` fits a chain of [ClipGlobalNorm,] AdamW.

        Raises:
            UserError: the state belongs to a chain with other links.
        """
        keys = state_keys(self._links)
        for saved in state_dict["state"].values():
            if set(saved) != keys:
                raise UserError(
                    f"the saved optimizer state holds {sorted(saved)}, but the links "
                    f"{[link.name for link in self._links]} need {sorted(keys)}; "
                    "resume with the links of the saved run"
                )
        super().load_state_dict(state_dict)
        for group in self.param_groups:  # a state of torch.optim.AdamW has no scale
            group.setdefault("lr_scale", 1.0)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, p in zip(numbers, self._parameters(), strict=True):
            if number in state_dict["state"]:  # torch would cast the moments to the dtype of the weights
                saved = state_dict["state"][number]
                self.state[p] = {key: _own(value, p) for key, value in saved.items()}
        self._norm.forget()

    def __getstate__(self) -> dict[str, Any]:
        own = {
            "_links": self._links,
            "_allow_fused": self._allow_fused,
            "_skipped": None,
            "_norm": NormCache(),
        }
        return {**super().__getstate__(), **own}

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _init_state(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for link in self._links:
                state.update(link.init(p))
        return state

    def _fits_fused(self) -> bool:
        *before, last = self._links or (None,)
        return (
            self._allow_fused
            and isinstance(last, AdamW)
            and len(before) <= 1
            and all(isinstance(link, ClipGlobalNorm) for link in before)
            and all(p.dtype == torch.float32 and p.device.type in FUSED_DEVICES for p in self._parameters())
        )

    def _fused_step(self, norm: Tensor, max_norm: float | None) -> None:
        rule = self._links[-1]
        assert isinstance(rule, AdamW) and self._skipped is not None
        bounds = [link.max_norm for link in self._links if isinstance(link, ClipGlobalNorm)]
        bounds += [] if max_norm is None else [max_norm]
        # the kernel divides by grad_scale: it is the inverse of the clip coefficient
        scale = torch.clamp((norm + EPS) / min(bounds), min=1.0) if bounds else None
        if scale is not None and scale.device.type == "cpu" and scale == 1.0:
            scale = None  # nothing to clip: the kernel need not write the gradient back (on a GPU asking would wait)
        found_inf = self._skipped.to(torch.float32)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self._init_state(p) for p in params]
            adamw(
                [_local(p) for p in params],
                [_local(p.grad, like=p) for p in params],
                [_local(state["exp_avg"]) for state in states],
                [_local(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                grad_scale=scale,
                found_inf=found_inf,
                amsgrad=False,
                beta1=rule.beta1,
                beta2=rule.beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=rule.eps,
                maximize=False,
            )

    def _general_step(self, norm: Tensor, max_norm: float | None) -> None:
        assert self._skipped is not None
        tighten = None if max_norm is None else clip_coefficient(norm, max_norm)
        seen = norm if tighten is None else norm * tighten
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._init_state(p)
                take = ~self._skipped.to(p.device)
                info = Info(
                    step=state["step"] + 1,
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    facts={"global_norm": seen.to(p.device)},
                )
                self._update(p, state, info, take, tighten)

    def _update(self, p: Tensor, state: dict[str, Tensor], info: Info, take: Tensor, tighten: Tensor | None) -> None:
        """Compute one tensor's step on the side, then take it where ``take`` is true."""
        assert p.grad is not None
        dtype = working_dtype(p)
        before, u = p.detach().to(dtype), p.grad.detach().to(dtype)
        if tighten is not None:
            u = u * tighten.to(u)
        trial = on_trial(state)
        u = run_links([link for link in self._links if link.stage != "weights"], u, trial, before, info)
        after = before - u * info.lr
        after = run_links([link for link in self._links if link.stage == "weights"], after, trial, before, info)
        p.copy_(torch.where(take, after.to(p.dtype), p))
        commit(take, state, trial, info.step)


def _local(tensor: Any, like: Any = None) -> Tensor:
    """Return this rank's part of a sharded tensor, sharing its memory; another tensor as it is.

    The update is elementwise, so the parts can be updated alone; that allows sharded and whole weights side by
    side and saves the dispatch of sharded operators.
    """
    if hasattr(tensor, "to_local"):
        if like is not None and tensor.placements != like.placements:
            tensor = tensor.redistribute(placements=like.placements)
        tensor = tensor.to_local()
    local: Tensor = tensor.detach()
    return local


def _own(value: Any, p: Tensor) -> Any:
    """Return a copy of a saved value on the parameter's device, in the precision in which it was saved."""
    return value.detach().to(device=p.device, copy=True) if isinstance(value, Tensor) else value


def _check_lr(lr: float) -> None:
    if not (math.isfinite(lr) and lr >= 0.0):
        raise UserError(f"learning rate is {lr}; use a finite number of 0 or more")
