"""``check_model``: somebody's own module in memory, before its first step: the rules, and how its weights start.

The model is taken to be freshly initialised; of a trained one, deviations of weights mean nothing.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from poise.core.errors import UserError
from poise.preflight.check import Report, check
from poise.preflight.readers import model as reader
from poise.preflight.rules.base import RANK
from poise.preflight.settings import Finding, Settings

UNEVEN: Final = 1.5
"""Factor from the same matrix of the other layers at which one stands out."""

OTHER: Final = 1.5
"""Factor from what the configuration says at which a matrix starts otherwise."""

LEAST_VALUES: Final = 256
"""Values below which a deviation is too uncertain to be compared."""

_NUMBER: Final = re.compile(r"(?<![^.])\d+(?![^.])")
_RESIDUAL: Final = ("o_proj", "down_proj", "c_proj", "out_proj", "attn_out", "mlp_out", "dense_4h_to_h", "fc2", "wo")
"""Last names of modules that write into the residual stream."""

_SOURCE: Final = "measured on the model's weights"


@dataclass(frozen=True, slots=True)
class Weight:
    """One matrix at the start.

    Attributes:
        name: of the parameter.
        place: the name with its layer's number as ``*``.
        layer: that number; -1 outside the layers.
        kind: ``embedding``, ``head``, ``residual`` (writes into the stream) or ``matrix``.
        shape: rows and columns; of more dimensions the last ones are taken together.
        std: root mean square of its values.
        finite: whether all are numbers.
        constant: whether all are the same.
    """

    name: str
    place: str
    layer: int
    kind: str
    shape: tuple[int, int]
    std: float
    finite: bool
    constant: bool


def check_model(
    model: nn.Module,
    *,
    lr: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    warmup_steps: int | None = None,
    total_steps: int | None = None,
    batch_sequences: int | None = None,
    seq_len: int | None = None,
    clip: float | None = None,
) -> Report:
    """Judge a model before its first step: its shape and its start, and whatever else is said here.

    Args:
        model: our ``Decoder``, a Hugging Face model, or any module; the last is known by its weights alone.
        lr: peak learning rate; without it the largest of ``optimizer``.
        optimizer: the one that will train it; its coefficients are read too.
        warmup_steps, total_steps: of the schedule.
        batch_sequences: sequences in a step, over all devices.
        seq_len: tokens in each.
        clip: bound of the gradient's global norm; 0 for none.

    Raises:
        UserError: no module, or a rate, a size or a count that cannot be.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"a {type(model).__name__} is no torch.nn.Module; give the model itself")
    given = {
        "lr": lr,
        "warmup_steps": warmup_steps,
        "total_steps": total_steps,
        "batch_sequences": batch_sequences,
        "seq_len": seq_len,
        "clip": clip,
    }
    for name, value in given.items():
        low = 0.0 if name in ("warmup_steps", "clip") else None
        if value is not None and not (math.isfinite(value) and (value > 0 if low is None else value >= low)):
            raise UserError(f"{name} is {value}; give a finite number {'above 0' if low is None else 'of at least 0'}")
    settings = reader.read(model)
    found = weights(model)
    notes = list(settings.notes)
    if any(p.is_meta for p in model.parameters()):
        notes.append("weights on the meta device have no values: their start is not judged")
    shape = _shape_of(model, found, settings)
    if shape:  # more is known now than the reader said
        notes = ["a plain module: its shape and start are read from its weights, its norms and positions are not known"]
    extra = shape | _start_of(found, settings) | _of_optimizer(optimizer, model)
    extra |= {name: (value, f"{name} = {value}") for name, value in given.items() if value is not None}
    settings = _with(settings, extra, notes)
    report = check(settings)
    findings = sorted((*report.findings, *judged(found, settings)), key=lambda one: RANK[one.severity])
    return replace(report, findings=tuple(findings))


@torch.no_grad()
def weights(model: nn.Module) -> list[Weight]:
    """Return every matrix of a model; those that two names share come once, those without values not at all."""
    tables = {id(m.weight): "embedding" for m in model.modules() if isinstance(m, nn.Embedding)}
    roles = getattr(model, "roles", None)
    ours = roles() if callable(roles) and reader.sniff(model) == 1.0 else {}
    heads = _heads(model, set(tables))
    found = []
    for name, p in model.named_parameters():
        if p.ndim < 2 or p.is_meta or p.numel() == 0:
            continue
        numbers = _NUMBER.findall(name)
        owner = name.rpartition(".")[0].rpartition(".")[2]
        kind = tables.get(id(p)) or ("head" if id(p) in heads else "")
        kind = kind or ("residual" if owner in _RESIDUAL or ours.get(name) in _RESIDUAL else "matrix")
        if ours.get(name) in ("embedding", "head"):
            kind = ours[name]
        values = p.detach().double()
        found.append(
            Weight(
                name,
                _NUMBER.sub("*", name, count=1),
                int(numbers[0]) if numbers else -1,
                kind,
                (p.shape[0], p.numel() // p.shape[0]),
                float(values.square().mean().sqrt()),
                bool(torch.isfinite(values).all()),
                bool((values == values.flatten()[0]).all()) if p.numel() > 1 else False,
            )
        )
    return found


def _heads(model: nn.Module, tables: set[int]) -> set[int]:
    """Return the ids of weights of a linear layer with as many rows as the largest embedding."""
    rows = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    if not rows:
        return set()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == max(rows)]
    return {id(m.weight) for m in linears} - tables


# -- what the weights tell of the settings -----------------------------------------------------------------------

_Extra = dict[str, tuple[Any, str]]


def _shape_of(model: nn.Module, found: Sequence[Weight], settings: Settings) -> _Extra:
    """Return sizes of a plain module that its weights show; nothing where a configuration says them."""
    if settings.d_model is not None:
        return {}
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if not tables:
        return {}
    table = max(tables, key=lambda m: m.num_embeddings)
    layers = {weight.layer for weight in found if weight.layer >= 0}
    out: _Extra = {
        "d_model": (table.embedding_dim, f"embedding of width {table.embedding_dim}"),
        "vocab_size": (table.num_embeddings, f"embedding of {table.num_embeddings} rows"),
    }
    if layers:
        out["n_layers"] = (len(layers), f"{len(layers)} numbered layers")
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    same = [m for m in linears if m.out_features == table.num_embeddings]
    if same:
        tied = any(m.weight is table.weight for m in same)
        out["tied"] = (tied, f"the head {'is' if tied else 'is not'} the embedding")
    return out


def _start_of(found: Sequence[Weight], settings: Settings) -> _Extra:
    """Return how the matrices start, where nothing says it: medians, so that a few odd ones do not count."""
    out: _Extra = {}
    usable = [w for w in found if w.finite and not w.constant and w.shape[0] * w.shape[1] >= LEAST_VALUES]
    plain = [w.std for w in usable if w.kind == "matrix" and w.layer >= 0]
    tables = [w for w in usable if w.kind == "embedding"]
    residual = [w.std for w in usable if w.kind == "residual" and w.layer >= 0]
    if tables and settings.embed_std is None and not settings.methods:
        std = max(tables, key=lambda w: w.shape[0]).std
        out["embed_std"] = (std, f"measured: the embedding starts with a deviation of {std:.3g}")
    if settings.init_std is not None or settings.methods or not plain:
        return out
    std = statistics.median(plain)
    out["init_std"] = (std, f"measured: matrices start with a deviation of {std:.3g}")
    depth = len({w.layer for w in found if w.layer >= 0})
    if residual and depth:
        share = statistics.median(residual) / std
        if abs(share * math.sqrt(2 * depth) - 1) < 0.2:
            out["residual_init"] = ("scaled", f"measured: residual outputs start at {share:.2g} of the others")
        elif abs(share - 1) < 0.2 and depth > 1:
            out["residual_init"] = ("none", "measured: residual outputs start like the others")
    return out


def _of_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> _Extra:
    """Return what an optimizer says of itself."""
    if optimizer is None:
        return {}
    groups = optimizer.param_groups
    main = max(groups, key=lambda group: sum(p.numel() for p in group["params"]))
    name = type(optimizer).__name__
    out: _Extra = {"optimizer": (name.lower(), f"optimizer {name}")}
    lrs = [float(group["lr"]) for group in groups if "lr" in group]
    if lrs:
        out["lr"] = (max(lrs), f"lr = {max(lrs):g} in the optimizer")
    betas = main.get("betas")
    if isinstance(betas, Sequence) and len(betas) >= 2:
        out["beta1"] = (float(betas[0]), f"betas = {tuple(betas)}")
        out["beta2"] = (float(betas[1]), f"betas = {tuple(betas)}")
    for field in ("eps", "weight_decay"):
        if isinstance(main.get(field), int | float):
            out[field] = (float(main[field]), f"{field} = {main[field]:g} in the optimizer")
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = [g for g in groups if g.get("weight_decay") and any(id(p) in tables for p in g["params"])]
    if tables and "weight_decay" in out:
        said = f"the embedding is {'' if decayed else 'not '}among the weights that decay"
        out["decay_embeddings"] = (bool(decayed), said)
    return out


def _with(settings: Settings, extra: _Extra, notes: Sequence[str]) -> Settings:
    values = {name: value for name, (value, _) in extra.items()}
    said = {**settings.said, **{name: text for name, (_, text) in extra.items()}}
    return replace(settings, said=said, notes=tuple(notes), **values)


# -- what is wrong with them ---------------------------------------------------------------------------------------


def judged(found: Sequence[Weight], settings: Settings) -> list[Finding]:
    """Return what is wrong with how matrices start."""
    out = [*_broken(found), *_uneven(found)]
    return out + list(_otherwise(found, settings))


def _broken(found: Sequence[Weight]) -> Iterator[Finding]:
    if bad := [w for w in found if not w.finite]:
        yield Finding(
            "measured-init-nonfinite",
            "critical",
            f"{_named(bad)} {_hold(bad)} values that are no numbers",
            "They spread to the loss in the first step.",
            "initialise them; weights that were allocated and never filled often look like this",
            _SOURCE,
            (),
        )
    dead = [w for w in found if w.finite and w.constant and not (w.std == 0 and w.kind in ("residual", "head"))]
    if dead:
        yield Finding(
            "measured-init-dead",
            "warning",
            f"{_named(dead)} {_hold(dead)} the same value everywhere",
            "Rows that start alike stay alike, and behind a matrix of zeros nothing has a gradient at first; only "
            "matrices that write into the stream, and the head, are started at zero on purpose.",
            "initialise them with random values",
            _SOURCE,
            ("init_std",),
        )


def _uneven(found: Sequence[Weight]) -> Iterator[Finding]:
    places: dict[str, list[Weight]] = {}
    for w in found:
        if w.layer >= 0 and w.finite and not w.constant and w.shape[0] * w.shape[1] >= LEAST_VALUES:
            places.setdefault(w.place, []).append(w)
    odd = []
    for group in places.values():
        if len(group) < 3 or len({w.shape for w in group}) > 1:
            continue
        middle = statistics.median(w.std for w in group)
        stands_out = [w for w in group if not middle / UNEVEN <= w.std <= middle * UNEVEN]
        if len(stands_out) <= len(group) // 4:  # a rule that goes by depth makes many differ
            odd += [(w, middle) for w in stands_out]
    if odd:
        w, middle = odd[0]
        yield Finding(
            "measured-init-uneven",
            "warning",
            f"{w.name} starts with a deviation of {w.std:.3g}, in other layers it is {middle:.3g}{_more(odd)}",
            "A layer that was left out of the initialisation, or initialised twice, starts with other gradients than "
            "the rest.",
            f"start it with {middle:.2g}, as the other layers",
            _SOURCE,
            ("init_std",),
        )


def _otherwise(found: Sequence[Weight], settings: Settings) -> Iterator[Finding]:
    """Compare with what the configuration says; a start measured here says what is measured."""
    std = settings.init_std
    if std is None or settings.methods or settings.say("init_std").startswith("measured"):
        return
    usual = {std}
    if settings.n_layers:
        usual.add(std / math.sqrt(2 * settings.n_layers))
    odd = [
        w
        for w in found
        if w.kind in ("matrix", "residual")
        and w.layer >= 0
        and w.finite
        and not w.constant
        and w.shape[0] * w.shape[1] >= LEAST_VALUES
        and not any(one / OTHER <= w.std <= one * OTHER for one in (usual if w.kind == "residual" else {std}))
    ]
    if odd:
        w = odd[0]
        default = 1 / math.sqrt(3 * w.shape[1])
        hint = f" (torch's default for it is {default:.2g})" if abs(w.std / default - 1) < 0.1 else ""
        yield Finding(
            "measured-init-std",
            "warning",
            f"{w.name} starts with a deviation of {w.std:.3g}{hint}, and {settings.say('init_std')}{_more(odd)}",
            "The configuration speaks of a start that the model does not have.",
            "call the initialisation after the model is built, on every matrix",
            _SOURCE,
            ("init_std",),
        )


def _named(found: Sequence[Weight]) -> str:
    return found[0].name if len(found) == 1 else f"{found[0].name} and {len(found) - 1} more"


def _more(found: Sequence[object]) -> str:
    return f"; and {len(found) - 1} more like it" if len(found) > 1 else ""


def _hold(found: Sequence[Weight]) -> str:
    return "holds" if len(found) == 1 else "hold"
