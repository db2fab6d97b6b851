"""Megatron-LM's arguments: in a script or command line, as flat YAML or JSON, or as a training log repeats them.

Names, meanings and defaults are those of ``megatron/training/arguments.py`` (NVIDIA/Megatron-LM), with the additions of
the BigScience fork (``--embed-layernorm``, ALiBi). Defaults of the model are filled in where the source describes a
model, those of training where it describes training; ``said`` then is "default of Megatron-LM".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from poise.preflight.readers.document import Document
from poise.preflight.readers.draft import Draft, Found, Keys, flattened, merge, not_read
from poise.preflight.readers.megatron_steps import Ramp, steps_for
from poise.preflight.readers.shell import command_lines
from poise.preflight.settings import Settings

FORMAT = "megatron"
LOOKS_FOR = "Megatron-LM arguments (a script with --num-layers ... --lr ..., flat YAML, or a log that begins with them)"
OF = "Megatron-LM"

SHAPE = frozenset({"num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "init_method_std"})
TRAINING = frozenset(
    {"lr", "min_lr", "train_iters", "train_samples", "global_batch_size", "lr_warmup_iters", "lr_warmup_samples",
     "lr_warmup_fraction", "lr_decay_style", "clip_grad", "adam_beta2", "weight_decay"}
)  # fmt: skip
_OTHERS = frozenset(
    {"seq_length", "max_position_embeddings", "micro_batch_size", "tensor_model_parallel_size", "lr_decay_iters",
     "attention_dropout", "adam_eps", "swiglu", "kv_channels"}
)  # fmt: skip
KNOWN = SHAPE | TRAINING | _OTHERS

_FLAGS = frozenset(
    {"deepspeed", "fp16", "bf16", "swiglu", "qk_layernorm", "qk_clip", "group_query_attention", "disable_bias_linear",
     "untie_embeddings_and_output_weights", "use_flash_attn", "embed_layernorm", "attention_softmax_in_fp32",
     "no_position_embedding", "use_rotary_position_embeddings", "no_masked_softmax_fusion", "apply_layernorm_1p",
     "no_check_for_nan_in_loss_and_grad", "use_precision_aware_optimizer", "init_method_xavier_uniform"}
)  # fmt: skip
"""Arguments that take no value, whatever word stands behind them."""

_DUMP = re.compile(r"(?:^|\s)([A-Za-z_]\w{1,60}) \.{2,60} (.{0,2000})$")
_POSITIONS = {
    "learned_absolute": "learned", "absolute": "learned", "rope": "rope", "rotary": "rope", "mrope": "rope",
    "yarn": "rope", "alibi": "alibi", "none": "none",
}  # fmt: skip
_SCHEDULES = {"inverse-square-root": "inverse_sqrt"}
_OPTIMIZERS = {"adam": "adamw", "dist_muon": "muon"}
_STATES = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16", "fp8": "8bit", "uint8": "8bit"}


def sniff(document: Document) -> float:
    """Return how sure it is that these are Megatron-LM's arguments."""
    if document.kind != "text":
        known = KNOWN & flattened(document.data)[0].keys()
        return 0.9 if len(known) >= 4 and not document.data.get("model_type") else 0.0
    dump = _dump(document.text)
    if len(dump) >= 5 and len(KNOWN & dump.keys()) >= 3:
        return 0.9
    return 0.9 if len(KNOWN & {_dest(flag) for flag in re.findall(r"--[a-z][\w-]{0,60}", document.text)}) >= 3 else 0.0


def read(documents: Sequence[Document]) -> Settings:
    """Read files of arguments; several are several parts of one command line."""
    return merge([_read(document) for document in documents])


def _read(document: Document) -> Settings:
    if document.kind != "text":
        raw, twice = flattened(document.data)
        keys = Keys(raw, document.name, lambda key, value: f"{key}: {value}")
        notes = [*not_read(twice, "second values of a key"), *not_read(document.unread)]
        return _settings(keys, document.name, notes)
    dump = _dump(document.text)
    if len(KNOWN & dump.keys()) >= 3:
        return from_dump(dump, document.name)
    raw = _best_line(document.text)
    open_ends = [key for key, value in raw.items() if isinstance(value, str) and "$" in value]
    notes = []
    asked = [key for key in open_ends if key in KNOWN or key in ("save_interval", "vocab_size")]
    for key in asked:
        notes.append(f"--{key.replace('_', '-')} is {raw[key]}, whose value the script does not say")
    raw = {key: value for key, value in raw.items() if key not in open_ends}
    keys = Keys(raw, document.name, _as_argument)
    return _settings(keys, document.name, notes)


def from_dump(raw: Mapping[str, Any], source: str) -> Settings:
    """Return what a log's own argument dump says, by Megatron-LM's names with underscores.

    Raises:
        UserError: a value that cannot be.
    """
    return _settings(Keys(raw, source, lambda key, value: f"{key} = {value}"), source, [], True)


def _dest(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_").lower()


def _as_argument(key: str, value: Any) -> str:
    flag = "--" + key.replace("_", "-")
    if value is True:
        return flag
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def _dump(text: str) -> dict[str, Any]:
    """Return ``name ..... value`` lines; of several with one name (ranks, restarts) the first counts."""
    out: dict[str, Any] = {}
    for line in text.splitlines():
        if " .." in line and (found := _DUMP.search(line[:4000])):
            value = found[2].strip()
            out.setdefault(found[1], value)
    return out


def _best_line(text: str) -> dict[str, Any]:
    """Return the arguments of the command, or of the variable, that has most of the names we know."""
    best: dict[str, Any] = {}
    score = 0
    for words in command_lines(text):
        line = _arguments(words)
        if len(KNOWN & line.keys()) > score:
            best, score = line, len(KNOWN & line.keys())
    return best


def _arguments(words: Sequence[str]) -> dict[str, Any]:
    """Return ``--name value`` words as name -> value, list of values, or true."""
    out: dict[str, Any] = {}
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not word.startswith("--") or len(word) < 3:
            continue
        flag, equals, value = word.partition("=")
        key, values = _dest(flag), [value] if equals else []
        while not equals and at < len(words) and not words[at].startswith("--") and not words[at].endswith(".py"):
            values.append(words[at])
            at += 1
        plain = not values or (key in _FLAGS and not equals)
        out[key] = True if plain else values[0] if len(values) == 1 else values
    return out


def _settings(keys: Keys, source: str, notes: list[str], is_dump: bool = False) -> Settings:
    draft = Draft(source, FORMAT)
    draft.notes.extend(notes)
    _shape(keys, draft)
    _start(keys, draft)
    _precision(keys, draft)
    _training(keys, draft)
    if keys.has(*SHAPE):
        _shape_defaults(draft)
    if keys.has(*TRAINING):
        _training_defaults(keys, draft)
    if not is_dump:
        draft.notes.extend(not_read(keys.unread()))
    return draft.settings()


def _shape(keys: Keys, draft: Draft) -> None:
    for name, *own in (
        ("n_layers", "num_layers", "decoder_num_layers", "encoder_num_layers"),
        ("d_model", "hidden_size"),
        ("n_heads", "num_attention_heads"),
        ("head_dim", "kv_channels"),
        ("max_positions", "max_position_embeddings"),
        ("vocab_size", "padded_vocab_size", "pad_vocab_size_to", "vocab_size"),
        ("seq_len", "seq_length", "encoder_seq_length"),
    ):
        draft.put(name, keys.size(*own))
    if keys.is_on("group_query_attention"):
        draft.put("n_kv_heads", keys.size("num_query_groups"))
    elif (heads := draft.get("n_heads")) and not keys.is_on("multi_latent_attention"):
        draft.put("n_kv_heads", Found(heads, "default of Megatron-LM: no --group-query-attention"))
    draft.put("n_experts", keys.whole("num_experts", "num_moe_experts"))
    draft.put("d_ff", keys.size("moe_ffn_hidden_size") if draft.get("n_experts") else None)
    if "d_ff" not in draft.values:
        draft.put("d_ff", keys.size("ffn_hidden_size"))
    draft.put("router_z_loss", keys.number("moe_z_loss_coeff", low=0))
    if keys.has("padded_vocab_size") and keys.has("vocab_size"):
        draft.put("tokenizer_vocab", keys.size("vocab_size"))
    _kinds(keys, draft)


def _kinds(keys: Keys, draft: Draft) -> None:
    for name in ("swiglu", "quick_geglu", "gated_linear_unit"):
        if keys.is_on(name):
            draft.put("gated_mlp", keys.flag(name))
    if (untied := keys.flag("untie_embeddings_and_output_weights")) is not None:
        draft.put("tied", Found(not untied.value, untied.said))
    draft.put("norm_kind", keys.word("normalization"))
    keys.find("apply_layernorm_1p")  # another way to write the same gains
    if (positions := keys.word("position_embedding_type")) is not None:
        word = positions.value.rpartition(".")[2]
        if word in _POSITIONS:
            draft.put("positions", Found(_POSITIONS[word], positions.said))
        else:
            draft.notes.append(f"{positions.said} is not judged")
            draft.put("positions", None)
    elif keys.is_on("use_rotary_position_embeddings"):
        draft.put("positions", Found("rope", "--use-rotary-position-embeddings"))
    elif keys.is_on("no_position_embedding"):
        draft.put("positions", Found("none", "--no-position-embedding"))
    if keys.is_on("disable_bias_linear"):
        draft.put("biases", Found(False, "--disable-bias-linear"))
    else:
        draft.put("biases", keys.flag("add_bias_linear"))
    if keys.is_on("qk_layernorm"):
        draft.put("qk_norm", keys.flag("qk_layernorm"))
    elif keys.is_on("qk_l2_norm"):
        draft.put("qk_norm", keys.flag("qk_l2_norm"))
    if keys.is_on("qk_clip"):
        said = keys.number("qk_clip_threshold", low=0)
        draft.put("qk_clip", said or Found(100.0, "--qk-clip, whose threshold is 100 by default"))
    if keys.is_on("use_flash_attn"):
        draft.put("attention_kernel", Found("flash", "--use-flash-attn"))
    elif (kernel := keys.word("attention_backend")) is not None and not kernel.value.endswith("auto"):
        draft.put("attention_kernel", Found(kernel.value.rpartition(".")[2], kernel.said))
    draft.put("embed_norm", keys.flag("embed_layernorm"))
    draft.put("dropout", keys.number("hidden_dropout", low=0, high=1))


def _start(keys: Keys, draft: Draft) -> None:
    if keys.is_on("init_method_xavier_uniform"):
        draft.notes.append("--init-method-xavier-uniform: the start of matrices is not judged")
        keys.find("init_method_std")
        draft.values["residual_init"] = None
        draft.values["init_std"] = None
        return
    draft.put("init_std", keys.number("init_method_std", low=0))
    draft.put("embed_std", keys.number("embedding_init_method_std", low=0))


def _shape_defaults(draft: Draft) -> None:
    gated = bool(draft.get("gated_mlp"))
    width = draft.get("d_model")
    if width:
        inner = int(4 * width * 2 / 3) // 64 * 64 if gated else 4 * width
        draft.default("d_ff", inner, f"{OF}: {'8/3' if gated else '4'} x hidden size")
    for name, value in (
        ("gated_mlp", False), ("tied", True), ("norm", "pre"), ("norm_kind", "layernorm"), ("biases", True),
        ("qk_norm", False), ("attn_soft_cap", 0.0), ("logit_soft_cap", 0.0), ("embed_norm", False),
        ("init_std", 0.02), ("residual_init", "scaled"), ("n_experts", 0), ("dropout", 0.1),
    ):  # fmt: skip
        draft.default(name, value, OF)
    if not any("position" in note for note in draft.notes):
        draft.default("positions", "learned", OF)


def _precision(keys: Keys, draft: Draft) -> None:
    low = next((name for name in ("fp4", "fp8", "fp8_format", "fp4_format") if _is_said(keys, name)), None)
    if low is not None:
        draft.put("dtype", Found(low[:3], keys.form(low, keys.raw[low])))
    elif keys.is_on("bf16"):
        draft.put("dtype", Found("bf16", _said(keys, "bf16")))
    elif keys.is_on("fp16"):
        draft.put("dtype", Found("fp16", _said(keys, "fp16")))
        scale = keys.number("loss_scale", low=0)
        if keys.is_on("deepspeed"):
            draft.notes.append("DeepSpeed scales the loss as its own configuration says, which is not read")
        else:
            draft.put("loss_scale", Found(f"{scale.value:g}", scale.said) if scale else None)
            draft.default("loss_scale", "dynamic", OF)
        keys.find("initial_loss_scale")
    fused = keys.flag("masked_softmax_fusion")
    unfused = keys.is_on("no_masked_softmax_fusion") or (fused is not None and not fused.value)
    if keys.is_on("attention_softmax_in_fp32"):
        draft.put("softmax_fp32", keys.flag("attention_softmax_in_fp32"))
    elif keys.is_on("apply_query_key_layer_scaling"):
        draft.put("softmax_fp32", Found(True, "apply_query_key_layer_scaling, which brings an fp32 softmax"))
    elif (plain := keys.flag("attention_softmax_in_fp32")) and unfused and not draft.get("attention_kernel"):
        draft.put("softmax_fp32", plain)  # fused kernels sum in fp32 whatever the flag says


def _is_said(keys: Keys, name: str) -> bool:
    found = keys.find(name)
    return found is not None and str(found[1]).lower() not in ("false", "none")


def _said(keys: Keys, name: str) -> str:
    return keys.form(name, keys.raw[name])


def _training(keys: Keys, draft: Draft) -> None:
    draft.put("lr", keys.number("lr", low=0))
    draft.put("min_lr", keys.number("min_lr", low=0))
    if (style := keys.word("lr_decay_style")) is not None:
        draft.put("schedule", Found(_SCHEDULES.get(style.value, style.value), style.said))
    if (rule := keys.word("optimizer")) is not None:
        value = _OPTIMIZERS.get(rule.value, rule.value)
        if value == "adamw" and keys.is_on("no_decoupled_weight_decay"):
            value = "adam"
        draft.put("optimizer", Found(value, rule.said))
    draft.put("beta1", keys.number("adam_beta1", low=0, high=1))
    draft.put("beta2", keys.number("adam_beta2", low=0, high=1))
    draft.put("eps", keys.number("adam_eps", low=0))
    draft.put("weight_decay", keys.number("weight_decay", low=0))
    draft.put("clip", keys.number("clip_grad", low=0))
    draft.put("save_every", keys.whole("save_interval"))
    _batch(keys, draft)
    _lengths(keys, draft)
    if keys.is_on("use_precision_aware_optimizer"):
        kinds = [keys.word("exp_avg_sq_dtype"), keys.word("exp_avg_dtype")]
        lowest = next((k for k in kinds if k and _STATES.get(k.value.rpartition(".")[2], "fp32") != "fp32"), None)
        if lowest is not None:
            draft.put("state_dtype", Found(_STATES[lowest.value.rpartition(".")[2]], lowest.said))
    if keys.is_on("no_check_for_nan_in_loss_and_grad"):
        draft.put("nan_check", Found(False, "--no-check-for-nan-in-loss-and-grad"))
    else:
        draft.put("nan_check", keys.flag("check_for_nan_in_loss_and_grad"))
    threshold = keys.find("grad_norm_skip_threshold")
    if threshold is not None and "inf" not in str(threshold[1]).lower():
        draft.put("skip_steps", Found(True, keys.form(*threshold)))


def _batch(keys: Keys, draft: Draft) -> None:
    draft.put("devices", keys.size("world_size"))
    per_node, nodes = keys.find("nproc_per_node"), keys.find("nnodes")
    if per_node and nodes and str(per_node[1]).isdigit() and str(nodes[1]).isdigit() and int(per_node[1]) > 0:
        product = int(per_node[1]) * int(nodes[1])
        if product > 0:
            draft.put("devices", Found(product, f"{keys.form(*per_node)} {keys.form(*nodes)}"))
    draft.put("batch_sequences", keys.size("global_batch_size"))
    if "batch_sequences" not in draft.values:
        micro, ranks = keys.size("micro_batch_size"), keys.size("data_parallel_size")
        if micro and ranks:
            draft.put("batch_sequences", Found(micro.value * ranks.value, f"{micro.said} x {ranks.said}"))
    ramp = _ramp(keys)
    if ramp is not None:
        draft.put("ramp_from", Found(ramp[0], keys.form("rampup_batch_size", keys.raw["rampup_batch_size"])))
    schedule = keys.find("step_batch_size_schedule")
    if schedule is not None:
        first = re.search(r"\b0:(\d{1,9})\b", str(schedule[1]))
        if first and int(first[1]) > 0:
            draft.put("ramp_from", Found(int(first[1]), keys.form(*schedule)))


def _ramp(keys: Keys) -> Ramp | None:
    """Return (first batch, step of growth, samples until the last), all above 0."""
    found = keys.find("rampup_batch_size")
    if found is None:
        return None
    raw = found[1]
    if isinstance(raw, str) and raw.startswith("["):
        try:
            raw = ast.literal_eval(raw)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raw = None
    parts = [str(part) for part in raw] if isinstance(raw, list) else str(raw).split()
    try:
        first, step, samples = (int(part) for part in parts)
    except ValueError:
        raise keys.wrong("rampup_batch_size", "three whole numbers: first batch, increment, samples") from None
    if first < 1 or step < 1 or samples < 0:
        raise keys.wrong("rampup_batch_size", "three whole numbers above 0: first batch, increment, samples")
    return first, step, samples


def _lengths(keys: Keys, draft: Draft) -> None:
    """Length of the run and of the warm-up, in steps, also where they are said in samples."""
    batch, ramp = draft.get("batch_sequences"), _ramp(keys)
    draft.put("total_steps", keys.size("train_iters"))
    samples = keys.size("train_samples")
    if "total_steps" not in draft.values and samples and batch:
        draft.put("total_steps", Found(steps_for(samples.value, batch, ramp), samples.said))
    decay = keys.size("lr_decay_iters") or keys.size("lr_decay_samples")
    in_samples = decay is not None and "samples" in decay.said
    iterations, warmup = keys.whole("lr_warmup_iters"), keys.whole("lr_warmup_samples")
    fraction = keys.number("lr_warmup_fraction", low=0, high=1)
    if fraction is not None:
        span = None if decay is None else decay.value
        if decay is not None and in_samples:
            span = steps_for(round(fraction.value * decay.value), batch, ramp) if batch else None
            draft.put("warmup_steps", Found(span, fraction.said) if span is not None else None)
        else:
            span = span or draft.get("total_steps")
            draft.put("warmup_steps", Found(round(fraction.value * span), fraction.said) if span else None)
    elif warmup is not None and warmup.value > 0:
        if batch:
            draft.put("warmup_steps", Found(steps_for(warmup.value, batch, ramp), warmup.said))
    else:
        draft.put("warmup_steps", iterations)


def _training_defaults(keys: Keys, draft: Draft) -> None:
    for name, value in (
        ("optimizer", "adamw"), ("min_lr", 0.0), ("schedule", "linear"), ("beta1", 0.9), ("beta2", 0.999),
        ("eps", 1e-8), ("weight_decay", 0.01), ("decay_embeddings", True), ("clip", 1.0), ("z_loss", 0.0),
        ("state_dtype", "fp32"), ("master_weights", True), ("dtype", "fp32"), ("skip_steps", False),
    ):  # fmt: skip
        draft.default(name, value, OF)
    if not keys.has("lr_warmup_fraction", "lr_warmup_samples") and draft.get("lr") is not None:
        draft.default("warmup_steps", 0, OF)
