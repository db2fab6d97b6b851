"""Arguments of the Hugging Face Trainer, and of LLaMA-Factory and axolotl, which hand them on.

Defaults are those of ``transformers.TrainingArguments``; ``said`` then is "default of the Hugging Face Trainer". They
are filled in only where a learning rate, an optimizer or a batch is said: a fragment of a file judges nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from poise.core.errors import UserError
from poise.preflight.readers.draft import Draft, Found, Keys, flattened, not_read, with_unread
from poise.preflight.readers.hf_names import CALLED, OTHERS
from poise.preflight.settings import Said, Settings

OF: Final = "the Hugging Face Trainer"

ARGUMENTS: Final = frozenset(
    {"learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "adam_beta1",
     "adam_beta2", "adam_epsilon", "lr_scheduler_type", "lr_scheduler", "warmup_ratio", "num_train_epochs",
     "num_epochs", "save_steps", "logging_steps", "optim", "output_dir", "sequence_len", "cutoff_len", "save_strategy",
     "per_device_eval_batch_size", "gradient_checkpointing", "warmup_steps", "max_steps"}
)  # fmt: skip
"""Names by which arguments are recognised; two of them make a file of arguments."""

IGNORED: Final = frozenset({"bf16", "fp16", "weight_decay", "optimizer", "seed", "data_seed"})
"""Names of the Trainer's that could be taken for the model's."""

_SAYS_TRAINING = ("learning_rate", "optim", "optimizer", "per_device_train_batch_size", "micro_batch_size", "max_steps")

_PER_DEVICE = ("per_device_train_batch_size", "micro_batch_size")

_OPTIMIZERS: Final = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_torch_xla": "adamw", "adamw_hf": "adamw",
    "adamw_apex_fused": "adamw", "adamw_torch_npu_fused": "adamw", "adamw_anyprecision": "adamw",
    "adamw_bnb_8bit": "adamw", "adamw_8bit": "adamw", "paged_adamw_8bit": "adamw", "paged_adamw_32bit": "adamw",
    "paged_adamw": "adamw", "adamw_torch_4bit": "adamw", "adamw_torch_8bit": "adamw", "lion_32bit": "lion",
    "lion_8bit": "lion", "paged_lion_32bit": "lion", "paged_lion_8bit": "lion", "galore_adamw": "galore",
    "stable_adamw": "stable_adamw",
}  # fmt: skip
_SCHEDULES: Final = {
    "cosine_with_min_lr": "cosine", "cosine_with_restarts": "cosine", "warmup_stable_decay": "wsd",
    "constant_with_warmup": "constant", "inverse_sqrt": "inverse_sqrt", "rex": "rex",
}  # fmt: skip
_KERNELS: Final = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "disabled": "eager"}


def read_arguments(
    data: Mapping[str, Any], source: str, unread: Sequence[str], is_tracked: bool = False
) -> tuple[Settings, tuple[int, str] | None]:
    """Return what the arguments say, and the sequences of a device in a step, with how that is said.

    Args:
        data: the arguments.
        source: for messages.
        unread: keys whose values the file's reader could not read.
        is_tracked: a tracker wrote them down, among much else; what is not read is not worth a note.

    Raises:
        UserError: a value that cannot be.
    """
    plain = {key: value for key, value in with_unread(data, unread).items() if not isinstance(value, Mapping)}
    raw, _ = flattened(plain)
    json_like = source.endswith(".json")
    keys = Keys(raw, source, lambda key, value: f'"{key}": {value}' if json_like else f"{key}: {value}")
    draft = Draft(source, "hf", CALLED)
    _optimizer(keys, draft)
    _lengths(keys, draft)
    _precision(keys, draft)
    draft.put("seq_len", keys.size("cutoff_len", "sequence_len", "block_size", "max_seq_length", "max_length"))
    draft.put("devices", keys.size("world_size", "num_processes", "num_gpus"))
    kernel = keys.word("attn_implementation", "flash_attn")
    if kernel is not None and kernel.value != "auto":
        draft.put("attention_kernel", kernel.then(lambda word: _KERNELS.get(word, word)))
    elif keys.raw.get("flash_attention") is True:
        draft.put("attention_kernel", Found("flash_attention_2", "flash_attention: true"))
    _adapters(keys, draft)
    batch = _per_device(keys)
    if keys.has(*_SAYS_TRAINING):
        _defaults(draft)
        if batch is None and not keys.is_unclear(*_PER_DEVICE) and not keys.is_unclear("gradient_accumulation_steps"):
            batch = 8, "default of the Hugging Face Trainer: 8 sequences a device"
    left = [name for name in keys.unread(OTHERS) if name not in unread]
    hints, rest = keys.misspelt(left) if not is_tracked else ([], [])
    draft.notes.extend([*keys.notes(), *hints, *not_read(rest), *not_read([*unread])])
    return draft.settings(), batch


def add_batch(settings: Settings, batches: Sequence[tuple[int, str]]) -> Settings:
    """Return settings with the batch of all devices where their number is known, else with a note."""
    if settings.batch_sequences is not None or not batches:
        return settings
    of_device, said = batches[-1]
    if settings.devices is None:
        note = f"{of_device} sequences a device in a step ({said}); the number of devices is not said, so no batch"
        return dataclasses.replace(settings, notes=(*settings.notes, note))
    total = of_device * settings.devices
    how = f"{said} x {settings.say('devices')}"
    unclear = settings.said.unclear if isinstance(settings.said, Said) else ()
    words = Said({**settings.said, "batch_sequences": how}, settings.called, unclear)
    return dataclasses.replace(settings, batch_sequences=total, said=words)


def _optimizer(keys: Keys, draft: Draft) -> None:
    draft.put("lr", keys.number("learning_rate", low=0))
    rule = keys.word("optim", "optimizer")
    if rule is not None:
        name = str(rule.value).rpartition(".")[2]
        draft.put("optimizer", rule.then(lambda _: _OPTIMIZERS.get(name, name)))
        bits = next((f"{bits}bit" for bits in (8, 4) if f"{bits}bit" in name), None)
        if bits is not None:
            draft.put("state_dtype", Found(bits, rule.said))
    draft.put("beta1", keys.number("adam_beta1", low=0, high=1))
    draft.put("beta2", keys.number("adam_beta2", low=0, high=1))
    draft.put("eps", keys.number("adam_epsilon", low=0))
    draft.put("weight_decay", keys.number("weight_decay", low=0))
    draft.put("clip", keys.number("max_grad_norm", low=0))
    draft.put("epochs", keys.number("num_train_epochs", "num_epochs", low=0))
    style = keys.word("lr_scheduler_type", "lr_scheduler")
    if style is not None:
        name = str(style.value).rpartition(".")[2]
        draft.put("schedule", style.then(lambda _: _SCHEDULES.get(name, name)))
    draft.put("z_loss", keys.number("z_loss", "z_loss_coef", low=0))


def _lengths(keys: Keys, draft: Draft) -> None:
    steps = keys.whole("max_steps", low=-1)
    if steps is not None and steps.value != 0 and steps.value != -1:
        draft.put("total_steps", steps)
    _warmup(keys, draft)
    _saving(keys, draft)


def _warmup(keys: Keys, draft: Draft) -> None:
    total = draft.get("total_steps")
    warmup, ratio = keys.number("warmup_steps", low=0), keys.number("warmup_ratio", low=0, high=1)
    if keys.is_unclear("warmup_steps") or (keys.is_unclear("warmup_ratio") and not (warmup and warmup.value)):
        draft.unknown("warmup_steps")
        return
    if warmup is not None and 0 < warmup.value < 1:  # since transformers 5 a share may stand here
        warmup, ratio = None, warmup
    if warmup is not None and (warmup.value > 0 or ratio is None):
        draft.put("warmup_steps", keys.whole("warmup_steps"))
    elif ratio is not None and total:
        draft.put("warmup_steps", Found(math.ceil(ratio.value * total), f"{ratio.said} of {total} steps"))
    elif ratio is not None and ratio.value > 0:
        draft.notes.append(f"{ratio.said}, but the number of steps is not said, so neither is the warm-up's")
        draft.unknown("warmup_steps")


def _saving(keys: Keys, draft: Draft) -> None:
    total = draft.get("total_steps")
    strategy, every = keys.word("save_strategy"), keys.number("save_steps", low=0)
    how = str(strategy.value).rpartition(".")[2] if strategy is not None else "steps"
    if strategy is not None and how == "no":
        draft.put("save_every", Found(0, strategy.said))
    elif how != "steps" or (every is not None and every.value is None):  # by epoch, or nobody knows
        draft.unknown("save_every")
    elif every is not None and every.value >= 1:
        draft.put("save_every", keys.whole("save_steps"))
    elif every is not None and total and every.value > 0:
        said = f"{every.said} of {total} steps"
        draft.put("save_every", Found(max(1, math.ceil(every.value * total)), said, every.key))
    elif (every is not None and every.value > 0) or keys.has("saves_per_epoch"):
        draft.unknown("save_every")


def _precision(keys: Keys, draft: Draft) -> None:
    said = {name: keys.form(*found) for name in ("bf16", "fp16") if (found := keys.find(name)) is not None}
    words = {name: str(keys.raw[name]).lower() for name in said}
    on = [name for name in said if words[name] == "full" or (words[name] != "auto" and keys.is_on(name))]
    if len(on) == 2:
        raise UserError(f"'{keys.where}': both {said['bf16']} and {said['fp16']} are set; turn one of them off")
    for name in on:
        draft.put("dtype", Found(name, said[name]))
        if words[name] == "full":
            draft.put("state_dtype", Found(name, said[name]) if name == "bf16" else None)
            draft.put("master_weights", Found(False, said[name]))
    for name in said:
        if words[name] == "auto":
            draft.notes.append(f"{said[name]}: the precision depends on the machine and is not judged")
    if not on and any(keys.is_unclear(name) for name in ("bf16", "fp16")):
        draft.unknown("dtype")
    if keys.is_on("pure_bf16"):
        how = keys.form("pure_bf16", keys.raw["pure_bf16"])
        if "fp16" in on:
            raise UserError(f"'{keys.where}': both {how} and {said['fp16']} are set; turn one of them off")
        draft.put("dtype", Found("bf16", how))
        draft.put("master_weights", Found(False, how))
        if "state_dtype" not in draft.values:
            draft.put("state_dtype", Found("bf16", how))
    if draft.get("dtype") == "fp16":
        draft.default("loss_scale", "dynamic", OF)


def _adapters(keys: Keys, draft: Draft) -> None:
    kind = keys.word("finetuning_type", "adapter")
    if kind is not None and kind.value in ("lora", "qlora", "oft", "freeze"):
        draft.notes.append(f"{kind.said}: few weights are trained, and the rules are about training all of them")


def _per_device(keys: Keys) -> tuple[int, str] | None:
    """Return the sequences that one device sees in a step."""
    sequences = keys.size(*_PER_DEVICE)
    if sequences is None or sequences.value is None:
        return None
    rounds = keys.size("gradient_accumulation_steps")
    if rounds is None:
        return sequences.value, sequences.said
    if rounds.value is None:
        return None
    return sequences.value * rounds.value, f"{sequences.said} x {rounds.said}"


def _defaults(draft: Draft) -> None:
    for name, value in (
        ("lr", 5e-5), ("optimizer", "adamw"), ("beta1", 0.9), ("beta2", 0.999), ("eps", 1e-8), ("weight_decay", 0.0),
        ("clip", 1.0), ("schedule", "linear"), ("warmup_steps", 0), ("save_every", 500), ("z_loss", 0.0),
        ("decay_embeddings", True), ("skip_steps", False), ("nan_check", False),
    ):  # fmt: skip
        draft.default(name, value, OF)
    if "total_steps" not in draft.values:
        draft.default("epochs", 3.0, OF)
