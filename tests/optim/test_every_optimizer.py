"""One suite for every optimizer, clipper and wrapper: what each of them promises, whatever it computes.

A method that is not in the tables below fails ``test_every_method_is_here``. Its own file tests what it computes.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import io
import math
import pickle
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR, SequentialLR

import poise.optim as po
from poise.optim import engine
from poise.optim.chain import Chain
from poise.optim.native import library
from poise.optim.native.unsupported import Unsupported
from poise.optim.transform import Link

Make = Callable[[Any, Any], Chain]
"""From parameters and a path to an optimizer. Warm-ups and intervals are short, so that a few steps see them all."""

LR = 0.01
BAD = (math.nan, math.inf, -math.inf)


def gradient_links() -> dict[str, Link]:
    """Every clipper of gradients, by name."""
    return {
        "clip_global_norm": po.ClipGlobalNorm(1.0),
        "zclip": po.ZClip(warmup=3, rearm=3),
        "adagc": po.AdaGC(warmup=3),
        "autoclip": po.AutoClip(percentile=50.0, window=8),
        "agc": po.AGC(),
        "clip_block": po.ClipBlock(1.0),
        "adaclip": po.AdaClip(gamma3=0.9),
        "adagn": po.AdaGN(),
    }


def _around(*links: Link) -> Make:
    return lambda params, path: po.AdamW(params, lr=LR, links=links, path=path)


def _chain(*links: Link) -> Make:
    return lambda params, path: Chain(params, *links, lr=LR, path=path)


EVERY: dict[str, Make] = {
    "AdamW": lambda params, path: po.AdamW(params, lr=LR, path=path),
    "AdamW coupled": lambda params, path: po.AdamW(params, lr=LR, decay="coupled", path=path),
    "AdamW independent": lambda params, path: po.AdamW(params, lr=LR, decay="independent", path=path),
    "StableAdamW": lambda params, path: po.StableAdamW(params, lr=LR, path=path),
    "SPAM": lambda params, path: po.SPAM(params, lr=LR, threshold=50.0, reset_every=7, warmup=3, grace=2, path=path),
    "SPAM without resets": lambda params, path: po.SPAM(
        params, lr=LR, threshold=50.0, reset_every=0, grace=2, path=path
    ),
    "StableSPAM": lambda params, path: po.StableSPAM(params, lr=LR, reset_every=7, total_steps=20, path=path),
    "Lion": lambda params, path: po.Lion(params, lr=LR, path=path),
    "AdEMAMix": lambda params, path: po.AdEMAMix(params, lr=LR, alpha_warmup=6, beta3_warmup=6, path=path),
    "ADOPT": lambda params, path: po.ADOPT(params, lr=LR, path=path),
    "ScheduleFreeAdamW": lambda params, path: po.ScheduleFreeAdamW(params, lr=LR, path=path),
    "Frankenstein": lambda params, path: po.Frankenstein(params, lr=LR, path=path),
    "Adafactor": lambda params, path: po.Adafactor(params, lr=LR, path=path),
    "CAME": lambda params, path: po.CAME(params, lr=LR, path=path),
    "SophiaG": lambda params, path: po.SophiaG(params, lr=LR, path=path),
    "Muon": lambda params, path: po.Muon(params, lr=LR, path=path),
    "NorMuon": lambda params, path: po.NorMuon(params, lr=LR, path=path),
    **{name: _around(link) for name, link in gradient_links().items()},
    "clip_update_rms": _around(po.ClipUpdateRms(0.5)),
    "clip_update_norm": _around(po.ClipUpdateNorm(window=4, sigmas=1.0)),
    "clippy": _around(po.Clippy(rel_bound=0.001, abs_bound=0.001)),
    "cautious": _chain(po.Cautious(po.AdamWRule())),
    "moment_reset": _chain(po.MomentReset(po.AdamWRule(), every=7, warmup=3)),
    "low_precision": _chain(po.LowPrecisionStates(po.AdamWRule())),
    "stochastic_rounding": _around(po.StochasticRounding()),
    "kahan": _around(po.Kahan()),
    "Muon clipped": lambda params, path: po.Muon(
        params, lr=LR, links=(po.AdaGC(warmup=3), po.ZClip(warmup=3, rearm=3)), path=path
    ),
    "many": _chain(
        po.ClipGlobalNorm(2.0),
        po.ZClip(warmup=3, rearm=3),
        po.AdaGC(warmup=3),
        po.AdaClip(gamma3=0.9),
        po.MomentReset(po.StableAdamWRule(), every=7, warmup=3),
        po.Clippy(),
        po.ClipUpdateRms(0.5),
        po.ClipUpdateNorm(window=4),
    ),
}
"""All that is an optimizer or a link, each in an optimizer; ``many`` has several links after each other, and in
``Muon clipped`` two groups with links of their own share the clippers."""

ONLY_PLAIN = frozenset(
    {"Adafactor", "CAME", "Muon", "Muon clipped", "NorMuon", "agc", "low_precision", "stochastic_rounding", "kahan"}
)
"""Those that look at more than one element, and so have no native or compiled path."""

FUSES = frozenset({"AdamW", "clip_global_norm"})
"""Those that torch's fused kernel computes where the C loop does not fit."""

SLEEPERS = ("embed.weight", "hidden.weight", "bias")
"""Tensors without a gradient at first; of the first only two rows."""

SIGNS = frozenset({"Lion", "SophiaG"})
"""Steps of one size: after an even number of them an element may be where it was."""

KEEPS_LESS = frozenset({"low_precision", "kahan"})
"""Those that keep a state of 16 bits on purpose."""

MAKERS = pytest.mark.parametrize("name", list(EVERY))


def has_compiler() -> bool:
    """Return whether the native path can be taken here."""
    try:
        library.load('extern "C" int poise_test() { return 1; }')
    except Unsupported:
        return False
    return True


HAS_COMPILER = has_compiler()

needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")


def parameters(dtype: torch.dtype = torch.float32, odd: bool = True) -> dict[str, nn.Parameter]:
    """Return a small model's worth of shapes; ``odd`` adds a transposed matrix and ones without elements."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (6, 4), "hidden.weight": (5, 7), "bias": (7,), "scale": ()}
    if odd:
        shapes |= {"one": (1,), "none": (0,), "turned.weight": (6, 3), "empty.weight": (0, 3)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if odd:
        made["turned.weight"] = made["turned.weight"].t()
    # 16-bit numbers, so that the same weights can be had in every precision
    return {name: nn.Parameter(value.bfloat16().to(dtype)) for name, value in made.items()}


def set_gradients(params: Mapping[str, Tensor], step: int, spikes: bool = True) -> None:
    """Give every parameter its gradient of step number ``step``: one large step in 5, one large element in 7."""
    for number, p in enumerate(params.values()):
        p.grad = torch.empty_like(p).copy_(_gradient(p.shape, step, number, spikes))


@functools.cache
def _gradient(shape: torch.Size, step: int, number: int, spikes: bool) -> Tensor:
    """Return 16-bit numbers, which nobody may change: each is drawn once for all tests."""
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + number)).bfloat16()
    if spikes and step % 5 == 3:
        grad = grad * 100
    if spikes and step % 7 == 5 and grad.numel():
        grad.view(-1)[step % grad.numel()] *= 1000
    return grad


def poison(p: Tensor, element: int, value: float) -> None:
    """Put a value into one element of a gradient."""
    assert p.grad is not None
    grad = p.grad.reshape(-1).clone()
    grad[element % grad.numel()] = value
    p.grad.copy_(grad.view(p.shape))


def train(params: Mapping[str, Tensor], optimizer: Chain, steps: Iterable[int], spikes: bool = True) -> None:
    """Take some steps; Sophia also sees a curvature now and then."""
    for step in steps:
        set_gradients(params, step, spikes)
        optimizer.step()
        if isinstance(optimizer, po.SophiaG) and step % 4 == 1:
            po.observe_hessian(optimizer, 4)
        optimizer.zero_grad()


def everything(params: Mapping[str, Tensor], optimizer: Chain) -> dict[str, Any]:
    """Return copies of all weights, states and settings, flat."""
    found: dict[str, Any] = {f"weights of {name}": p.detach().clone() for name, p in params.items()}
    _flatten("", copy.deepcopy(optimizer.state_dict()), found)
    return found


def _flatten(where: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            _flatten(f"{where}/{key}", part, into)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            _flatten(f"{where}/{number}", part, into)
    else:
        into[where] = value


def assert_same_bits(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Fail with the name of the first thing that differs in a bit."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        other = found[name]
        if isinstance(value, Tensor):
            assert (other.dtype, other.shape) == (value.dtype, value.shape), name
            bits = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (other, value)]
            assert torch.equal(*bits), f"{name}: {other} instead of {value}"
        else:
            assert other == value, name


def distance(params: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Return the largest difference of two sets of weights, relative to the largest each tensor has had or gone."""
    worst, begin = 0.0, parameters(torch.float64)
    for name, p in params.items():
        if p.numel():
            one, other, start = p.detach().double(), others[name].detach().double(), begin[name].detach()
            size = max(float(x.abs().max()) for x in (other, start, other - start))
            worst = max(worst, float((one - other).abs().max()) / size)
    return worst


def assert_path(optimizer: Chain, wanted: str, name: str) -> None:
    """Fail if the last step was not computed the way that is being tested."""
    used = set(optimizer.paths.values())
    if wanted == "native" and (name in ONLY_PLAIN or not HAS_COMPILER):
        return
    assert used == {wanted}, used


def test_every_method_is_here() -> None:
    """A new optimizer or link has to be put into the tables."""
    known = set(EVERY) | {link.name for make in EVERY.values() for link in _links(make)}
    for module in po.METHODS:
        name = importlib.import_module(module).CARD.name
        assert name in known | {"qk_clip", "unit_rows"}, f"put {name} into the tables of this suite"
    optimizers = {name for name in po.__all__ if isinstance(getattr(po, name), type)}
    optimizers = {name for name in optimizers if issubclass(getattr(po, name), Chain)} - {"Chain"}
    assert optimizers <= set(EVERY)


def _links(make: Make) -> list[Link]:
    chain = make(parameters(odd=False).items(), "plain")
    found = [*chain.links, *(link for group in chain.param_groups for link in group["links"] or ())]
    return found + [link.inner for link in found if hasattr(link, "inner")]


def without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step on the CPU be thrown away as one on a GPU is: links see what is not finite, results are discarded."""
    source = textwrap.dedent(inspect.getsource(engine.Engine.step))
    assert source.count('== "cpu"') == 1
    names: dict[str, Any] = {}
    exec("from __future__ import annotations\n" + source.replace('== "cpu"', '== "none"'), vars(engine), names)
    monkeypatch.setattr(engine.Engine, "step", names["step"])


@MAKERS
@pytest.mark.parametrize("way", ["auto", "plain", "plain, as on a GPU"])
def test_a_nonfinite_gradient_changes_no_bit(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element of one tensor, at the first step and later; what comes after is as if it had not been."""
    if "GPU" in way:
        without_asking(monkeypatch)
    path: Any = "auto" if way == "auto" else "plain"
    odd = way == "plain" or (way == "auto" and name in FUSES)  # the C loop takes contiguous tensors only
    params, clean = parameters(odd=odd), parameters(odd=odd)
    optimizer, twin = EVERY[name](params.items(), path), EVERY[name](clean.items(), path)
    targets = [target for target, p in params.items() if p.numel()]
    refused = 0
    for step in range(1, 7):
        if step in (1, 4, 6):
            before = everything(params, optimizer)
            for _ in BAD:
                set_gradients(params, step)
                poison(params[targets[refused % len(targets)]], refused, BAD[refused % len(BAD)])
                optimizer.step()
                refused += 1
                assert bool(optimizer.skipped)
            if step > 1:  # in the first step states are made
                assert_same_bits(everything(params, optimizer), before)
        train(params, optimizer, [step])
        assert not bool(optimizer.skipped)
        if not odd or step == 1:
            train(clean, twin, [step])
            assert_same_bits(everything(params, optimizer), everything(clean, twin))
    assert all(bool(torch.isfinite(p).all()) for p in params.values())
    assert_path(optimizer, "plain" if path == "plain" or odd else "native", name)


@MAKERS
@pytest.mark.parametrize("named", [True, False])
def test_twelve_steps_and_twelve_are_twenty_four(name: str, named: bool) -> None:
    """Through a file; with names also through a copy and a pickle."""

    def make(params: Mapping[str, Tensor]) -> Chain:
        return EVERY[name](params.items() if named else params.values(), "auto")

    params = parameters(odd=False)
    optimizer = make(params)
    train(params, optimizer, range(1, 13))
    file = io.BytesIO()
    torch.save({"weights": dict(params), "optimizer": optimizer.state_dict()}, file)
    twins = []
    if named:
        twins = [copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
    train(params, optimizer, range(13, 25))

    fresh = parameters(odd=False)
    loaded = make(fresh)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    with torch.no_grad():
        for key, p in fresh.items():
            p.copy_(saved["weights"][key])
    loaded.load_state_dict(saved["optimizer"])
    wanted = everything(params, optimizer)
    for others, other in [*twins, (fresh, loaded)]:
        train(others, other, range(13, 25))
        assert_same_bits(everything(others, other), wanted)


@MAKERS
def test_what_had_no_gradient_at_first_learns_later(name: str) -> None:
    """Rows and whole tensors whose gradient is zero through every warm-up then move as others do."""
    asleep, awake = parameters(odd=False), parameters(odd=False)
    optimizer, twin = EVERY[name](asleep.items(), "auto"), EVERY[name](awake.items(), "auto")
    for chain in (optimizer, twin):
        for group in chain.param_groups:
            group["weight_decay"] = 0.0
    for step in range(1, 13):
        for params, chain in ((asleep, optimizer), (awake, twin)):
            set_gradients(params, step, spikes=False)
            if params is asleep:
                for key in SLEEPERS:
                    grad = params[key].grad
                    assert grad is not None
                    grad[:2] = 0.0
                    if key != "embed.weight":
                        grad.zero_()
            chain.step()
    before = [{key: params[key].detach().clone() for key in SLEEPERS} for params in (asleep, awake)]
    for step in range(13, 25):
        for params, chain in ((asleep, optimizer), (awake, twin)):
            set_gradients(params, step, spikes=False)
            chain.step()
    for key in SLEEPERS:
        moves = [(params[key].detach() - old[key]).abs() for params, old in zip((asleep, awake), before, strict=True)]
        dead, alive = (move[:2] for move in moves) if key == "embed.weight" else moves
        assert bool((dead > 0.0).all()) or name in SIGNS, (key, dead)
        assert float(dead.mean()) >= 0.1 * float(alive.mean()), (key, float(dead.mean()), float(alive.mean()))


@MAKERS
@pytest.mark.parametrize("path", ["auto", "plain"])
def test_the_norm_is_the_raw_one_and_gradients_stay(name: str, path: Any) -> None:
    """``measure`` knows nothing of the links, before a step and after it; no link writes to ``p.grad``."""
    params = parameters(odd=path == "plain")
    optimizer = EVERY[name](params.items(), path)
    for step in range(1, 6):
        set_gradients(params, step)
        raw = {key: p.grad.clone() for key, p in params.items() if p.grad is not None}
        wanted = math.sqrt(sum(float(grad.double().square().sum()) for grad in raw.values()))
        assert float(optimizer.measure()) == pytest.approx(wanted, rel=1e-6)
        optimizer.step(max_norm=0.5 if step == 4 else None)
        assert float(optimizer.measure()) == pytest.approx(wanted, rel=1e-6)
        for key, p in params.items():
            assert p.grad is not None
            assert torch.equal(p.grad, raw[key]), key


@needs_compiler
@pytest.mark.parametrize("name", [name for name in EVERY if name not in ONLY_PLAIN])
def test_native_equals_plain(name: str) -> None:
    """Over 32 steps with spikes; weights and states."""
    plain, fast = parameters(odd=False), parameters(odd=False)
    slow, quick = EVERY[name](plain.items(), "plain"), EVERY[name](fast.items(), "native")
    train(plain, slow, range(1, 33))
    train(fast, quick, range(1, 33))
    assert_path(quick, "native", name)
    assert distance(fast, plain) <= 1e-6
    states, others = everything(fast, quick), everything(plain, slow)
    for key, value in others.items():
        if isinstance(value, Tensor):
            limit = 1e-5 * float(value.abs().max())
            if key.endswith("zclip_var"):  # behind AGC norms hardly vary, and their variance is rounding
                limit = max(limit, 1e-12)
            assert float((states[key] - value).abs().max()) <= limit, key


@MAKERS
def test_every_precision(name: str) -> None:
    """Moments of 16-bit weights are fp32, of fp64 ones fp64; the first step is that of fp32, rounded."""
    runs = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        params = parameters(dtype)
        optimizer = EVERY[name](params.items(), "plain")
        train(params, optimizer, [1])
        runs[dtype] = {key: p.detach().clone() for key, p in params.items()}
        train(params, optimizer, range(2, 7))
        start = parameters(dtype)
        moved = {key for key, p in params.items() if not torch.equal(p, start[key])}
        # a small step of bf16 weights is lost to rounding
        assert moved == {key for key, p in params.items() if p.numel()} or (moved and dtype == torch.bfloat16)
        for p in params.values():
            assert bool(torch.isfinite(p).all()) and p.dtype == dtype
            for state, value in optimizer.state[p].items():
                if value.shape == p.shape and p.dim() and name not in KEEPS_LESS:
                    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), state
    noise = (
        1e-2 if name in ("Muon", "Muon clipped", "NorMuon", "low_precision") else 1e-5
    )  # these compute or keep in bf16
    assert distance(runs[torch.float32], runs[torch.float64]) <= noise
    if name != "stochastic_rounding":
        assert_same_bits(runs[torch.bfloat16], {key: p.bfloat16() for key, p in runs[torch.float32].items()})


def test_precisions_side_by_side() -> None:
    """The norm counts all of them, and every one moves."""
    params = {**parameters(torch.bfloat16), "wide": parameters(torch.float64)["bias"], "usual": parameters()["bias"]}
    for name, make in EVERY.items():
        optimizer = make(params.items(), "auto")
        before = {key: p.detach().clone() for key, p in params.items()}
        train(params, optimizer, range(1, 4))
        for key, p in params.items():
            moved = not torch.equal(p, before[key])
            assert bool(torch.isfinite(p).all()) and (moved or not p.numel() or p.dtype == torch.bfloat16), (name, key)


@MAKERS
def test_it_is_an_ordinary_torch_optimizer(name: str) -> None:
    """A schedule, a gradient scaler, hooks and a closure change nothing but what they are for."""
    calls: list[str] = []
    scaled, usual = parameters(odd=False), parameters(odd=False)
    optimizer, twin = EVERY[name](scaled.items(), "auto"), EVERY[name](usual.items(), "auto")
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    schedules = [LambdaLR(chain, lambda epoch: 1.0 / (1 + epoch)) for chain in (optimizer, twin)]
    for step in range(1, 9):
        set_gradients(scaled, step)
        whole = [torch.sum(p * p.grad) for p in scaled.values() if p.grad is not None]
        optimizer.zero_grad()
        loss = torch.stack(whole).sum()
        scaler.scale(loss * (math.inf if step == 5 else 1.0)).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        if step == 5:  # refused by the scaler, which halves its scale
            assert scaler.get_scale() == 512.0
            continue
        set_gradients(usual, step)
        grads = {key: p.grad for key, p in usual.items()}
        twin.zero_grad()

        def closure(grads: dict[str, Tensor | None] = grads) -> float:
            assert torch.is_grad_enabled()
            for key, p in usual.items():
                p.grad = grads[key]
            return 2.5

        assert twin.step(closure) == 2.5
        for schedule in schedules:
            schedule.step()
        rates = [group["lr"] for group in twin.param_groups]
        assert rates == [group["lr"] for group in optimizer.param_groups] and rates[0] < LR
    assert calls == ["before", "after"] * 7
    assert_same_bits(everything(scaled, optimizer), everything(usual, twin))


def test_torchs_schedules_set_the_rate() -> None:
    """Also one that writes keys of its own into the groups, which a saved state then holds."""

    def one_cycle(chain: Chain) -> LRScheduler:
        return OneCycleLR(chain, max_lr=0.1, total_steps=8, cycle_momentum=False)

    def joined(chain: Chain) -> LRScheduler:
        return SequentialLR(chain, [LambdaLR(chain, lambda n: n / 3), CosineAnnealingLR(chain, 5)], milestones=[3])

    for name in ("AdamW", "Muon", "SPAM"):
        for make in (one_cycle, joined):
            params = parameters(odd=False)
            optimizer, reference = EVERY[name](params.items(), "auto"), torch.optim.SGD(params.values(), lr=LR)
            schedule, wanted = make(optimizer), make(reference)  # type: ignore[arg-type]
            for step in range(1, 7):
                assert {group["lr"] for group in optimizer.param_groups} == {reference.param_groups[0]["lr"]}
                train(params, optimizer, [step])
                reference.step()
                schedule.step()
                wanted.step()
            fresh = parameters(odd=False)
            loaded = EVERY[name](fresh.items(), "auto")
            loaded.load_state_dict(optimizer.state_dict())
            assert loaded.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
            assert loaded.param_groups[0]["peak_lr"] == LR


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens_T: Tensor) -> Tensor:
        """Return logits, (T, 6)."""
        logits: Tensor = self.head(self.hidden(self.embed(tokens_T)))
        return logits


def test_a_tied_parameter_counts_once() -> None:
    """In the norm and in the clip, in an optimizer, in front of another one and around another one."""
    makers: tuple[Callable[[Tied], Any], ...] = (
        lambda net: po.AdamW(net.named_parameters(), links=(po.ClipGlobalNorm(0.1),)),
        lambda net: po.Muon(net),
        lambda net: po.GradChain(net.parameters(), po.ClipGlobalNorm(0.1)),
        lambda net: po.Adapted(net.parameters(), lambda groups: torch.optim.SGD(groups), po.ZClip(), lr=LR),
    )
    for make in makers:
        net = Tied()
        optimizer = make(net)
        net(torch.arange(6)).square().sum().backward()
        grads = [net.embed.weight.grad, net.hidden.weight.grad, net.hidden.bias.grad]
        wanted = torch.cat([grad.flatten() for grad in grads if grad is not None]).norm()
        torch.testing.assert_close(optimizer.measure(), wanted, rtol=1e-6, atol=0.0)
        before = net.embed.weight.detach().clone()
        optimizer.step()
        assert net.head.weight is net.embed.weight
        if isinstance(optimizer, po.GradChain):
            torch.testing.assert_close(optimizer.measure(), torch.tensor(0.1), rtol=1e-4, atol=0.0)
        else:
            assert not torch.equal(net.embed.weight, before)


@pytest.mark.parametrize("path", ["auto", "plain"])
def test_clippers_alone(path: Any) -> None:
    """In front of anyone's optimizer: a non-finite gradient is left as it is, and 12 steps and 12 are 24."""
    for name, link in gradient_links().items():
        params = parameters(odd=path == "plain")
        shaper = po.GradChain(params.items(), link, path=path)
        acted = False

        def shape(which: po.GradChain, step: int, params: dict[str, nn.Parameter] = params) -> dict[str, Any]:
            set_gradients(params, step)
            which.step()
            found: dict[str, Any] = {key: p.grad for key, p in params.items()}
            _flatten("", copy.deepcopy(which.state_dict()), found)
            return found

        for step in range(1, 13):
            shaped = shape(shaper, step)
            set_gradients(params, step)
            acted |= any(not torch.equal(shaped[key], p.grad) for key, p in params.items() if p.grad is not None)
            if step % 4 == 1:
                state = copy.deepcopy(shaper.state_dict()["state"])
                poison(params["bias"], step, BAD[step // 4])
                grads = {key: p.grad.clone() for key, p in params.items() if p.grad is not None}
                shaper.step()
                assert bool(shaper.skipped)
                assert_same_bits({key: p.grad for key, p in params.items()}, grads)
                flat: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
                _flatten("", state, flat[0])
                _flatten("", shaper.state_dict()["state"], flat[1])
                assert_same_bits(flat[1], flat[0])
        assert acted, name
        loaded = po.GradChain(params.items(), link, path=path)
        loaded.load_state_dict(copy.deepcopy(shaper.state_dict()))
        for step in range(13, 25):
            assert_same_bits(shape(loaded, step), shape(shaper, step))


def test_links_around_another_optimizer() -> None:
    """Every link of ours around torch's Adam: a non-finite gradient changes nothing, and 12 steps and 12 are 24."""
    behind: dict[str, Link] = {
        "clip_update_rms": po.ClipUpdateRms(0.5),
        "clip_update_norm": po.ClipUpdateNorm(window=4, sigmas=1.0),
        "clippy": po.Clippy(rel_bound=0.001, abs_bound=0.001),
        "stochastic_rounding": po.StochasticRounding(),
    }
    for link in {**gradient_links(), **behind}.values():

        def make(params: Mapping[str, Tensor], link: Link = link) -> Any:
            return po.Adapted(params.items(), lambda groups: torch.optim.Adam(groups), link, lr=LR)

        params, fresh = parameters(odd=False), parameters(odd=False)
        optimizer, loaded = make(params), make(fresh)
        for step in range(1, 13):
            train(params, optimizer, [step])
            if step % 4 == 1:
                before = everything(params, optimizer)
                set_gradients(params, step)
                poison(params["scale"], 0, BAD[step // 4])
                optimizer.step()
                assert_same_bits(everything(params, optimizer), before)
        with torch.no_grad():
            for key, p in fresh.items():
                p.copy_(params[key])
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(params, optimizer, range(13, 25))
        train(fresh, loaded, range(13, 25))
        assert_same_bits(everything(fresh, loaded), everything(params, optimizer))


@pytest.mark.parametrize("layout", ["gaps", "other gradient"])
@pytest.mark.parametrize(
    "name",
    ["AdamW", "clip_global_norm", "SPAM", "Muon"],
)
def test_the_layout_in_memory_changes_nothing(name: str, layout: str) -> None:
    """A weight that is every second column of a matrix, or a gradient that lies in memory otherwise than its weight."""
    found = []
    for path in ("plain", "auto"):
        torch.manual_seed(0)
        whole = torch.randn(6, 8)
        p = nn.Parameter(whole[:, ::2] if layout == "gaps" else whole.t())
        beside = whole[:, 1::2].clone()
        optimizer = EVERY[name]([p], path)
        for _ in range(3):
            p.grad = torch.randn(p.shape)
            optimizer.step()
        assert layout != "gaps" or torch.equal(whole[:, 1::2], beside), "wrote to memory that is not the weight's"
        found.append(p.detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)
