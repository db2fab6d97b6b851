"""The description of a model: sizes, then slots. A ``Spec`` is data; nothing here imports torch.

A slot is a place in the decoder that a method may claim. It holds a ``Part``: a name and plain fields, so
that a spec can be printed, compared, swept, written to JSON or TOML and built again anywhere.

| slot            | what its module does                                               | default   |
|-----------------|--------------------------------------------------------------------|-----------|
| `norm`          | normalises the last dimension                                      | `rmsnorm` |
| `final_norm`    | residual stream -> final hidden states                             | `norm`    |
| `branch_in`     | residual stream -> input of attention or MLP                       | `norm`    |
| `branch_out`    | output of attention or MLP -> what is added                        | `none`    |
| `residual`      | (stream, branch output) -> stream                                  | `add`     |
| `qk`            | (queries, keys) -> (queries, keys), per head, before RoPE          | `none`    |
| `values`        | (values, the first block's) -> (values, the first block's)         | `none`    |
| `qkv_gate`      | (queries, keys, values, attention input) -> the three              | `none`    |
| `attn_scale`    | a number: attention logits are scale · q kᵀ                        | `sqrt`    |
| `qk_tap`        | listens to queries and keys after RoPE                             | `none`    |
| `qk_penalty`    | query and key matrices of a block -> a loss                        | `none`    |
| `scores`        | (queries, keys, values) -> attention output                        | `softmax` |
| `attn_gate`     | (attention output, attention input) -> attention output            | `none`    |
| `attn_mid`      | attention output -> input of its output matrix                     | `none`    |
| `attn_out_gate` | (output matrix's output, attention input) -> attention's output    | `none`    |
| `activation`    | inner MLP activations -> hidden activations                        | `default` |
| `mlp_mid`       | hidden activations -> input of the MLP's output matrix             | `none`    |
| `linear`        | the matrix product of every projection inside a block              | `linear`  |
| `embed_grad`    | rows of the embedding -> the same rows, with another gradient      | `none`    |
| `embed_out`     | embedding output -> residual stream                                | `none`    |
| `head_in`       | final hidden states -> input of the output head                    | `none`    |
| `head`          | output matrix -> output matrix                                     | `none`    |
| `logits`        | output logits -> output logits, element by element                 | `none`    |
| `loss_terms`    | any number: log Z of each token -> a loss                          | nothing   |
| `init`          | parameter role -> standard deviation at the start                  | `default` |
| `residual_init` | a number: residual outputs start at so many times that deviation   | `init`    |
| `embed_std`     | a number: standard deviation of the embedding at the start         | `init`    |
| `lr_scales`     | any number: parameter role -> its share of the learning rate       | nothing   |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from poise.core.errors import Conflict, UserError, nearest

Value = str | int | float | bool

MLPS: Final = ("swiglu", "gelu")

SIZES: Final = ("vocab_size", "seq_len", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff")

MOST: Final = 2**31
"""Bound of every size, and of whole numbers among the settings of methods."""


@dataclass(frozen=True, slots=True)
class Part:
    """What sits in a slot: a name, and the fields its builder takes.

    >>> Part.of("z_loss", {"coefficient": 1e-4})
    Part(name='z_loss', fields=(('coefficient', 0.0001),))
    """

    name: str
    fields: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def of(cls, name: str, fields: Mapping[str, Value | None] | None = None) -> Part:
        """Make a part; a field that is ``None`` is left to the builder's default."""
        given = (fields or {}).items()
        assert all(key != "name" for key, _ in given), "'name' is the part's own name"
        return cls(name, tuple(sorted((k, v) for k, v in given if v is not None)))

    def to_dict(self) -> dict[str, Value]:
        """Return ``{"name": ..., field: value, ...}``."""
        return {"name": self.name, **dict(self.fields)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Part:
        """The inverse of ``to_dict``.

        Raises:
            UserError: no name, or a value that is not a string, number or boolean.
        """
        rest = dict(values)
        name = rest.pop("name", None)
        if not isinstance(name, str):
            raise UserError(f"a part needs a 'name', but got {dict(values)}; e.g. {{'name': 'none'}}")
        for key, value in rest.items():
            if not isinstance(value, str | int | float | bool):
                raise UserError(f"field '{key}' of part '{name}' is {value!r}; give a string, number or boolean")
        return cls.of(name, rest)


@dataclass(frozen=True, slots=True)
class Spec:
    """A decoder-only language model.

    Attributes:
        vocab_size: number of token ids, V.
        seq_len: longest sequence the model takes, T.
        n_layers: number of blocks, N.
        d_model: width of the residual stream, D.
        n_heads: query heads, H; the head width is D / H.
        n_kv_heads: key and value heads; fewer than ``n_heads`` is grouped-query attention (arXiv 2305.13245).
        d_ff: hidden width of the MLP, F.
        mlp: ``swiglu`` (arXiv 2002.05202) or ``gelu``.
        tied: the output head is the embedding matrix.
        rope_theta: base of the rotary position angles (arXiv 2104.09864).
        norm_eps: added to the mean square inside every norm.
        methods: names of the methods applied, in order.
        claims: (slot, method) pairs: who took which slot.

    The other attributes are the slots of the table above.

    Raises:
        UserError: a size of another type, or sizes that do not fit together.
    """

    vocab_size: int
    seq_len: int
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    mlp: str = "swiglu"
    tied: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    norm: Part = Part("rmsnorm")
    final_norm: Part = Part("norm")
    branch_in: Part = Part("norm")
    branch_out: Part = Part("none")
    residual: Part = Part("add")
    qk: Part = Part("none")
    values: Part = Part("none")
    qkv_gate: Part = Part("none")
    attn_scale: Part = Part("sqrt")
    qk_tap: Part = Part("none")
    qk_penalty: Part = Part("none")
    scores: Part = Part("softmax")
    attn_gate: Part = Part("none")
    attn_mid: Part = Part("none")
    attn_out_gate: Part = Part("none")
    activation: Part = Part("default")
    mlp_mid: Part = Part("none")
    linear: Part = Part("linear")
    embed_grad: Part = Part("none")
    embed_out: Part = Part("none")
    head_in: Part = Part("none")
    head: Part = Part("none")
    logits: Part = Part("none")
    loss_terms: tuple[Part, ...] = ()
    init: Part = Part("default")
    residual_init: Part = Part("init")
    embed_std: Part = Part("init")
    lr_scales: tuple[Part, ...] = ()
    methods: tuple[str, ...] = ()
    claims: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in SIZES:
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise UserError(f"{name} is {size!r}; give a whole number of at least 1")
            if size > MOST:
                raise UserError(f"{name} is above {MOST}; give a smaller whole number")
        for name in ("rope_theta", "norm_eps"):
            number = getattr(self, name)
            if type(number) not in (int, float) or not 0 < number < math.inf:
                raise UserError(f"{name} is {number!r}; give a finite number above 0")
        if type(self.tied) is not bool:
            raise UserError(f"tied is {self.tied!r}; give true or false")
        if self.d_model % self.n_heads:
            raise UserError(
                f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}; "
                f"make d_model a multiple of it, e.g. {_multiple(self.d_model, self.n_heads)}"
            )
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}; "
                f"use one of {[k for k in range(1, self.n_heads + 1) if self.n_heads % k == 0]}"
            )
        if self.head_dim % 2:
            raise UserError(
                f"the head width d_model / n_heads is {self.head_dim}, but RoPE rotates pairs and needs an "
                f"even number; use d_model {2 * self.d_model} or other n_heads"
            )
        if self.mlp not in MLPS:
            meant = nearest(self.mlp, MLPS) if isinstance(self.mlp, str) else ""
            raise UserError(f"mlp is {self.mlp!r}{meant}; use one of {', '.join(MLPS)}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def d_inner(self) -> int:
        """Number of inner MLP activations: twice ``d_ff`` where a gate is among them."""
        return 2 * self.d_ff if self.mlp == "swiglu" else self.d_ff

    def claim(self, slot: str, part: Part, method: str) -> Spec:
        """Return a spec in which ``method`` has taken ``slot`` with ``part``.

        ``loss_terms`` and ``lr_scales`` take any number of parts, one of each name; every other slot takes one
        claim.

        Raises:
            Conflict: another method has the slot, or the same method was applied before.
        """
        assert slot in SLOTS, f"no slot '{slot}'"
        key = f"{slot}.{part.name}" if slot in MANY else slot
        owner = dict(self.claims).get(key)
        if owner == method:
            raise Conflict(f"method '{method}' is applied twice; name it once")
        if owner is not None:
            raise Conflict(f"methods '{owner}' and '{method}' both claim the slot '{key}'; remove one of the two")
        value = (*getattr(self, slot), part) if slot in MANY else part
        methods = self.methods if method in self.methods else (*self.methods, method)
        changes: dict[str, Any] = {slot: value, "methods": methods, "claims": (*self.claims, (key, method))}
        return replace(self, **changes)

    def diff(self, other: Spec) -> dict[str, tuple[Any, Any]]:
        """Return ``{field: (here, there)}`` for every field that differs."""
        names = [f.name for f in dataclasses.fields(self)]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested values that JSON and TOML can hold; ``from_dict`` is the exact inverse."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Part):
                value = value.to_dict()
            elif f.name in MANY:
                value = {part.name: dict(part.fields) for part in value}
            elif f.name == "claims":
                value = [list(pair) for pair in value]
            elif isinstance(value, tuple):
                value = list(value)
            out[f.name] = value
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Spec:
        """Make a spec from ``to_dict``'s result; slots that are left out have their defaults.

        Raises:
            UserError: an unknown or missing key, or a value that does not fit.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        given: dict[str, Any] = {}
        for key, value in values.items():
            if key not in fields:
                raise UserError(f"unknown model key '{key}'{nearest(key, fields)}")
            given[key] = _read(key, value, fields[key].type)
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in given]
        if missing:
            raise UserError(f"the model needs {', '.join(missing)}; add them or start from a preset")
        return cls(**given)


MANY: Final = ("loss_terms", "lr_scales")
"""Slots that hold any number of parts."""

SLOTS: Final = tuple(f.name for f in dataclasses.fields(Spec) if f.name in MANY or isinstance(f.default, Part))


def _read(key: str, value: Any, kind: Any) -> Any:
    """Return one value of a mapping as the field ``key`` holds it."""
    if key == "claims":
        return tuple((slot, method) for slot, method in value)
    if key in MANY:
        return tuple(Part.from_dict({"name": name, **fields}) for name, fields in value.items())
    if key == "methods":
        return tuple(value)
    if key in SLOTS:
        return Part.from_dict(value)
    wanted: type = {"int": int, "float": float, "bool": bool, "str": str}[kind]
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise UserError(f"model key '{key}' is {value!r}; give a value of type {kind}")
    return value


def _multiple(value: int, base: int) -> int:
    """The multiple of ``2 * base`` next above ``value``: it gives an even head width."""
    step = 2 * base
    return -(-value // step) * step
