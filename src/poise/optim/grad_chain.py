"""The gradient side of a chain alone: it shapes ``p.grad`` in place, before anybody's optimizer.

shaper = GradChain(model.parameters(), ClipGlobalNorm(1.0))
loss.backward()
shaper.step()
optimizer.step()
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from poise.core.errors import UserError
from poise.optim.facts import NormCache, working_dtype
from poise.optim.links import check_links, commit, on_trial, run_links, state_keys
from poise.optim.transform import Info, Link


class GradChain:
    """Links of stage ``gradient``, applied to the gradients in place.

    A gradient with a NaN or an infinity anywhere is left as it is, and so is the links' state: whoever
    steps next has to refuse it (``poise.optim.chain.Chain`` and the guard do). No host sync.

    Args:
        params: the parameters; their order is the order of the state.
        links: gradient links only.

    Raises:
        UserError: no parameters, or a link that does more than shape the gradient.
    """

    def __init__(self, params: Iterable[Tensor], *links: Link) -> None:
        check_links(links, allowed=("gradient",))
        self._params = list(params)
        if not self._params:
            raise UserError("GradChain got no parameters; pass model.parameters()")
        self._links = links
        self._norm = NormCache()
        self._state: dict[int, dict[str, Tensor]] = {}

    @torch.no_grad()
    def measure(self) -> Tensor:
        """Return the global L2 norm of the gradients as they are now, 0-dim fp32 on their device."""
        return self._norm.norm(self._params).to(torch.float32)

    @torch.no_grad()
    def step(self) -> None:
        """Shape the gradients of this step."""
        norm = self._norm.norm(self._params)
        take = torch.isfinite(norm)
        for number, p in enumerate(self._params):
            if p.grad is None:
                continue
            state = self._state.get(number)
            if state is None:
                state = self._state[number] = {"step": torch.zeros((), device=p.device)}
                for link in self._links:
                    state.update(link.init(p))
            take_here = take.to(p.device)
            info = Info(state["step"] + 1, 0.0, 0.0, {"global_norm": norm.to(p.device)})
            before, u = p.detach().to(working_dtype(p)), p.grad.detach().to(working_dtype(p))
            trial = on_trial(state)
            u = run_links(self._links, u, trial, before, info)
            p.grad.copy_(torch.where(take_here, u.to(p.grad.dtype), p.grad))
            commit(take_here, state, trial, info.step)
        self._norm.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the links' state by parameter number."""
        return {"state": {number: dict(state) for number, state in self._state.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned, exactly.

        Raises:
            UserError: the state belongs to other links or to more parameters.
        """
        keys = state_keys(self._links)
        for number, saved in state_dict["state"].items():
            if set(saved) != keys or number >= len(self._params):
                raise UserError(
                    f"the saved gradient state of parameter {number} holds {sorted(saved)}, but the links "
                    f"{[link.name for link in self._links]} need {sorted(keys)} for {len(self._params)} "
                    "parameters; resume with the links and the model of the saved run"
                )
        self._state = {
            number: {
                key: value.detach().to(device=self._params[number].device, copy=True) for key, value in saved.items()
            }
            for number, saved in state_dict["state"].items()
        }
