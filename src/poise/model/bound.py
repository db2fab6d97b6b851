"""How much a sub-layer can enlarge a gradient at the start: the upper bound of Spike No More, from the ``Spec`` alone.

Takase et al., "Spike No More" (arXiv 2312.16903), for Pre-LN with matrices N(0, σ²), whose norm is about
σ (√d_in + √d_out), and a norm whose Jacobian is 1 / σ_x on a stream of standard deviation σ_x:

    MLP        ‖∂y/∂x'‖ ≤ 1 + σ_1 σ_2 / σ_x' · (√D + √F)²             their Eq. 15, activation taken as the identity
    attention  ‖∂x'/∂x‖ ≤ 1 + σ_O / σ_x · 2 √D · ‖J^Z‖                  their Eq. 20, J^Z that of the joined heads

so a small stream beside large sub-layers multiplies the gradient at every layer. The paper leaves ‖J^Z‖ open and treats
the first layer. The rest of this file is **our interpretation**:

- ‖J^Z‖ is estimated for nearly uniform causal attention over independent tokens, as it is at the start. Values:
  2 √R ‖W_V‖, 2 being the norm of the causal mean of any length (Hardy's inequality). Queries and keys:
  scale · (√K + 1)² / 2 · (s_v s_k ‖W_Q‖ + √R s_v s_q ‖W_K‖), with s the standard deviation of one entry; it is largest
  at the second token, whose two values and two keys differ in one direction. With QK-norm, σ_q and σ_k are what they
  are after the norm.
- SwiGLU has three matrices; its SiLU too is taken as the identity: σ_1 becomes 2 √D σ_gate σ_up.
- The stream grows by the variance of every branch: that of hidden activations is the true activation's, and attention
  adds that of its values over ``keys``, the number of independent tokens it averages over. By default it adds
  nothing, which is right for late tokens of a long text and leaves the bound on the safe side; 1 is the first token.
- What a slot's module does to sizes is found by calling it once: multiply (``embed_scale``, LayerScale, LayerNorm
  Scaling) or normalise. After a norm on a branch's output (Peri-LN, Sandwich, OLMo 2) the branch has a standard
  deviation of c and a Jacobian of c / σ_branch times its own; for attention σ_branch is that of the last of
  ``seq_len`` independent tokens, the smallest. The identity in the numerator and the true activation in σ_branch make
  the MLP's figure some two times too large.
- Post-LN (the residual connection itself is normalised) has no such bound. What is not covered has ``nan`` and a
  reason, and counts as adding nothing to the stream.

Matrices are drawn cut off at three deviations, which makes them 1.3 % smaller than the figures here. Shapes: D width,
F MLP width, H query heads, G key heads, R = H / G, K head width, T positions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn

from poise.core.errors import UserError
from poise.model import layers
from poise.model.init import shares
from poise.model.place import Place
from poise.model.slots import make
from poise.model.spec import Spec
from poise.model.starts import initialise, stds

LIMIT: Final = 3.0
"""What "much smaller" in the paper's conditions is taken to mean: the sub-layer's factor stays below this. With the
paper's fixes it is below 1 from 24 layers on and below 3 from 2 layers on; without them it is 8 and more."""

_LINEARS: Final = ("linear", "sigma_reparam", "wesar", "u_mup")
COVERED: Final = {
    "attn": {
        "scores": ("softmax", "soft_cap"),  # the slope of a cap is at most 1, and 1 where logits are small
        "attn_gate": ("none",),
        "attn_out_gate": ("none",),
        "qkv_gate": ("none",),
        "linear": _LINEARS,
    },
    "mlp": {
        "activation": ("default", "swiglu_clamp"),  # at the start nothing reaches the clamp
        "linear": _LINEARS,
    },
}
"""Parts that the formulas hold for, in the slots that are not tried out."""


@dataclass(frozen=True, slots=True)
class SubLayer:
    """One branch of one block.

    Attributes:
        layer: 1-based number of the block.
        branch: ``attn`` or ``mlp``.
        stream_std: standard deviation σ_x of the residual stream that enters.
        branch_std: that of what the branch adds.
        factor: the bound of the Jacobian's norm minus 1; ``nan`` where it is not covered.
        condition: what the paper's condition compares: σ_1 σ_2 (√D + √F)² / σ_x, and 2 √D σ_O / σ_x for attention;
            ``nan`` where the branch is no Pre-LN branch.
        reason: why there is no factor.
    """

    layer: int
    branch: str
    stream_std: float
    branch_std: float
    factor: float
    condition: float = math.nan
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Bound:
    """The bound of every sub-layer, from the first to the last."""

    sublayers: tuple[SubLayer, ...]

    @property
    def log10_product(self) -> float:
        """log₁₀ of the product over the depth, the bound of ‖∂L/∂x_1‖ / ‖∂L/∂y_N‖; ``nan`` with any factor."""
        return sum(math.log10(1.0 + sub.factor) for sub in self.sublayers)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why sub-layers have no factor, each reason once."""
        return tuple(dict.fromkeys(sub.reason for sub in self.sublayers if sub.reason))


def mlp_factor(d_model: int, d_ff: int, std_in: float, std_out: float, stream_std: float) -> float:
    """The bound of Eq. 15 minus 1.

    >>> [round(mlp_factor(1024, 4096, 0.01976, 0.002853, std), 2) for std in (0.01976, 0.632, 1.0)]
    [26.29, 0.82, 0.52]
    """
    return std_in * std_out / stream_std * (math.sqrt(d_model) + math.sqrt(d_ff)) ** 2


def bound(spec: Spec, *, keys: float = math.inf) -> Bound:
    """Return the bound of every sub-layer of ``spec`` at the start.

    Builds the small modules, and no matrix unless the method in the slot ``linear`` reparameterises it.

    Args:
        spec: the model.
        keys: number of independent tokens that attention averages over; see the head of this file.

    Raises:
        UserError: ``keys`` below 1, or something else than a ``Spec``.
    """
    if not isinstance(spec, Spec):
        raise UserError(f"the bound is that of a Spec, not of a {type(spec).__name__}; give PRESETS['30m'] or your own")
    if not keys >= 1:
        raise UserError(f"keys is {keys}; give the number of tokens attended to, at least 1, or math.inf")
    start = _try_out(_module(spec, "embed_out", Place(spec)), (spec.d_model,))
    std = start.of(stds(spec)["embedding"])
    found: list[SubLayer] = []
    for layer in range(1, spec.n_layers + 1):
        for branch in ("attn", "mlp"):
            sub, std = _sublayer(Place(spec, layer, branch), std, keys)
            found.append(sub)
    return Bound(tuple(found))


def conditions(spec: Spec) -> list[str]:
    """Return a plain sentence for each of the paper's two conditions that does not hold where it was judged.

    The conditions are σ_1 σ_2 ≪ σ_x' and σ_O ≪ σ_x, with the constants of the bound; ≪ is read as ``LIMIT``. Only
    Pre-LN branches of covered parts are judged: an empty list does not mean judged; ``unjudged`` says what was not.

    Raises:
        UserError: something else than a ``Spec``.
    """
    said: list[str] = []
    subs = bound(spec).sublayers
    for branch, what in (("attn", "2 sqrt(D) sigma_O / sigma_x"), ("mlp", "sigma_1 sigma_2 C / sigma_x")):
        judged = [sub for sub in subs if sub.branch == branch and not math.isnan(sub.condition)]
        over = [sub for sub in judged if sub.condition > LIMIT]
        if not over:
            continue
        worst = max(over, key=lambda sub: sub.condition)
        mend = "bring the embedding's standard deviation to about 1 (embed_scale, embed_norm or embed_std)"
        if worst.stream_std > 0.5:
            mend = "start the matrices that write into the stream smaller (scaled_init)"
        said.append(
            f"{branch} of layer {worst.layer}: {what} is {worst.condition:.1f}, above {LIMIT:g}, with a residual "
            f"stream of standard deviation {worst.stream_std:.3g}; so in {len(over)} of {spec.n_layers} layers. "
            f"Gradients of early layers can spike (Spike No More, arXiv 2312.16903); {mend}"
        )
    return said


def unjudged(spec: Spec) -> list[str]:
    """Return a sentence for every reason why branches are not judged by ``conditions``, with their numbers.

    Raises:
        UserError: something else than a ``Spec``.
    """
    kinds: dict[str, Counter[str]] = {}
    for sub in bound(spec).sublayers:
        if math.isnan(sub.condition):
            reason = sub.reason or (
                "the conditions are those of Pre-LN branches: a norm before, none behind (bound(spec) has its factor)"
            )
            kinds.setdefault(reason, Counter())["attention" if sub.branch == "attn" else "MLP"] += 1
    return [
        " and ".join(f"{what} of {n} layer{'s' * (n > 1)}" for what, n in branches.items())
        + f"{' are' if len(branches) > 1 else ' is'} not judged: {reason}"
        for reason, branches in kinds.items()
    ]


# -- what the slots' modules do to sizes ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Size:
    """``times``: y is as large as ``value`` times x; ``norm``: y has standard deviation ``value``; else ``other``."""

    kind: str
    value: float = math.nan

    def of(self, std: float) -> float:
        """The standard deviation of what comes out."""
        return self.value * std if self.kind == "times" else self.value

    def slope(self, std: float) -> float:
        """The largest singular value of the Jacobian."""
        return self.value if self.kind == "times" else self.value / std


def _try_out(call: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> _Size:
    """Classify a function by f(2x) against f(x)."""
    if isinstance(call, layers.Same):
        return _Size("times", 1.0)
    x = torch.randn((1, 2, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        once, twice = call(x), call(2 * x)
    size = float(once.square().mean().sqrt())
    if torch.allclose(twice, 2 * once, rtol=1e-3, atol=1e-6):
        return _Size("times", size / float(x.square().mean().sqrt()))
    return _Size("norm", size) if torch.allclose(twice, once, rtol=1e-3, atol=1e-6) else _Size("other")


def _module(spec: Spec, slot: str, place: Place) -> Any:
    """The slot's module with its starting values."""
    module: nn.Module = make(slot, place)
    initialise(module, spec, 0)
    return module.double()


@cache
def _deviations(spec: Spec) -> dict[str, float]:
    """The standard deviation of each matrix; of a reparameterised one, that of its effective weight in block 1."""
    table = stds(spec)
    if spec.linear.name == "linear":
        return table
    D, F = spec.d_model, spec.d_ff
    rows = (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
    matrices = {"qkv": (D, rows), "attn_out": (D, D), "mlp_in": (D, spec.d_inner), "mlp_out": (F, D)}
    for role, sizes in matrices.items():
        module = make("linear", Place(spec, 1, "attn" if role in ("qkv", "attn_out") else "mlp"), *sizes, role)
        initialise(module, spec, 0)
        with torch.no_grad():
            weight_OD = module.effective_weight()
        parts = shares(spec, role)
        split = weight_OD.split([n if n >= 0 else len(weight_OD) for _, n in parts])
        table |= {name: float(part.square().mean().sqrt()) for (name, _), part in zip(parts, split, strict=True)}
    return table


@cache
def _slots(place: Place) -> dict[str, _Size]:
    """What the modules at one branch do, by slot."""
    spec = place.spec
    sizes = {slot: _try_out(_module(spec, slot, place), (spec.d_model,)) for slot in ("branch_in", "branch_out")}
    add = _module(spec, "residual", place)
    zero = torch.zeros((), dtype=torch.float64)
    sizes["stream"] = _try_out(lambda x: add(x, zero.expand_as(x)), (spec.d_model,))
    sizes["added"] = _try_out(lambda x: add(zero.expand_as(x), x), (spec.d_model,))
    if place.branch == "mlp":
        sizes["mid"] = _try_out(_module(spec, "mlp_mid", place), (spec.d_ff,))
        return sizes
    sizes["mid"] = _try_out(_module(spec, "attn_mid", place), (spec.d_model,))
    qk, values = _module(spec, "qk", place), _module(spec, "values", place)
    few = torch.ones((1, 2, spec.n_kv_heads, spec.head_dim), dtype=torch.float64).transpose(1, 2)

    def queries(x: Tensor) -> Tensor:
        out: Tensor = qk(x.transpose(1, 2), few)[0]
        return out

    def own_values(x: Tensor) -> Tensor:
        out: Tensor = values(x.transpose(1, 2), few)[0]
        return out

    sizes["qk"] = _try_out(queries, (spec.n_heads, spec.head_dim))
    sizes["values"] = _try_out(own_values, (spec.n_kv_heads, spec.head_dim))
    return sizes


# -- the two branches -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Flow:
    """A tensor inside a branch: standard deviation, the smallest over tokens, and the Jacobian's norm so far."""

    std: float
    low: float
    jacobian: float

    def through(self, size: _Size) -> _Flow:
        """Through a slot's module."""
        return _Flow(size.of(self.std), size.of(self.low), size.slope(self.low) * self.jacobian)

    def times(self, std: float, norm: float) -> _Flow:
        """Through a matrix that multiplies deviations by ``std`` and has the norm ``norm``."""
        return _Flow(self.std * std, self.low * std, self.jacobian * norm)


def _sublayer(place: Place, stream: float, keys: float) -> tuple[SubLayer, float]:
    """Return the figures of one branch and the standard deviation of the stream behind it."""
    sizes = _slots(place)
    reason = _uncovered(place, sizes)
    normalised = "norm" in (sizes["stream"].kind, sizes["added"].kind)
    if normalised:
        reason = "Post-LN: the residual connection is normalised, so the bound of Pre-LN does not apply"
    if math.isnan(stream):
        reason = reason or "the size of the residual stream is not known here"
    if reason:
        known = sizes["branch_out"].kind == "norm"
        added = sizes["branch_out"].value if known else math.nan
        after = sizes["stream"].of(stream)
        if not normalised:  # of an unknown branch nothing is counted: the bounds behind it stay on the safe side
            after = math.hypot(after, sizes["added"].value * added if known else 0.0)
        return SubLayer(place.layer, place.branch, stream, added, math.nan, reason=reason), after
    entry = _Flow(stream, stream, 1.0).through(sizes["branch_in"])
    branch, condition = (_attention if place.branch == "attn" else _mlp)(place, entry, keys)
    branch = branch.through(sizes["branch_out"])
    old, new = sizes["stream"].value, sizes["added"].value
    pre_ln = sizes["branch_in"].kind == "norm" and sizes["branch_out"].kind == "times"
    condition = condition * sizes["branch_out"].value * new if pre_ln else math.nan
    sub = SubLayer(
        *(place.layer, place.branch, stream, branch.std * new),
        factor=old + new * branch.jacobian - 1.0,
        condition=condition,
    )
    return sub, math.hypot(old * stream, new * branch.std)


def _uncovered(place: Place, sizes: dict[str, _Size]) -> str:
    """Why the formulas do not hold here; empty where they do."""
    spec = place.spec
    for slot, names in COVERED[place.branch].items():
        part = getattr(spec, slot).name
        if part not in names:
            return f"not covered: slot '{slot}' holds '{part}'"
    for name, size in sizes.items():
        if size.kind == "other":
            return f"not covered: what the slot of '{name}' holds neither multiplies nor normalises"
    return ""


def _mlp(place: Place, x: _Flow, keys: float) -> tuple[_Flow, float]:
    """What leaves the MLP, and what its condition compares."""
    spec, std = place.spec, _deviations(place.spec)
    D, F = spec.d_model, spec.d_ff
    wide = math.sqrt(D) + math.sqrt(F)
    if spec.mlp == "swiglu":
        gate, up = math.sqrt(D) * std["mlp_gate"] * x.std, math.sqrt(D) * std["mlp_up"] * x.std
        hidden = math.sqrt(_second_moment("silu", gate)) * up
        inner = 2 * math.sqrt(D) * x.std * std["mlp_gate"] * std["mlp_up"]
    else:
        hidden = math.sqrt(_second_moment("gelu", math.sqrt(D) * std["mlp_in"] * x.std))
        inner = std["mlp_in"]
    middle = _Flow(hidden, hidden, x.jacobian * inner * wide).through(_slots(place)["mid"])
    out = middle.times(math.sqrt(F) * std["mlp_out"], wide * std["mlp_out"])
    return out, out.jacobian


def _attention(place: Place, x: _Flow, keys: float) -> tuple[_Flow, float]:
    """What leaves attention, and what its condition compares."""
    spec, std, sizes = place.spec, _deviations(place.spec), _slots(place)
    K, root = spec.head_dim, math.sqrt(spec.d_model)
    shared = math.sqrt(spec.n_heads / spec.n_kv_heads)
    kinds = {
        "q": (spec.n_heads, sizes["qk"]),
        "k": (spec.n_kv_heads, sizes["qk"]),
        "v": (spec.n_kv_heads, sizes["values"]),
    }
    entry: dict[str, float] = {}  # standard deviation of one entry
    norm: dict[str, float] = {}  # norm of the Jacobian of all heads
    for name, (heads, size) in kinds.items():
        raw = root * std[name] * x.std
        entry[name] = size.of(raw)
        norm[name] = size.slope(raw) * std[name] * (root + math.sqrt(heads * K))
    scale: float = make("attn_scale", place)
    spread = scale * (math.sqrt(K) + 1) ** 2 / 2 * entry["v"]
    heads_norm = 2 * shared * norm["v"] + spread * (entry["k"] * norm["q"] + shared * entry["q"] * norm["k"])
    mix = _Flow(entry["v"] / math.sqrt(keys), entry["v"] / math.sqrt(spec.seq_len), x.jacobian * heads_norm)
    out = mix.through(sizes["mid"]).times(root * std["attn_out"], 2 * root * std["attn_out"])
    return out, x.jacobian * 2 * root * std["attn_out"]


@cache
def _second_moment(activation: str, std: float) -> float:
    """Mean of activation(u)² for u ~ N(0, std²), by the trapezoid rule."""
    n = 2000
    total = 0.0
    for step in range(-n, n + 1):
        z = 8.0 * step / n
        u = std * z
        gate = 0.5 * math.erfc(-u / math.sqrt(2)) if activation == "gelu" else 1.0 / (1.0 + math.exp(-min(u, 700.0)))
        total += (u * gate) ** 2 * math.exp(-z * z / 2)
    return total * 8.0 / n / math.sqrt(2 * math.pi)
