"""What chains have in common: checking their links, running them, and taking a step or leaving it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from poise.core.errors import UserError, nearest
from poise.optim.transform import FACTS, STAGES, Info, Link, Stage


def check_links(links: Sequence[Link], allowed: Sequence[Stage] = STAGES) -> None:
    """Refuse links that stand in the wrong place, ask for an unknown fact or share a name in their state.

    Raises:
        UserError: with the link's name and the mend.
    """
    for link in links:
        if not isinstance(link, Link):
            raise UserError(f"{link!r} is not a link: it needs name, stage, needs, init and update")
        if link.stage not in allowed:
            raise UserError(
                f"link '{link.name}' acts at stage '{link.stage}', but only {', '.join(allowed)} may stand "
                "here; use poise.optim.chain.Chain for a whole optimizer"
            )
        for need in link.needs - FACTS:
            raise UserError(f"link '{link.name}' needs the unknown fact '{need}'{nearest(need, FACTS)}")
    for before, after in pairwise(links):
        if STAGES.index(before.stage) > STAGES.index(after.stage):
            raise UserError(
                f"link '{after.name}' ({after.stage}) stands after '{before.name}' ({before.stage}); "
                f"the order is {', '.join(STAGES)}"
            )
    owner: dict[str, str] = {"step": "the chain"}
    for link in links:
        for key in link.init(torch.empty((), device="meta")):
            if key in owner:
                raise UserError(f"'{link.name}' and {owner[key]} both keep a state called '{key}'; rename one")
            owner[key] = f"'{link.name}'"


def run_links(links: Sequence[Link], u: Tensor, trial: dict[str, Any], p: Tensor, info: Info) -> Tensor:
    """Return what ``links`` make of ``u``, one after the other; ``trial`` collects their new state."""
    for link in links:
        u = link.update(u, trial, p, info)
    return u


def on_trial(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the links' part of a state, for them to replace entries in."""
    return {key: value for key, value in state.items() if key != "step"}


def commit(take: Tensor, state: Mapping[str, Tensor], trial: Mapping[str, Tensor], step: Tensor) -> None:
    """Where ``take`` (0-dim bool) is true, write the new state; else leave the old bit-identical."""
    for key, value in {**trial, "step": step}.items():
        if value is not state[key]:
            state[key].copy_(torch.where(take, value, state[key]))


def state_keys(links: Sequence[Link]) -> set[str]:
    """Return the names of everything that is kept per tensor."""
    return {"step"}.union(*(link.init(torch.empty((), device="meta")) for link in links))
