"""What a recipe would cost, from its description alone: ``poise train --dry-run``."""

from __future__ import annotations

import dataclasses
from typing import Any

from poise.hardware import distributed, precision, throughput
from poise.model.bound import conditions, unjudged
from poise.model.build import build
from poise.model.counts import count
from poise.train.optimizer import optimizer_for
from poise.train.recipe import Recipe

UTILISATION = 0.4
"""Share of the matrix-product rate that the time estimate assumes."""

LARGE = 300_000_000
"""Parameters above which no reparameterised matrices are made for the gradient bound: it would take seconds."""


def budget(recipe: Recipe) -> dict[str, Any]:
    """Return sizes, token budget, memory, a time estimate, and what the gradient bound says of the start.

    The model is built on meta. Only a method that reparameterises matrices (``wesar``) has one of each kind made.

    Raises:
        UserError: an optimizer that does not go with the model's methods.
    """
    spec, config = recipe.spec(), recipe.train
    device = distributed.init().device
    counts = count(spec)
    model = build(spec, seed=recipe.seed, device="meta")
    optimizer_for(recipe.optim, model)  # makes the checks of a run; state comes with the first step
    built = sum(p.numel() for p in model.parameters())
    assert built == counts.params, f"the count says {counts.params}, the model has {built} parameters"
    dtype = precision.pick_dtype(config.dtype, device)
    rate = throughput.matmul_rate(dtype, device)
    tokens = recipe.total_tokens
    flops = counts.flops_per_token * tokens
    name = str(dtype).removeprefix("torch.")
    memory = counts.memory(config.micro_batch or config.batch_size, name, device.type)
    return {
        "recipe": recipe.name,
        "parameters": counts.params,
        "tokens": tokens,
        "tokens_per_parameter": round(tokens / counts.params, 2),
        "training_flops": flops,
        "memory_bytes": {**dataclasses.asdict(memory), "total": memory.total},
        "dtype": name,
        "matmul_flops_per_s": rate,
        "estimated_seconds": round(flops / (UTILISATION * rate), 1),
        "gradient_bound": _bound(recipe, counts.params),
        "spec": spec.to_dict(),
    }


def _bound(recipe: Recipe, parameters: int) -> list[str]:
    """What the conditions of Spike No More say of the start, and what they do not judge."""
    spec = recipe.spec()
    if spec.linear.name != "linear" and parameters > LARGE:
        return [f"not computed: it takes matrices of '{spec.linear.name}'; poise.model.bound has conditions(spec)"]
    return [*conditions(spec), *unjudged(spec)]


def render(recipe: Recipe, figures: dict[str, Any]) -> str:
    """Return the budget for a person."""
    memory = figures["memory_bytes"]
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in memory.items() if name != "total")
    config = recipe.train
    micro = config.micro_batch or config.batch_size
    said = figures["gradient_bound"] or ["no condition of Spike No More is violated"]
    if len(said) > 3:
        said = [*said[:2], f"and {len(said) - 2} more: poise train ... --dry-run --json"]
    return "\n".join(
        [
            f"recipe      {recipe.name}",
            f"parameters  {figures['parameters']:,}",
            f"tokens      {figures['tokens']:,} = {config.steps:,} steps x {_sequences(recipe)} sequences x "
            f"{config.seq_len} ({figures['tokens_per_parameter']:g} per parameter)",
            f"arithmetic  {figures['training_flops']:.3g} FLOP",
            f"memory      {_bytes(memory['total'])} for one process at {micro} sequences at once ({parts})",
            f"time        about {_time(figures['estimated_seconds'])} on this machine alone, at "
            f"{UTILISATION:.0%} of its {figures['dtype']} matrix-product rate "
            f"({figures['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s)",
            f"methods     {', '.join(recipe.model.methods) or 'none'}",
            "gradient bound at the start",
            *(f"  {line}" for line in said),
        ]
    )


def _sequences(recipe: Recipe) -> str:
    config = recipe.train
    return f"{config.batch_start} to {config.batch_size}" if config.batch_start else str(config.batch_size)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _time(seconds: float) -> str:
    for unit, length in (("years", 31_557_600), ("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
