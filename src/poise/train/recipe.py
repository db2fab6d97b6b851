"""A recipe is a whole run: model, data, optimizer, guard and budget, frozen and checked before anything starts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from poise.core import config
from poise.core.errors import UserError, nearest
from poise.data.feed import ramp
from poise.data.feed.loader import Feed
from poise.data.settings import Settings
from poise.guard.config import GuardConfig
from poise.model.methods import apply_methods
from poise.model.spec import Part, Spec
from poise.optim.build import OptimConfig
from poise.optim.schedules import lr_at


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the decoder and the stability methods in it.

    ``n_kv_heads = 0`` means as many as ``n_heads``; ``d_ff = 0`` means 4 d_model for gelu and the usual
    8/3 d_model, rounded up to a multiple of 64, for swiglu. ``init`` is the standard deviation of matrices:
    ``default`` is 0.02, ``small`` is sqrt(2 / (5 d_model)), which is larger below a width of 1000.
    """

    n_layers: int = 4
    d_model: int = 256
    n_heads: int = 4
    n_kv_heads: int = 0
    d_ff: int = 0
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    tied: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    init: Literal["default", "small"] = "small"
    methods: tuple[str, ...] = ("wesar", "peri_ln", "qk_norm", "z_loss", "layer_scale")

    def spec(self, vocab_size: int, seq_len: int) -> Spec:
        """Return the model's ``Spec``, methods applied."""
        if self.d_ff:
            d_ff = self.d_ff
        elif self.mlp == "gelu":
            d_ff = 4 * self.d_model
        else:
            d_ff = -(-8 * self.d_model // 3 // 64) * 64
        plain = Spec(
            vocab_size=vocab_size,
            seq_len=seq_len,
            n_layers=self.n_layers,
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads or self.n_heads,
            d_ff=d_ff,
            mlp=self.mlp,
            tied=self.tied,
            rope_theta=self.rope_theta,
            norm_eps=self.norm_eps,
            init=Part.of(self.init),
        )
        return apply_methods(plain, self.methods)


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from.

    ``source`` is ``stdlib`` (the Python standard library's own sources), a file or folder, ``hf:owner/name``,
    or a folder that ``poise data prepare`` wrote. ``dir`` is where prepared tokens are kept; empty means a
    cache folder chosen by source and settings. From ``mask_repeats`` on: how prepared text becomes samples, see
    ``poise.data.feed.loader.Feed``.
    """

    source: str = "stdlib"
    dir: str = ""
    vocab_size: int = 8192
    tokenizer: str = ""
    val_fraction: float = 0.01
    text_field: str = "text"
    mask_repeats: bool = True
    pack: Literal["concat", "best_fit"] = "concat"
    document_mask: bool = False
    mix: tuple[str, ...] = ()
    temperature: float = 0.0

    def __post_init__(self) -> None:
        _ = self.feed  # raises where its values cannot be
        if not 0.0 <= self.val_fraction < 0.5:
            raise UserError(f"data.val_fraction is {self.val_fraction}; use a share from 0 up to 0.5, e.g. 0.01")
        if self.vocab_size < 257:
            raise UserError(f"data.vocab_size is {self.vocab_size}; a byte-level BPE needs at least 257")

    @property
    def feed(self) -> Feed:
        """How prepared text becomes samples."""
        return Feed(self.mask_repeats, self.pack, self.document_mask, self.mix, self.temperature)

    @property
    def settings(self) -> Settings:
        """What ``poise.data.prepare`` needs to know."""
        return Settings(
            vocab_size=self.vocab_size,
            tokenizer=self.tokenizer or None,
            val_fraction=self.val_fraction,
            text_field=self.text_field,
        )


@dataclass(frozen=True)
class TrainConfig:
    """Budget, batch and habits of the run.

    ``batch_size`` counts sequences per step over all ranks; ``micro_batch = 0`` means all of a rank's at once.
    Every ``linear_norms_every`` steps (0: never) the norms of each linear layer's input, output, weight and input
    gradient are journalled. ``recompute`` forgets the activations inside each block and computes them again in the
    backward pass (activation checkpointing): less memory, about a third more time.
    ``compile = auto`` compiles the trunk when the run is long enough to repay about half a minute of
    compilation; ``dtype = auto`` computes in bf16 where the machine multiplies it fast, else in fp32.
    ``length_start`` (0: off) is the sequence length at first; it doubles its way to ``seq_len`` along a line in tokens
    seen that ends after ``length_tokens``; a step has the same tokens throughout. ``batch_start`` and ``batch_tokens``
    do the same for the batch, whose learning rate follows by ``batch_lr``; both together only with ``both_ramps``.
    ``row_losses`` journals the loss of every sequence at every step, not only at steps with an alarm.
    """

    steps: int = 400
    batch_size: int = 8
    micro_batch: int = 0
    seq_len: int = 256
    eval_every: int = 100
    eval_batches: int = 8
    save_every: int = 50
    keep_last: int = 3
    keep_best: int = 1
    linear_norms_every: int = 0
    recompute: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    threads: int = 0
    length_start: int = 0
    length_tokens: int = 0
    batch_start: int = 0
    batch_tokens: int = 0
    batch_lr: Literal["sqrt", "linear", "none"] = "sqrt"
    both_ramps: bool = False
    row_losses: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "keep_last", "eval_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("micro_batch", "eval_every", "save_every", "keep_best", "linear_norms_every", "threads"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must be 0 (off) or more")
        for name, tokens in (("length", self.length_tokens), ("batch", self.batch_tokens)):
            start = getattr(self, f"{name}_start")
            if min(start, tokens) < 0 or (start > 0) != (tokens > 0):
                raise UserError(
                    f"train.{name}_start is {start} and train.{name}_tokens is {tokens}; give both as positive numbers "
                    f"or leave both at 0 (off)"
                )
        ramp.check(self.length_ramp, self.batch_ramp, self.both_ramps)
        most = 4 * (os.cpu_count() or 1)
        if self.threads > most:
            raise UserError(
                f"train.threads is {self.threads}; use at most {most} on this machine, or 0 for torch's choice"
            )
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise UserError(f"train.micro_batch {self.micro_batch} does not divide train.batch_size {self.batch_size}")

    @property
    def length_ramp(self) -> ramp.LengthRamp | None:
        """The sequence length over the tokens seen, where it is to grow."""
        return ramp.LengthRamp(self.length_start, self.seq_len, self.length_tokens) if self.length_start else None

    @property
    def batch_ramp(self) -> ramp.BatchRamp | None:
        """The batch size over the tokens seen, where it is to grow."""
        if not self.batch_start:
            return None
        return ramp.BatchRamp(self.batch_start, self.batch_size, self.batch_tokens, self.batch_lr, seq_len=self.seq_len)


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    name: str = "nano"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set('/\\:*?"<>|') or self.name.startswith("."):
            raise UserError(f"name is {self.name!r}; use letters, digits, '-' and '_', it names the run's folder")
        lr_at(1, self.train.steps, self.optim.schedule)  # raises where warm-up and decay do not fit the budget

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, of a full one where the batch grows."""
        return self.train.batch_size * self.train.seq_len

    @property
    def total_samples(self) -> int:
        """Samples of the whole budget, as long as nothing is dropped."""
        growing = self.train.batch_ramp
        return growing.first_sample(self.train.steps + 1) if growing else self.train.steps * self.train.batch_size

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole budget."""
        return self.total_samples * self.train.seq_len

    def spec(self, vocab_size: int | None = None) -> Spec:
        """Return the model's ``Spec`` (``vocab_size``: what the tokenizer really has)."""
        return self.model.spec(vocab_size or self.data.vocab_size, self.train.seq_len)

    def replace(self, section: str, **values: Any) -> Recipe:
        """Return a copy with some values of one section changed."""
        return dataclasses.replace(self, **{section: dataclasses.replace(getattr(self, section), **values)})


def shipped() -> dict[str, Path]:
    """Return the recipes that come with poise: name -> TOML file."""
    folder = resources.files("poise.train") / "recipes"
    return {Path(str(f)).stem: Path(str(f)) for f in folder.iterdir() if f.name.endswith(".toml")}


def load(where: str = "nano", over: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe from a TOML file or by the name of a shipped one, with overrides on top.

    Raises:
        UserError: no such recipe, an unknown key, or a value that cannot be.
    """
    path = Path(where)
    if not path.is_file():
        known = shipped()
        if path.stem not in known or path.name not in (path.stem, path.stem + ".toml"):
            raise UserError(
                f"no recipe file '{where}'{nearest(path.stem, known)}; shipped recipes: {', '.join(sorted(known))}"
            )
        path = known[path.stem]
    values = config.load(path)
    config.build(Recipe, values, where=path.name)  # so that a fault in the file names the file
    recipe = config.build(Recipe, config.merge(values, over or {}))
    recipe.spec()  # heads, widths and methods that cannot be combined are found before any data is read
    return recipe
