"""The description of a model: sizes, then slots. A ``Spec`` is data; nothing here imports torch.

A slot is a place in the decoder that a method may claim. It holds a ``Part``: a name and plain fields, so
that a spec can be printed, compared, swept, written to JSON or TOML and built again anywhere.

| slot         | what its module does                                       | default   |
|--------------|------------------------------------------------------------|-----------|
| `norm`       | normalises the last dimension                              | `rmsnorm` |
| `branch_in`  | residual stream -> input of attention or MLP               | `norm`    |
| `branch_out` | output of attention or MLP -> what is added                | `none`    |
| `residual`   | (stream, branch output) -> stream                          | `add`     |
| `qk`         | (queries, keys) -> (queries, keys), per head, before RoPE  | `none`    |
| `scores`     | (queries, keys, values) -> attention output                | `softmax` |
| `attn_gate`  | (attention output, attention input) -> attention output    | `none`    |
| `linear`     | the matrix product of every projection inside a block      | `linear`  |
| `embed_out`  | embedding output -> residual stream                        | `none`    |
| `logits`     | output logits -> output logits, element by element         | `none`    |
| `loss_terms` | any number: log Z of each token -> a loss                  | nothing   |
| `init`       | parameter role -> standard deviation at the start          | `default` |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from poise.core.errors import Conflict, UserError, nearest

Value = str | int | float | bool

MLPS: Final = ("swiglu", "gelu")


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
        UserError: sizes that do not fit together.
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
    branch_in: Part = Part("norm")
    branch_out: Part = Part("none")
    residual: Part = Part("add")
    qk: Part = Part("none")
    scores: Part = Part("softmax")
    attn_gate: Part = Part("none")
    linear: Part = Part("linear")
    embed_out: Part = Part("none")
    logits: Part = Part("none")
    loss_terms: tuple[Part, ...] = ()
    init: Part = Part("default")
    methods: tuple[str, ...] = ()
    claims: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "seq_len", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; give a whole number of at least 1")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; give a number above 0")
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
            raise UserError(f"mlp is '{self.mlp}'{nearest(self.mlp, MLPS)}; use one of {', '.join(MLPS)}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    def claim(self, slot: str, part: Part, method: str) -> Spec:
        """Return a spec in which ``method`` has taken ``slot`` with ``part``.

        ``loss_terms`` takes any number of parts, one of each name; every other slot takes one claim.

        Raises:
            Conflict: another method has the slot, or the same method was applied before.
        """
        assert slot in SLOTS, f"no slot '{slot}'"
        key = f"loss_terms.{part.name}" if slot == "loss_terms" else slot
        owner = dict(self.claims).get(key)
        if owner == method:
            raise Conflict(f"method '{method}' is applied twice; name it once")
        if owner is not None:
            raise Conflict(f"methods '{owner}' and '{method}' both claim the slot '{key}'; remove one of the two")
        value = (*self.loss_terms, part) if slot == "loss_terms" else part
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
            elif f.name == "loss_terms":
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


SLOTS: Final = (
    "norm",
    "branch_in",
    "branch_out",
    "residual",
    "qk",
    "scores",
    "attn_gate",
    "linear",
    "embed_out",
    "logits",
    "loss_terms",
    "init",
)


def _read(key: str, value: Any, kind: Any) -> Any:
    """Return one value of a mapping as the field ``key`` holds it."""
    if key == "claims":
        return tuple((slot, method) for slot, method in value)
    if key == "loss_terms":
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
