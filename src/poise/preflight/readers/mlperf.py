"""MLPerf's logging keys, as ``:::MLLOG`` lines of a log carry them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from poise.preflight.readers.draft import Draft, Found, Keys
from poise.preflight.settings import Settings

FORMAT = "mlperf"
LOOKS_FOR = "MLPerf keys (opt_base_learning_rate, ...)"


def from_mlperf(raw: Mapping[str, Any], source: str) -> Settings | None:
    """Return what the keys say; ``None`` where there is no base learning rate among them.

    Raises:
        UserError: a value that cannot be.
    """
    if "opt_base_learning_rate" not in raw:
        return None
    keys = Keys(raw, source, lambda key, value: f"{key} = {value}")
    draft = Draft(source, FORMAT)
    draft.put("lr", keys.number("opt_base_learning_rate", low=0))
    draft.put("min_lr", keys.number("opt_end_learning_rate", low=0))
    draft.put("optimizer", keys.word("opt_name"))
    draft.put("beta1", keys.number("opt_adamw_beta_1", "opt_adam_beta_1", low=0, high=1))
    draft.put("beta2", keys.number("opt_adamw_beta_2", "opt_adam_beta_2", low=0, high=1))
    draft.put("eps", keys.number("opt_adamw_epsilon", "opt_adam_epsilon", low=0))
    draft.put("weight_decay", keys.number("opt_adamw_weight_decay", low=0))
    draft.put("clip", keys.number("opt_gradient_clip_norm", low=0))
    draft.put("batch_sequences", keys.size("global_batch_size"))
    draft.put("seq_len", keys.size("max_sequence_length"))
    style = keys.word("opt_learning_rate_decay_schedule")
    if style is not None and str(style.value).startswith(("cosine", "linear", "constant")):
        draft.put("schedule", Found(style.value.split()[0], style.said))
    if keys.has("opt_learning_rate_warmup_steps"):
        said = keys.form("opt_learning_rate_warmup_steps", keys.raw["opt_learning_rate_warmup_steps"])
        draft.notes.append(f"{said}: whether it counts steps or samples is not said, so the warm-up is not judged")
    draft.notes.extend(keys.notes())
    return draft.settings()
