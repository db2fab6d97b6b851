"""z-loss: keep the normaliser of the output softmax near one, so that output logits do not drift.

Citation: Chowdhery et al. 2022, "PaLM", arXiv 2204.02311; Wortsman et al. 2024, arXiv 2309.14322.
Formula: loss += c · mean(log² Z), log Z = logsumexp(output logits), mean over counted targets; c = 1e-4.
    Gradient with respect to a logit: 2 c · log Z · softmax.
Differs from the paper in: nothing known.
Cost: none that can be measured; log Z is there already for the cross-entropy.
Acts: in the loss, every step. Reported apart from the cross-entropy.
Off: leave `z_loss` out of the methods, or coefficient = 0.
Numerics: log Z and its square are fp32, whatever the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, nn

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="z_loss",
    kind="model",
    title="Pulls the log-normaliser of the output softmax towards 0, so that output logits do not drift",
    citation="Chowdhery et al. 2022, arXiv 2204.02311; Wortsman et al. 2024, arXiv 2309.14322",
    formula="loss += c mean(logsumexp(logits)^2)",
    acts="in the loss, every step; reported apart from the cross-entropy",
    cost="none to speak of: the log-normaliser is computed for the cross-entropy anyway",
    off="leave `z_loss` out of the methods, or coefficient = 0",
)

EXCLUDES: Final[Mapping[str, str]] = {}


class ZLoss(nn.Module):
    """log Z of each row -> c · log² Z of each row."""

    def __init__(self, place: Place, coefficient: float) -> None:
        super().__init__()
        self.coefficient = coefficient

    def forward(self, log_z: Tensor) -> Tensor:
        return self.coefficient * log_z.square()


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"loss_terms": {"z_loss": ZLoss}}


def apply(spec: Spec, *, coefficient: float = 1e-4) -> Spec:
    """Return ``spec`` with the z-loss among its loss terms.

    Raises:
        UserError: a negative coefficient, or one too large.
    """
    if not 0 <= coefficient <= 1e15:
        raise UserError(f"z_loss coefficient is {coefficient}; give 0 or more, up to 1e15, e.g. 1e-4")
    return spec.claim("loss_terms", Part.of("z_loss", {"coefficient": coefficient}), "z_loss")
