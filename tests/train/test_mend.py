"""Mending in place: what attention, precision and moments are afterwards, on whole and on sharded weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks import launch
from torch import Tensor
from torch.distributed.tensor import DTensor

from poise.core.errors import UserError
from poise.core.journal import read, timeline
from poise.hardware import distributed
from poise.model.build import apply, build
from poise.model.decoder import Decoder
from poise.model.spec import Spec
from poise.optim.build import OptimConfig
from poise.optim.build import build as build_optimizer
from poise.optim.chain import Chain
from poise.train import mend, rewind
from poise.train.recipe import load
from poise.train.run import resume, train
from poise.train.state import Run

SPEC = Spec(vocab_size=64, seq_len=16, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=64)
TOKENS = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
INPUTS, TARGETS = TOKENS[:, :-1].contiguous(), TOKENS[:, 1:].contiguous()


def model_of(*methods: str, dtype: torch.dtype = torch.float32, spec: Spec = SPEC) -> Decoder:
    return build(apply(spec, *methods), seed=3, compute_dtype=dtype)


def largest_logit(model: Decoder, block: int) -> float:
    """The largest causal attention logit of a block, computed from its queries and keys."""
    heard: dict[str, Tensor] = {}
    taps = model.taps()
    handles = [
        taps[f"block.{block}.{name}"].register_forward_hook(lambda m, a, out, name=name: heard.update({name: out}))
        for name in ("q", "k")
    ]
    with torch.no_grad():
        model(INPUTS, TARGETS)
    for handle in handles:
        handle.remove()
    q_BHTK, k_BGTK = heard["q"].double(), heard["k"].double()
    k_BHTK = k_BGTK.repeat_interleave(q_BHTK.shape[1] // k_BGTK.shape[1], 1)
    scores_BHTT = q_BHTK @ k_BHTK.mT / math.sqrt(q_BHTK.shape[-1])
    visible_TT = torch.ones(scores_BHTT.shape[-2:], dtype=torch.bool).tril()
    return float(scores_BHTT[..., visible_TT].max())


def grow(model: Decoder, block: int, factor: float) -> None:
    with torch.no_grad():
        attention: Any = model.trunk.blocks[block].attn
        attention.qkv.weight[: 6 * 8].mul_(factor)  # 4 query and 2 key heads of width 8


# -- qk_clip ---------------------------------------------------------------------------------------------------


def test_the_largest_logit_becomes_the_threshold() -> None:
    model = model_of()
    grow(model, 1, 30.0)
    seen = largest_logit(model, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert seen > 5.0
    gammas = mend.qk_clip(model, ["block.1"], 2.0, {"attn_logit_max@block.1": seen})
    assert gammas == {"block.1": pytest.approx(2.0 / seen)}
    assert largest_logit(model, 1) == pytest.approx(2.0, rel=1e-5)
    name = "trunk.blocks.1.attn.qkv.weight"
    for other, p in model.named_parameters():
        assert other == name or torch.equal(p, before[other])
    changed = dict(model.named_parameters())[name]
    assert torch.equal(changed[48:], before[name][48:]), "the values are not touched"
    assert torch.allclose(changed[:48], before[name][:48] * math.sqrt(2.0 / seen))


def test_a_logit_below_the_threshold_is_left_alone() -> None:
    model = model_of()
    before = model.trunk.blocks[0].attn.qkv.weight.detach().clone()  # type: ignore[union-attr]
    seen = {"block.0": 1.5, "block.1": -3.0}
    assert mend.qk_clip(model, ["block.0", "block.1"], 2.0, seen) == {"block.0": 1.0, "block.1": 1.0}
    assert torch.equal(model.trunk.blocks[0].attn.qkv.weight, before)  # type: ignore[union-attr, arg-type]


def test_where_queries_and_keys_are_normalised_the_gains_are_scaled() -> None:
    model = model_of("qk_norm")
    attention: Any = model.trunk.blocks[0].attn
    with torch.no_grad():
        attention.qk.q.weight.mul_(9.0)
    seen, matrix = largest_logit(model, 0), attention.qkv.weight.detach().clone()
    mend.qk_clip(model, ["block.0"], 3.0, {"block.0": seen})
    assert largest_logit(model, 0) == pytest.approx(3.0, rel=1e-5)
    assert torch.equal(attention.qkv.weight, matrix)


@pytest.mark.parametrize(
    ("places", "threshold", "seen", "says"),
    [
        (["block.0", "block.7"], 1.0, {"block.0": 5.0}, "no 'block.7'"),
        (["block.0", "head"], 1.0, {"block.0": 5.0}, "no 'head'"),
        (["block.0", "block.1"], 1.0, {"block.0": 5.0}, "block.1 is None"),
        (["block.0"], 1.0, {"block.0": math.inf}, "block.0 is inf"),
        (["block.0"], 0.0, {"block.0": 5.0}, "threshold of qk_clip is 0.0"),
    ],
)
def test_what_cannot_be_clipped_is_one_line_and_changes_nothing(
    places: Sequence[str], threshold: float, seen: dict[str, float], says: str
) -> None:
    model = model_of()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UserError, match=says):
        mend.qk_clip(model, places, threshold, seen)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_queries_of_an_unknown_kind_are_refused() -> None:
    model = model_of()
    model.trunk.blocks[0].attn.qk = torch.nn.Identity()  # type: ignore[union-attr]
    with pytest.raises(UserError, match="Identity on its queries"):
        mend.qk_clip(model, ["block.0"], 1.0, {"block.0": 5.0})


# -- precision -------------------------------------------------------------------------------------------------


def dtypes(model: Decoder) -> dict[str, torch.dtype]:
    """Dtype of what flows at some taps, of the stream after each block, and of the loss's input."""
    found: dict[str, torch.dtype] = {}
    sites = {name: tap for name, tap in model.taps().items() if name.endswith((".q", "mlp_hidden", "final"))}
    sites |= {f"after {n}": block for n, block in enumerate(model.trunk.blocks)}  # type: ignore[arg-type]
    handles = [
        module.register_forward_hook(
            lambda m, a, out, name=name: found.update({name: (out[0] if isinstance(out, tuple) else out).dtype})
        )
        for name, module in sites.items()
    ]
    model(INPUTS, TARGETS).loss.backward()
    for handle in handles:
        handle.remove()
    return found


def test_a_raised_block_computes_in_fp32_and_the_stream_stays_as_it_was() -> None:
    model = model_of("qk_norm", dtype=torch.bfloat16)
    with torch.no_grad():
        plain = model(INPUTS, TARGETS).loss
    assert set(dtypes(model).values()) == {torch.bfloat16}
    mend.raise_precision(model, ["block.1"])
    found = dtypes(model)
    assert {name for name, dtype in found.items() if dtype == torch.float32} == {"block.1.q", "block.1.mlp_hidden"}
    assert found["after 1"] == torch.bfloat16
    with torch.no_grad():
        raised = model(INPUTS, TARGETS).loss
        exact = model_of("qk_norm")(INPUTS, TARGETS).loss
    assert raised != plain and raised == pytest.approx(float(exact), abs=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert list(model.state_dict()) == list(model_of("qk_norm").state_dict()), "no parameter changes its name"


def test_the_head_can_be_raised_and_everything_taken_back() -> None:
    model = model_of(dtype=torch.bfloat16)
    with torch.no_grad():
        plain = model(INPUTS, TARGETS).loss
    mend.raise_precision(model, ["head"])
    mend.raise_precision(model, ["block.0", "head"])
    assert mend.fp32_places(model) == ("block.0", "head")
    assert dtypes(model)["final"] == torch.float32
    mend.set_precision(model, ["block.1"])
    assert mend.fp32_places(model) == ("block.1",)
    mend.set_precision(model, [])
    assert mend.fp32_places(model) == ()
    assert set(dtypes(model).values()) == {torch.bfloat16}
    with torch.no_grad():
        assert model(INPUTS, TARGETS).loss == plain


def test_compiled_code_does_not_miss_the_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(dtype=torch.bfloat16)

    def compile_trunk() -> None:
        model.trunk.compile(backend="eager", fullgraph=True)

    monkeypatch.setattr(model, "compile_trunk", compile_trunk)
    compile_trunk()
    with torch.no_grad():
        plain = model(INPUTS, TARGETS).loss
        mend.raise_precision(model, ["block.0", "block.1"])
        raised = model(INPUTS, TARGETS).loss
        mend.set_precision(model, [])
        assert model(INPUTS, TARGETS).loss == plain
    eager = model_of(dtype=torch.bfloat16)
    mend.raise_precision(eager, ["block.0", "block.1"])
    with torch.no_grad():
        expected = eager(INPUTS, TARGETS).loss
    assert raised != plain and raised == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("place", "dtype", "says"),
    [
        ("block.9", torch.bfloat16, "no 'block.9'"),
        ("final", torch.bfloat16, "'final' is computed in fp32 already"),
        ("block.0", torch.float32, "computes in torch.float32 already"),
    ],
)
def test_what_cannot_be_raised_is_one_line(place: str, dtype: torch.dtype, says: str) -> None:
    model = model_of(dtype=dtype)
    with pytest.raises(UserError, match=says):
        mend.raise_precision(model, [place])
    assert mend.fp32_places(model) == ()


def test_a_raised_precision_survives_a_resume(tiny: dict[str, Any], tmp_path: Path) -> None:
    short = {**tiny["train"], "dtype": "bf16", "steps": 8, "save_every": 4, "eval_every": 0}
    constant = {**tiny["optim"], "schedule": {"kind": "constant", "warmup_steps": 1}}
    values = {**tiny, "train": short, "optim": constant}
    runs: list[Run] = []

    def raised(run: Run) -> None:
        runs.append(run)
        run.host.raise_precision(["block.1"])  # type: ignore[attr-defined]

    train(load("nano", values), tmp_path / "straight", before=raised)
    assert runs[0].position.fp32_places == ["block.1"]
    assert "raise_precision" not in runs[0].host.cannot  # type: ignore[attr-defined]
    train(load("nano", {**values, "train": {**short, "steps": 4}}), tmp_path / "halves", before=raised)
    resume(tmp_path / "halves", {"train": {"steps": 8}})
    halves, straight = (
        [r["loss"] for r in timeline(read(tmp_path / name / "journal.jsonl")) if r["type"] == "step"]
        for name in ("halves", "straight")
    )
    assert len(halves) == 8 and halves == straight
    train(load("nano", values), tmp_path / "plain")
    plain = [r["loss"] for r in timeline(read(tmp_path / "plain" / "journal.jsonl")) if r["type"] == "step"]
    assert plain[4:] != straight[4:], "raising changes the numbers, so the equality says something"


# -- moments ---------------------------------------------------------------------------------------------------


def with_moments(model: Decoder) -> Chain:
    optimizer = build_optimizer(OptimConfig(), model.named_parameters(), model.roles())
    model(INPUTS, TARGETS).loss.backward()
    optimizer.step()
    return optimizer


def test_only_the_named_places_forget_their_moments() -> None:
    model = model_of("embed_norm", "qk_norm")
    optimizer = with_moments(model)
    names = {p: name for name, p in model.named_parameters()}
    mend.reset_moments(optimizer, model, ["block.1", "final"])
    kept = {mend.place_of(names[p]) for p, state in optimizer.state.items() if state["exp_avg"].any()}
    assert kept == {"embed", "block.0", "head"} - ({"head"} if model.head is None else set())
    optimizer.step()
    steps = {mend.place_of(names[p]): float(state["step"]) for p, state in optimizer.state.items()}  # type: ignore[index]
    assert steps["block.1"] == steps["final"] == 1 and steps["block.0"] == steps["embed"] == 2
    mend.reset_moments(optimizer, model)
    assert not any(state["exp_avg"].any() for state in optimizer.state.values())


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_the_embedding(tied: bool) -> None:
    from dataclasses import replace

    model = model_of(spec=replace(SPEC, tied=tied))
    optimizer = with_moments(model)
    mend.reset_moments(optimizer, model, ["head"])
    assert optimizer.state[model.embedding.weight]["exp_avg"].any() != tied
    assert not optimizer.state[model.head_weight]["exp_avg"].any()


def test_an_unknown_place_forgets_nothing() -> None:
    model = model_of()
    optimizer = with_moments(model)
    with pytest.raises(UserError, match=r"no 'block\.4'"):
        mend.reset_moments(optimizer, model, ["block.0", "block.4"])
    assert all(state["exp_avg"].any() for state in optimizer.state.values())


# -- two ranks -------------------------------------------------------------------------------------------------


def go(values: dict[str, Any], folder: Path, at: Callable[[Run], object] = lambda run: None) -> Run:
    """Train; ``at`` is called in step 7, before the guard decides."""
    runs: list[Run] = []

    def before(run: Run) -> None:
        runs.append(run)
        real = run.guard.decide

        def decide(signals: Any, *args: Any, **named: Any) -> Any:
            if signals.step == 7:
                at(run)
            return real(signals, *args, **named)

        run.guard.decide = decide

    assert train(load("nano", values), folder, before=before).reason == "finished"
    return runs[0]


def everything(run: Run) -> list[Tensor]:
    """All weights and moments in full."""
    states = [s for p in run.model.parameters() for s in run.optimizer.state[p].values()]
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in [*run.model.parameters(), *states]]


def one_rank(rank: int, values: dict[str, Any], folder: Path) -> None:
    seen: list[rewind.Replayed] = []
    plain = go(values, folder / "plain")

    def replays(run: Run) -> None:
        seen.append(rewind.replay(run, 4, 6, "same", keep="memory"))
        seen.append(rewind.replay(run, 5, 6, "same", keep="disk"))
        seen.append(run.host.replay(4, 2, "other"))

    replayed = go(values, folder / "replayed", replays)
    assert all(torch.equal(a, b) for a, b in zip(everything(plain), everything(replayed), strict=True))
    assert seen[0] == seen[1] and seen[0].losses[:2] != seen[2].losses, seen
    assert distributed.all_agree(repr(seen))
    if distributed.rank() == 0:
        records = read(folder / "plain" / "journal.jsonl")
        losses = {r["step"]: r["loss"] for r in records if r["type"] == "step"}
        assert list(seen[0].losses) == [losses[n] for n in range(5, 11)], (seen[0].losses, losses)

    model = plain.model
    before = {n: p.full_tensor() for n, p in model.named_parameters()}
    assert mend.qk_clip(model, ["block.1"], 2.0, {"block.1": 8.0}) == {"block.1": 0.25}
    for n, p in model.named_parameters():
        now = p.full_tensor()
        if n == "trunk.blocks.1.attn.qkv.weight":
            assert torch.equal(now[:64], before[n][:64] * 0.5) and torch.equal(now[64:], before[n][64:])
        else:
            assert torch.equal(now, before[n]), n
    model.compute_dtype = torch.bfloat16
    with pytest.raises(UserError, match="sharded"):
        mend.raise_precision(model, ["block.0"])
    mend.reset_moments(plain.optimizer, model, ["block.0"])
    assert sum(bool(s["exp_avg"].full_tensor().any()) for s in plain.optimizer.state.values()) < len(before)
    distributed.leave(0)


@pytest.mark.dist
def test_two_ranks_replay_and_mend_together(tiny: dict[str, Any], tmp_path: Path) -> None:
    short = {**tiny["train"], "steps": 10, "save_every": 2, "keep_last": 9, "eval_every": 0}
    values = {**tiny, "train": short, "model": {**tiny["model"], "methods": ["z_loss"]}}
    launch(one_rank, values, tmp_path)
