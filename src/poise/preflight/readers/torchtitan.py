"""torchtitan's TOML files, as they were until its configurations became Python in February 2026.

Names, defaults and the shapes of flavors are those of ``torchtitan/config/job_config.py`` and
``torchtitan/models/*/__init__.py`` (pytorch/torchtitan).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from poise.core.errors import UserError
from poise.preflight.readers.document import Document
from poise.preflight.readers.draft import Draft, Found, Keys, merge, not_read
from poise.preflight.settings import Settings

FORMAT = "torchtitan"
LOOKS_FOR = "torchtitan TOML ([model] name and flavor, [training] seq_len and steps)"
OF = "torchtitan"

Shape = tuple[int, int, int, int, int, int, bool]
"""Layers, width, heads, KV heads, MLP width, vocabulary, tied."""

FLAVORS: Final[Mapping[str, Mapping[str, Shape]]] = {
    "llama3": {
        "debugmodel": (6, 256, 16, 16, 768, 2048, False),
        "8B": (32, 4096, 32, 8, 14336, 128256, False),
        "70B": (80, 8192, 64, 8, 28672, 128256, False),
        "405B": (126, 16384, 128, 8, 53248, 128256, False),
    },
    "qwen3": {
        "debugmodel": (8, 256, 16, 8, 3072, 2048, True),
        "0.6B": (28, 1024, 16, 8, 3072, 151936, True),
        "1.7B": (28, 2048, 16, 8, 6144, 151936, True),
        "4B": (36, 2560, 32, 8, 9728, 151936, True),
        "8B": (36, 4096, 32, 8, 12288, 151936, False),
        "14B": (40, 5120, 40, 8, 17408, 151936, False),
        "32B": (64, 5120, 64, 8, 25600, 151936, False),
    },
}
"""Public shapes of dense models."""

_SECTIONS = ("model", "optimizer", "lr_scheduler", "training", "parallelism", "checkpoint")
_QUIET = frozenset(
    {"job", "profiling", "metrics", "comm", "compile", "activation_checkpoint", "validation", "memory_estimation",
     "debug", "fault_tolerance", "experimental"}
)  # fmt: skip


CALLED: Final[Mapping[str, str]] = {
    "optimizer": "[optimizer] name", "lr": "[optimizer] lr", "beta1": "[optimizer] beta1",
    "beta2": "[optimizer] beta2", "eps": "[optimizer] eps", "weight_decay": "[optimizer] weight_decay",
    "schedule": "[lr_scheduler] decay_type",
    "warmup_steps": "[lr_scheduler] warmup_steps", "total_steps": "[training] steps", "clip": "[training] max_norm",
    "batch_sequences": "[training] global_batch_size", "seq_len": "[training] seq_len",
    "dtype": "[training] mixed_precision_param", "master_weights": "[training] dtype",
    "state_dtype": "[training] dtype", "save_every": "[checkpoint] interval",
}  # fmt: skip
"""Field -> torchtitan's name for it; the model's fields follow from its flavor."""


def sniff(document: Document) -> float:
    """Return how sure it is that this is a file of torchtitan's."""
    data = document.data
    if document.kind != "toml":
        return 0.9 if _is_python(document) else 0.0
    model, training = data.get("model"), data.get("training")
    if isinstance(model, Mapping) and "flavor" in model:
        return 0.95
    is_training = isinstance(training, Mapping) and {"local_batch_size", "max_norm", "dump_folder"} & training.keys()
    return 0.9 if is_training else 0.0


def read(documents: Sequence[Document]) -> Settings:
    """Read files; several are read as one run.

    Raises:
        UserError: a Python configuration, or a value that cannot be.
    """
    return merge([_read(document) for document in documents])


def _is_python(document: Document) -> bool:
    return document.kind == "text" and "torchtitan" in document.text and "Trainer.Config" in document.text


def _read(document: Document) -> Settings:
    if _is_python(document):
        raise UserError(
            f"'{document.name}' is a Python configuration of torchtitan, which is not run; give the older TOML form, "
            "or the log of a run whose arguments are printed"
        )
    draft = Draft(document.name, FORMAT, CALLED)
    sections = {name: _section(document, name) for name in _SECTIONS}
    _model(sections["model"], draft)
    _optimizer(sections["optimizer"], sections["lr_scheduler"], draft)
    _training(sections["training"], sections["parallelism"], draft)
    _lengths(sections["training"], sections["lr_scheduler"], draft)
    checkpoint = sections["checkpoint"]
    enabled = checkpoint.flag("enable", "enable_checkpoint")
    if enabled is not None and enabled.value is None:
        draft.unknown("save_every")
    elif enabled is not None and not enabled.value:
        draft.put("save_every", Found(0, enabled.said))
    elif enabled is not None:
        draft.put("save_every", checkpoint.whole("interval"))
        draft.default("save_every", 500, OF)
    rest: list[str] = []
    for name, keys in sections.items():
        hints, others = keys.misspelt(keys.unread())
        draft.notes.extend([*keys.notes(), *hints])
        rest.extend(f"{name}.{key}" for key in others)
    rest += [name for name in document.data if name not in {*_SECTIONS, *_QUIET, "float8", "quantize", "mx"}]
    draft.notes.extend(not_read(rest))
    return draft.settings()


def _section(document: Document, name: str) -> Keys:
    data = document.data.get(name, {})
    if not isinstance(data, Mapping):
        raise UserError(f"'{document.name}': '{name}' is {str(data)[:60]!r}; make it a section, [{name}]")
    return Keys(
        data, document.name, lambda key, value: f"[{name}] {key} = {_toml(value)}", lambda key: f"[{name}] {key}"
    )


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


def _model(keys: Keys, draft: Draft) -> None:
    name, flavor = keys.word("name"), keys.find("flavor")
    if keys.is_unclear("name") or keys.is_unclear("flavor"):
        return  # a shape that nobody knows
    family = name.value if name else "llama3"
    keys.find("tokenizer_path", "hf_assets_path", "norm_type")
    which = str(flavor[1]) if flavor else "debugmodel"
    shape = FLAVORS.get(family, {}).get(which.removesuffix("_flex").removesuffix("_varlen").removesuffix("_flex_attn"))
    if shape is None:
        draft.notes.append(f"shape of {family} {which} is not known: nothing about the model is judged")
    else:
        said = f"torchtitan's {family} {which}"
        names = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "vocab_size", "tied")
        for field, value in zip(names, shape, strict=True):
            draft.put(field, Found(value, said))
        if family == "qwen3":
            draft.put("head_dim", Found(128, said))
        for field, known in (
            ("norm", "pre"), ("norm_kind", "rmsnorm"), ("positions", "rope"), ("gated_mlp", True), ("biases", False),
            ("qk_norm", family == "qwen3"), ("init_std", 0.02), ("embed_std", 1.0), ("residual_init", "depth"),
            ("embed_norm", False), ("attn_soft_cap", 0.0), ("logit_soft_cap", 0.0), ("n_experts", 0), ("dropout", 0.0),
        ):  # fmt: skip
            draft.put(field, Found(known, said))
        if shape[-1]:
            # weights are tied before the start is drawn, and the output's, 1/sqrt(width), is drawn last
            draft.put(
                "embed_std", Found(shape[1] ** -0.5, f"{said}: tied, so it starts as the output does, width**-0.5")
            )
    converters = keys.find("converters")
    if converters and isinstance(converters[1], list) and any("float8" in str(one) for one in converters[1]):
        draft.put("dtype", Found("fp8", keys.form(*converters)))
    kernel = which.partition("_")[2]
    draft.put("attention_kernel", Found(kernel or "sdpa", f"torchtitan's {family} {which}") if shape else None)


def _optimizer(keys: Keys, schedule: Keys, draft: Draft) -> None:
    draft.put("optimizer", keys.word("name"))
    draft.put("lr", keys.number("lr", low=0))
    draft.put("beta1", keys.number("beta1", low=0, high=1))
    draft.put("beta2", keys.number("beta2", low=0, high=1))
    draft.put("eps", keys.number("eps", low=0))
    draft.put("weight_decay", keys.number("weight_decay", low=0))
    for name, value in (
        ("optimizer", "adamw"), ("lr", 8e-4), ("beta1", 0.9), ("beta2", 0.95), ("eps", 1e-8), ("weight_decay", 0.1),
        ("decay_embeddings", True), ("z_loss", 0.0), ("skip_steps", False),
    ):  # fmt: skip
        draft.default(name, value, OF)
    kind, ratio = schedule.word("decay_type", "lr_decay_type"), schedule.number("decay_ratio", low=0, high=1)
    if ratio is not None and ratio.value is None:
        draft.unknown("schedule")
    elif ratio is not None and ratio.value < 1:
        draft.put("schedule", Found("wsd", ratio.said))
    elif kind is not None:
        draft.put("schedule", kind)
    draft.default("schedule", "linear", OF)
    least = schedule.number("min_lr_factor", "lr_min", low=0, high=1)
    if draft.get("lr") is None:
        draft.unknown("min_lr")
    elif least is not None:
        draft.put("min_lr", least.then(lambda share: share * draft.get("lr"))._replace(key=""))
    draft.default("min_lr", 0.0, OF)


def _training(keys: Keys, parallelism: Keys, draft: Draft) -> None:
    draft.put("seq_len", keys.size("seq_len"))
    draft.put("clip", keys.number("max_norm", low=0))
    keys.find("dataset", "dataset_path")
    for name, value in (("seq_len", 2048), ("clip", 1.0), ("master_weights", True)):
        draft.default(name, value, OF)
    weights = keys.word("dtype")
    if weights is not None and weights.value is None:
        draft.unknown("master_weights", "state_dtype")
    elif weights is not None and weights.value == "bfloat16":
        draft.put("master_weights", Found(False, weights.said))
        draft.put("state_dtype", Found("bf16", weights.said))
    draft.default("state_dtype", "fp32", OF)
    if "dtype" not in draft.values:
        param = keys.word("mixed_precision_param")
        draft.put("dtype", param.then({"bfloat16": "bf16", "float32": "fp32"}.get) if param else None)
        draft.default("dtype", "bf16", OF)
    _batch(keys, parallelism, draft)


def _batch(keys: Keys, parallelism: Keys, draft: Draft) -> None:
    whole = keys.whole("global_batch_size", low=-1)
    local = keys.size("local_batch_size", "batch_size")
    degrees = [
        parallelism.whole(f"{name}_degree", low=-1)
        for name in ("data_parallel_replicate", "data_parallel_shard", "tensor_parallel", "pipeline_parallel")
    ]
    degrees.append(parallelism.whole("context_parallel_degree", low=-1))
    shard = degrees[1]
    known = all(degree is None or degree.value is not None for degree in degrees)
    ranks = 0
    if known and shard is not None and shard.value > 0:
        ranks = total = shard.value * max(degrees[0].value if degrees[0] else 1, 1)
        for degree in degrees[2:]:
            total *= max(degree.value, 1) if degree is not None else 1
        draft.put("devices", Found(total, f"{shard.said} times the other degrees of [parallelism], {total} ranks"))
    if (whole is not None and whole.value is None) or (
        local is not None and local.value is None and not (whole and whole.value > 0)
    ):
        draft.unknown("batch_sequences")
    elif whole is not None and whole.value > 0:
        draft.put("batch_sequences", whole)
    elif ranks:
        each = local or Found(8, f"default of {OF}: 8 sequences a rank")
        draft.put("batch_sequences", Found(each.value * ranks, f"{each.said} x {ranks} data-parallel ranks"))
    else:
        each = local or Found(8, "default")
        draft.notes.append(f"{each.value} sequences a rank; the number of ranks is not said, so no batch")


def _lengths(keys: Keys, schedule: Keys, draft: Draft) -> None:
    draft.put("total_steps", keys.size("steps"))
    draft.default("total_steps", 10_000, OF)
    draft.put("warmup_steps", schedule.whole("warmup_steps") or keys.whole("warmup_steps"))
    draft.default("warmup_steps", 200, OF)
    schedule.find("total_steps")
