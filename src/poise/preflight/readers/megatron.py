"""Megatron-LM's arguments: in a script or command line, as flat YAML or JSON, or as a training log repeats them.

Names, meanings and defaults are those of ``megatron/training/arguments.py`` (NVIDIA/Megatron-LM), with the additions of
the BigScience fork (``--embed-layernorm``, ALiBi). Defaults of the model are filled in where the source describes a
model, those of training where it describes training; ``said`` then is "default of Megatron-LM".
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from poise.core.errors import UserError
from poise.preflight.readers.document import Document
from poise.preflight.readers.draft import LARGEST, Draft, Found, Keys, flattened, merge, not_read, with_unread
from poise.preflight.readers.megatron_steps import Ramp, steps_for
from poise.preflight.readers.megatron_words import (
    CALLED,
    KNOWN,
    MACHINES,
    NODES,
    PER_NODE,
    SHAPE,
    TRAINING,
    as_argument,
    as_flag,
    best_line,
    dest,
    dump_of,
)
from poise.preflight.readers.shell import script
from poise.preflight.settings import Settings

FORMAT = "megatron"
LOOKS_FOR = "Megatron-LM arguments (a script with --num-layers ... --lr ..., flat YAML, or a log that begins with them)"
OF = "Megatron-LM"

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
    dump = dump_of(document.text)
    if len(dump) >= 5 and len(KNOWN & dump.keys()) >= 3:
        return 0.9
    return 0.9 if len(KNOWN & {dest(flag) for flag in re.findall(r"--[a-z][\w-]{0,60}", document.text)}) >= 3 else 0.0


def read(documents: Sequence[Document]) -> Settings:
    """Read files of arguments; several are several parts of one command line."""
    return merge([_read(document) for document in documents])


def _read(document: Document) -> Settings:
    if document.kind != "text":
        raw, twice = flattened(with_unread(document.data, document.unread))
        keys = Keys(raw, document.name, lambda key, value: f"{key}: {value}")
        notes = [*not_read(twice, "second values of a key"), *not_read(document.unread)]
        return _settings(keys, document.name, notes)
    dump = dump_of(document.text)
    if len(KNOWN & dump.keys()) >= 3:
        return from_dump(dump, document.name)
    lines, variables = script(document.text)
    raw, more = best_line(lines)
    nodes = {name: value for name, value in variables.items() if name in MACHINES}
    keys = Keys({**nodes, **raw}, document.name, as_argument, as_flag)
    notes = [f"{word} may hold more arguments: nothing is taken to be a default" for word in more[:1]]
    return _settings(keys, document.name, notes, defaults=not more)


def from_dump(raw: Mapping[str, Any], source: str) -> Settings:
    """Return what a log's own argument dump says, by Megatron-LM's names with underscores.

    Raises:
        UserError: a value that cannot be.
    """
    return _settings(Keys(raw, source, lambda key, value: f"{key} = {value}"), source, [], True)


def _settings(keys: Keys, source: str, notes: list[str], is_dump: bool = False, defaults: bool = True) -> Settings:
    draft = Draft(source, FORMAT, {name: keys.label(key) for name, key in CALLED.items()})
    draft.notes.extend(notes)
    _shape(keys, draft)
    _start(keys, draft)
    _precision(keys, draft)
    _training(keys, draft)
    if keys.has(*SHAPE) and defaults:
        _shape_defaults(draft)
    if keys.has(*TRAINING) and defaults:
        _training_defaults(keys, draft)
    if not defaults:
        draft.unknown(*(name for name, said in draft.said.items() if said.startswith("default of")))
    draft.notes.extend(keys.notes())
    if not is_dump:
        rest = [key for key in keys.unread(MACHINES) if "$" not in str(keys.raw[key])]
        draft.notes.extend(not_read(rest))
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
    elif keys.is_unclear("group_query_attention"):
        draft.unknown("n_kv_heads")
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
        if keys.is_on(name) or keys.is_unclear(name):
            draft.put("gated_mlp", keys.flag(name))
    if (unit := keys.word("glu_activation")) is not None:
        draft.put("gated_mlp", unit.then(lambda word: word.endswith("glu")))
    if (untied := keys.flag("untie_embeddings_and_output_weights")) is not None:
        draft.put("tied", untied.then(operator.not_))
    draft.put("norm_kind", keys.word("normalization"))
    keys.find("apply_layernorm_1p")  # another way to write the same gains
    if (positions := keys.word("position_embedding_type")) is not None:
        word = str(positions.value).rpartition(".")[2]
        if word not in _POSITIONS and positions.value is not None:
            draft.notes.append(f"{positions.said} is not judged")
        draft.put("positions", positions.then(lambda _: _POSITIONS.get(word)))
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
    elif (kernel := keys.word("attention_backend")) is not None and not str(kernel.value).endswith("auto"):
        draft.put("attention_kernel", kernel.then(lambda word: word.rpartition(".")[2]))
    draft.put("embed_norm", keys.flag("embed_layernorm"))
    draft.put("dropout", keys.number("hidden_dropout", low=0, high=1))


def _start(keys: Keys, draft: Draft) -> None:
    if keys.is_on("init_method_xavier_uniform"):
        draft.notes.append("--init-method-xavier-uniform: the start of matrices is not judged")
        keys.find("init_method_std")
        draft.unknown("residual_init", "init_std")
        return
    draft.put("init_std", keys.number("init_method_std", low=0))
    draft.put("embed_std", keys.number("embedding_init_method_std", low=0))


def _shape_defaults(draft: Draft) -> None:
    gated = bool(draft.get("gated_mlp"))
    width = draft.get("d_model")
    is_unclear = "gated_mlp" in draft.values and draft.get("gated_mlp") is None
    if width and "glu_activation" in draft.said.get("gated_mlp", "").replace("-", "_"):
        draft.default("d_ff", 4 * width, "BigScience's Megatron-DeepSpeed: 4 x hidden size")
    elif width and not is_unclear:
        inner = int(4 * width * 2 / 3) // 64 * 64 if gated else 4 * width
        draft.default("d_ff", inner, f"{OF}: {'8/3' if gated else '4'} x hidden size")
    for name, value in (
        ("gated_mlp", False), ("tied", True), ("norm", "pre"), ("norm_kind", "layernorm"), ("biases", True),
        ("qk_norm", False), ("attn_soft_cap", 0.0), ("logit_soft_cap", 0.0), ("embed_norm", False),
        ("init_std", 0.02), ("residual_init", "scaled"), ("n_experts", 0), ("dropout", 0.1),
    ):  # fmt: skip
        draft.default(name, value, OF)
    draft.default("positions", "learned", OF)


def _precision(keys: Keys, draft: Draft) -> None:
    low = next((name for name in ("fp4", "fp8", "fp8_format", "fp4_format") if _is_said(keys, name)), None)
    if low is not None:
        draft.put("dtype", Found(low[:3], keys.form(low, keys.raw[low])))
    elif any(keys.is_unclear(name) for name in ("fp4", "fp8", "fp8_format", "fp4_format", "bf16", "fp16")):
        draft.unknown("dtype")
    elif keys.is_on("bf16") and keys.is_on("fp16"):
        raise UserError(
            f"'{keys.where}': both {_said(keys, 'bf16')} and {_said(keys, 'fp16')} are set; give one of them"
        )
    elif keys.is_on("bf16"):
        draft.put("dtype", Found("bf16", _said(keys, "bf16")))
    elif keys.is_on("fp16"):
        draft.put("dtype", Found("fp16", _said(keys, "fp16")))
        scale = keys.number("loss_scale", low=0)
        if keys.is_on("deepspeed"):
            draft.notes.append("DeepSpeed scales the loss as its own configuration says, which is not read")
        else:
            draft.put("loss_scale", scale.then(lambda value: f"{value:g}") if scale else None)
            draft.default("loss_scale", "dynamic", OF)
        keys.find("initial_loss_scale")
    fused = keys.flag("masked_softmax_fusion")
    unfused = keys.is_on("no_masked_softmax_fusion") or (fused is not None and fused.value is False)
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
        draft.put("schedule", style.then(lambda word: _SCHEDULES.get(word, word)))
    if (rule := keys.word("optimizer")) is not None:
        draft.put("optimizer", rule.then(lambda word: _OPTIMIZERS.get(word, word)))
        if draft.get("optimizer") == "adamw" and keys.is_on("no_decoupled_weight_decay"):
            draft.put("optimizer", rule.then(lambda _: "adam"))
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
        states = [kind.then(lambda word: _STATES.get(word.rpartition(".")[2], "fp32")) for kind in kinds if kind]
        draft.put("state_dtype", next((state for state in states if state.value != "fp32"), None))
    if keys.is_on("no_check_for_nan_in_loss_and_grad"):
        draft.put("nan_check", Found(False, "--no-check-for-nan-in-loss-and-grad"))
    else:
        draft.put("nan_check", keys.flag("check_for_nan_in_loss_and_grad"))
    threshold = keys.find("grad_norm_skip_threshold")
    if threshold is not None and "inf" not in str(threshold[1]).lower():
        draft.put("skip_steps", Found(True, keys.form(*threshold)))


def _batch(keys: Keys, draft: Draft) -> None:
    _devices(keys, draft)
    draft.put("batch_sequences", keys.size("global_batch_size"))
    if "batch_sequences" not in draft.values:
        micro, ranks = keys.size("micro_batch_size"), keys.size("data_parallel_size")
        if micro and ranks and micro.value and ranks.value:
            draft.put("batch_sequences", Found(micro.value * ranks.value, f"{micro.said} x {ranks.said}"))
    ramp = _ramp(keys)
    if ramp is not None:
        draft.put("ramp_from", Found(ramp[0], keys.form("rampup_batch_size", keys.raw["rampup_batch_size"])))
    schedule = keys.find("step_batch_size_schedule")
    if schedule is not None:
        first = re.search(r"\b0:(\d{1,9})\b", str(schedule[1]))
        if first and int(first[1]) > 0:
            draft.put("ramp_from", Found(int(first[1]), keys.form(*schedule)))


def _devices(keys: Keys, draft: Draft) -> None:
    """Accelerators as the launcher's arguments, or else the script's variables, say."""
    draft.put("devices", keys.size("world_size"))
    for each, nodes in (("nproc_per_node", "nnodes"), *((e, n) for e in PER_NODE for n in NODES)):
        found = [keys.find(each), keys.find(nodes)]
        counts = [int(one[1]) for one in found if one and str(one[1]).isascii() and str(one[1]).isdigit()]
        if len(counts) == 2 and 0 < counts[0] * counts[1] < LARGEST and "devices" not in draft.values:
            how = " ".join(keys.form(*one) for one in found if one)
            draft.put("devices", Found(counts[0] * counts[1], how if how.startswith("--") else how.replace(" ", " x ")))
    if "devices" not in draft.values and not keys.has(*PER_NODE):
        world = keys.find("WORLD_SIZE")
        draft.put("devices", keys.size("WORLD_SIZE") if world and str(world[1]).isdigit() else None)


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
    if "total_steps" not in draft.values and samples and (batch or samples.value is None):
        draft.put("total_steps", samples.then(lambda value: steps_for(value, batch, ramp))._replace(key=""))
    decay = keys.size("lr_decay_iters") or keys.size("lr_decay_samples")
    in_samples = decay is not None and "samples" in decay.said
    iterations, warmup = keys.whole("lr_warmup_iters"), keys.whole("lr_warmup_samples")
    fraction = keys.number("lr_warmup_fraction", low=0, high=1)
    if fraction is not None and fraction.value is None:
        draft.unknown("warmup_steps")
    elif fraction is not None:
        span = None if decay is None else decay.value
        if decay is not None and in_samples and decay.value:
            span = steps_for(round(fraction.value * decay.value), batch, ramp) if batch else None
            draft.put("warmup_steps", Found(span, fraction.said) if span is not None else None)
        else:
            span = span or draft.get("total_steps")
            unsaid = decay is not None and decay.value is None
            draft.put(
                "warmup_steps", Found(round(fraction.value * span), fraction.said) if span and not unsaid else None
            )
    elif warmup is not None and warmup.value != 0:
        if batch or warmup.value is None:
            draft.put("warmup_steps", warmup.then(lambda value: steps_for(value, batch, ramp))._replace(key=""))
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
