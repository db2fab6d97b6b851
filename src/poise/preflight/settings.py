"""What a configuration says, in one vocabulary: readers fill it in, rules judge it. ``None`` means that it is not said.

A field is only filled in with what the file says or what the framework that it belongs to does by default (then
``said`` begins with "default of ..."; with "guessed from ..." where a neighbouring setting suggests it). A rule that
needs a field that is ``None`` does not judge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from poise.core.types import Severity

Norm = Literal["pre", "post", "sandwich", "reordered"]
Positions = Literal["rope", "learned", "sinusoidal", "alibi", "none"]
Dtype = Literal["fp32", "bf16", "fp16", "fp8", "fp4"]


class Said(dict[str, str]):
    """How a source says each field, and what else is known of its words.

    Attributes:
        called: field -> what the source calls it, also for fields that it does not set.
        unclear: fields that it sets to something that cannot be read; no default takes their place.
    """

    def __init__(
        self, words: Mapping[str, str], called: Mapping[str, str] | None = None, unclear: Iterable[str] = ()
    ) -> None:
        super().__init__(words)
        self.called, self.unclear = dict(called or {}), frozenset(unclear)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One training run before it starts.

    Attributes:
        source: file or preset, for messages.
        format: ``recipe``, ``hf``, ``megatron``, ``torchtitan``, ``model`` or ``preset``.
        n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size, max_positions: the model's shape.
        gated_mlp: three matrices (SwiGLU, GEGLU) instead of two.
        tied: the output shares the embedding's weights.
        norm: where the normalisation stands.
        norm_kind: ``rmsnorm``, ``layernorm``, ``nonparametric``.
        positions: how positions enter.
        biases: linear layers have biases.
        qk_norm: queries and keys are normalised.
        qk_clip: bound of QK-Clip on attention logits.
        attn_soft_cap, logit_soft_cap: bounds of a tanh on attention logits and output logits; 0 is none.
        attention_kernel: as the framework calls it, lower case: ``flash_attention_2``, ``sdpa``, ``eager``, ...
        embed_norm: a normalisation right after the embedding.
        embed_scale: factor on the embedding's output.
        methods: names of our methods that are applied.
        n_experts: of a mixture of experts; ``None`` or 0 for a dense model.
        router_z_loss: coefficient on the router's logits.
        init_std: standard deviation of ordinary matrices.
        embed_std: that of the embedding where it differs.
        residual_init: how output projections differ: ``none``, ``scaled`` (by 1/sqrt(2 n_layers)), ``depth`` (by
            layer).
        optimizer: lower case: ``adamw``, ``adafactor``, ``lion``, ``muon``, ...
        lr, min_lr: peak and final learning rate.
        schedule: ``cosine``, ``linear``, ``wsd``, ``constant``, ...
        warmup_steps, total_steps: in optimizer steps.
        beta1, beta2, eps, weight_decay: of the optimizer.
        decay_embeddings: weight decay acts on the embedding too.
        clip: bound of the gradient's global norm; 0 is none.
        z_loss: coefficient of log² Z; 0 is none.
        batch_sequences: sequences in a step over all devices; ``seq_len`` tokens each.
        ramp_from: sequences in a step where a batch ramp begins.
        state_dtype: in which the optimizer keeps its moments: ``fp32``, ``bf16``, ``8bit``, ``4bit``.
        master_weights: fp32 weights are kept beside low-precision ones.
        dtype: the matrices' products are computed in it.
        loss_scale: ``dynamic``, ``none``, or a number as text; only read for fp16.
        softmax_fp32: attention's softmax is computed in fp32.
        dataset_tokens: unique tokens in the training data.
        epochs: how often the training data are gone through, where the source counts a run in that.
        tokenizer_vocab: ids that the tokenizer can give.
        dropout: of hidden states.
        skip_steps: the loop leaves out steps whose loss or gradient norm is far off.
        nan_check: the loop stops or skips at a loss that is not finite.
        devices: accelerators at work.
        step_seconds: wall time of a step.
        save_every: steps between checkpoints; 0 is never.
        params: number of weights where said; ``n_params`` estimates it otherwise.
        said: field name -> how the source says it, e.g. ``--init-method-std 0.02``; a reader's is a ``Said``.
        notes: what the reader has to say: guesses, ignored parts.
    """

    source: str
    format: str
    n_layers: int | None = None
    d_model: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    vocab_size: int | None = None
    max_positions: int | None = None
    gated_mlp: bool | None = None
    tied: bool | None = None
    norm: Norm | None = None
    norm_kind: str | None = None
    positions: Positions | None = None
    biases: bool | None = None
    qk_norm: bool | None = None
    qk_clip: float | None = None
    attn_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    attention_kernel: str | None = None
    embed_norm: bool | None = None
    embed_scale: float | None = None
    methods: tuple[str, ...] = ()
    n_experts: int | None = None
    router_z_loss: float | None = None
    init_std: float | None = None
    embed_std: float | None = None
    residual_init: Literal["none", "scaled", "depth"] | None = None
    optimizer: str | None = None
    lr: float | None = None
    min_lr: float | None = None
    schedule: str | None = None
    warmup_steps: int | None = None
    total_steps: int | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    decay_embeddings: bool | None = None
    clip: float | None = None
    z_loss: float | None = None
    batch_sequences: int | None = None
    seq_len: int | None = None
    ramp_from: int | None = None
    state_dtype: Literal["fp32", "bf16", "8bit", "4bit"] | None = None
    master_weights: bool | None = None
    dtype: Dtype | None = None
    loss_scale: str | None = None
    softmax_fp32: bool | None = None
    dataset_tokens: float | None = None
    epochs: float | None = None
    tokenizer_vocab: int | None = None
    dropout: float | None = None
    skip_steps: bool | None = None
    nan_check: bool | None = None
    devices: int | None = None
    step_seconds: float | None = None
    save_every: int | None = None
    params: float | None = None
    said: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def batch_tokens(self) -> int | None:
        """Tokens in a step."""
        if self.batch_sequences is None or self.seq_len is None:
            return None
        return self.batch_sequences * self.seq_len

    @property
    def n_params(self) -> float | None:
        """Number of weights: as said, else estimated from the shape of a dense decoder; without experts."""
        if self.params is not None:
            return self.params
        if self.n_layers is None or self.d_model is None:
            return None
        width = self.d_model
        inner = self.d_ff if self.d_ff is not None else 4 * width
        kv_share = 1.0
        if self.n_heads and self.n_kv_heads:
            kv_share = self.n_kv_heads / self.n_heads
        block = width * width * (2.0 + 2.0 * kv_share) + (3 if self.gated_mlp else 2) * width * inner
        embeddings = (self.vocab_size or 0) * width * (1 if self.tied else 2)
        return self.n_layers * block + embeddings

    def say(self, name: str) -> str:
        """Return how the source says a field, with the field and its value where those words do not hold the value.

        >>> own = Settings(source="a", format="hf", lr=3e-4, tied=True, said={"lr": "--lr 3.0e-4", "tied": "gpt2"})
        >>> own.say("lr"), own.say("tied"), own.say("clip")
        ('--lr 3.0e-4', 'tied = True (gpt2)', 'clip = None')
        """
        value = getattr(self, name)
        plain, words = f"{name} = {_shown(value)}", self.said.get(name, "")
        if not words:
            return plain
        weak = words.startswith(("default of", "guessed from"))
        return f"{plain} ({words})" if weak or not _holds(words, value) else words

    @property
    def called(self) -> Mapping[str, str]:
        """Field name -> what the source calls it, e.g. ``--clip-grad``; empty where no reader has filled it in."""
        return self.said.called if isinstance(self.said, Said) else {}

    def name_of(self, name: str) -> str:
        """Return what the source calls a field, for advice in its own words; the field where it has no name for it."""
        return self.called.get(name, name)


_NUMBER = re.compile(r"(?<![\w.])(?<!\w-)-?(?:\d[\d_,]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) and len(repr(value)) > 8 else str(value)


def _holds(words: str, value: object) -> bool:
    """Return whether a value can be read in the words; numbers are, to four digits, however they are written."""
    if isinstance(value, bool):
        return bool(re.search(rf"\b{value}\b", words, re.IGNORECASE))
    if isinstance(value, int | float):
        texts = (text.replace(",", "").replace("_", "") for text in _NUMBER.findall(words))
        return any(math.isclose(float(text), value, rel_tol=1e-3) for text in texts)
    return not isinstance(value, str) or value.lower() in words.lower()


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule that a configuration breaks.

    Attributes:
        rule: the rule's id, e.g. ``init-std-width``.
        severity: ``critical`` is known to break runs; ``warning`` is known to hurt; ``note`` is worth knowing.
        what: what the configuration says, with the values, one sentence.
        why: what is known to happen, one sentence with the numbers.
        mend: what to write instead, with the value.
        source: whose experience that is.
        fields: the fields that it judges.
    """

    rule: str
    severity: Severity
    what: str
    why: str
    mend: str
    source: str
    fields: tuple[str, ...]
