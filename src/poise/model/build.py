"""From a ``Spec`` to a model with values in it."""

from __future__ import annotations

import torch

from poise.core.errors import UserError
from poise.model.decoder import Decoder
from poise.model.methods import apply_methods
from poise.model.spec import Spec
from poise.model.starts import initialise

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def build(
    spec: Spec,
    *,
    seed: int,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> Decoder:
    """Build a model: first on the meta device, then in memory once, then filled.

    Args:
        spec: the description.
        seed: seed of the starting values; each parameter has a random stream of its own name.
        device: where the parameters live; ``meta`` leaves them without values.
        compute_dtype: fp32 or bf16; parameters are fp32 either way (float64 makes all float64, for tests).

    Raises:
        UserError: a compute dtype that training cannot use.
    """
    if compute_dtype not in COMPUTE_DTYPES:
        raise UserError(f"compute_dtype is {compute_dtype}; use torch.bfloat16 or torch.float32")
    with torch.device("meta"):
        model = Decoder(spec, compute_dtype)
    if compute_dtype == torch.float64:
        model = model.double()
    if torch.device(device).type != "meta":
        model = model.to_empty(device=device)
        initialise(model, spec, seed)
    return model


def apply(spec: Spec, *names: str) -> Spec:
    """Return ``spec`` with methods applied in order: ``apply(spec, "qk_norm", "z_loss:coefficient=1e-5")``.

    Raises:
        UserError: an unknown method or setting.
        Conflict: two methods that cannot hold together.
    """
    return apply_methods(spec, names)
