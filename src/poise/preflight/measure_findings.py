"""What the measurements of ``poise check --model`` and ``check_model`` can find: ids and titles. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from poise.core.types import Severity

MEASURED: Final[Mapping[str, tuple[str, Severity]]] = {
    "measured-start-nonfinite": ("the start is no number", "critical"),
    "measured-start-loss": ("the loss starts above that of knowing nothing", "warning"),
    "measured-start-attention": ("attention starts almost one-hot", "warning"),
    "measured-gradient-profile": ("gradients differ widely between early and late blocks", "warning"),
    "measured-gradient-zero": ("blocks without a gradient", "warning"),
    "measured-widths": ("activations do not keep their size as the model grows wider", "warning"),
    "measured-lr-diverged": ("proxies diverge at the configured learning rate", "critical"),
    "measured-logit-forecast": ("attention logits are forecast to pass 1e4", "warning"),
    "measured-init-std": ("a matrix does not start as the configuration says", "warning"),
    "measured-init-uneven": ("a matrix starts unlike the same matrix of other layers", "warning"),
    "measured-init-dead": ("a matrix starts as a constant", "warning"),
    "measured-init-nonfinite": ("weights that are no numbers", "critical"),
}
"""Id -> (title, the highest severity that is given)."""
