"""AutoClip, AGC and ClipBlock: each against a transcription of its paper's rule, and what each is for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from poise.core.errors import UserError
from poise.optim.chain import Chain
from poise.optim.grad_chain import GradChain
from poise.optim.rules.adamw import AdamWRule
from poise.optim.shape.agc import AGC
from poise.optim.shape.autoclip import AutoClip
from poise.optim.shape.clip_block import ClipBlock

SHAPES = [(4, 3), (5,), (2, 3, 2), ()]
LINKS = [AutoClip(window=16), AGC(), ClipBlock(0.5), ClipBlock(0.2, rms=True)]
Stream = list[list[np.ndarray]]


def weights() -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [np.asarray(generator.standard_normal(shape)) for shape in SHAPES]


def stream(steps: int, seed: int = 0) -> Stream:
    """Gradients with spikes, and with a row, a tensor and a whole step of zeros at first."""
    generator = np.random.default_rng(seed)
    out = []
    for step in range(steps):
        level = 30.0 if step in (6, 7, 21) else 0.2 * math.exp(0.3 * generator.standard_normal())
        out.append([np.asarray(generator.standard_normal(shape)) * level for shape in SHAPES])
        if step < 5:
            out[-1][0][1] = 0.0
            out[-1][1] = np.zeros(5)
    out[0] = [np.zeros(shape) for shape in SHAPES]
    return out


def shape(grads: Stream, link: Any, dtype: torch.dtype = torch.float64) -> Stream:
    params = [nn.Parameter(torch.tensor(w, dtype=dtype)) for w in weights()]
    shaper = GradChain(params, link, path="plain")
    out = []
    for step in grads:
        for p, grad in zip(params, step, strict=True):
            p.grad = torch.tensor(grad, dtype=dtype)
        shaper.step()
        out.append([p.grad.numpy().copy() for p in params])
    return out


def assert_same(got: Stream, expected: Stream, rtol: float) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=rtol)


def numpy_autoclip(grads: Stream, link: AutoClip) -> Stream:
    history, out = [], []
    for step in grads:
        norm = math.sqrt(sum((g**2).sum() for g in step))
        history.append(norm)
        bound = np.percentile(history[-link.window :], link.percentile)
        out.append([g * min(1.0, bound / (norm + 1e-6)) for g in step])
    return out


def numpy_agc(grads: Stream, link: AGC) -> Stream:
    def clipped(g: np.ndarray, w: np.ndarray) -> np.ndarray:
        bound = link.clip_factor * max(math.sqrt((w**2).sum()), link.eps)
        norm = math.sqrt((g**2).sum())
        return g * bound / norm if norm > bound else g

    def by_unit(g: np.ndarray, w: np.ndarray) -> np.ndarray:
        if g.ndim < 2:
            return clipped(g, w)
        return np.stack([clipped(row, of) for row, of in zip(g, w, strict=True)])

    return [[by_unit(g, w) for g, w in zip(step, weights(), strict=True)] for step in grads]


def numpy_clip_block(grads: Stream, link: ClipBlock) -> Stream:
    def clipped(g: np.ndarray) -> np.ndarray:
        size = math.sqrt((g**2).mean() if link.rms else (g**2).sum())
        return g * min(1.0, link.max_norm / (size + 1e-6))

    return [[clipped(g) for g in step] for step in grads]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("link", [AutoClip(), AutoClip(70.0, window=9), AutoClip(0.0, window=1000), AutoClip(33.0, 1)])
def test_autoclip_parity(link: AutoClip, dtype: torch.dtype, rtol: float) -> None:
    """The 1e-6 beside the norm acts in the transcription also where the bound is the norm itself; it is not a clip."""
    grads = stream(40)
    assert_same(shape(grads, link, dtype), numpy_autoclip(grads, link), max(rtol, 1e-5 if link.window == 1 else 0.0))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("link", [AGC(), AGC(0.2, eps=2.0)])
def test_agc_parity(link: AGC, dtype: torch.dtype, rtol: float) -> None:
    grads = stream(30)
    assert_same(shape(grads, link, dtype), numpy_agc(grads, link), rtol)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("link", [ClipBlock(0.5), ClipBlock(0.2, rms=True)])
def test_clip_block_parity(link: ClipBlock, dtype: torch.dtype, rtol: float) -> None:
    grads = stream(30)
    assert_same(shape(grads, link, dtype), numpy_clip_block(grads, link), rtol)


def test_autoclip_forgets_what_is_out_of_its_window() -> None:
    """After as many steps as the window, a level far below the first one is the norm, and its own low end the bound."""
    link = AutoClip(50.0, window=20)
    shared = link.init_shared()
    norms = [100.0] * 30 + [1.0, 1.2] * 15
    scales = [float(link.begin(shared, {"norm": torch.tensor(norm)})["autoclip_scale"]) for norm in norms]
    assert min(scales[:49]) == 1.0 and scales[-1] == pytest.approx(1.1 / 1.2, rel=1e-5) and scales[-2] == 1.0


def test_autoclip_at_ten_percent_clips_nine_steps_of_ten() -> None:
    link = AutoClip()
    shared = link.init_shared()
    norms = np.exp(0.3 * np.random.default_rng(0).standard_normal(400))
    scales = [float(link.begin(shared, {"norm": torch.tensor(norm)})["autoclip_scale"]) for norm in norms]
    assert 0.85 < np.mean(np.array(scales) < 1.0) < 0.95


def test_autoclip_keeps_its_state_finite() -> None:
    """A checkpoint with a NaN in it is refused; the places of the ring that hold nothing are zeros."""
    link = AutoClip()
    shared = link.init_shared()
    link.begin(shared, {"norm": torch.tensor(3.0)})
    assert bool(shared["autoclip_norms"].isfinite().all()) and int(shared["autoclip_seen"]) == 1


def train(grads: Stream, *links: Any) -> list[torch.Tensor]:
    params = [nn.Parameter(torch.tensor(w)) for w in weights()]
    optimizer = Chain(params, *links, AdamWRule(), lr=0.01, path="plain")
    for step in grads:
        for p, grad in zip(params, step, strict=True):
            p.grad = torch.tensor(grad)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
def test_acts(link: Any) -> None:
    """It changes the weights, and the largest gradients come out smaller than they went in, by tens."""
    on, absent = train(stream(30), link), train(stream(30))
    assert all(float((one - other).abs().max()) > 1e-4 for one, other in zip(on, absent, strict=True))
    shaped = shape(stream(30), link)
    assert max(np.abs(g).max() for g in shaped[6]) < 0.1 * max(np.abs(g).max() for g in stream(30)[6])


@pytest.mark.parametrize("link", [AutoClip(100.0), AGC(math.inf), ClipBlock(1e9)], ids=lambda link: link.name)
def test_off_equals_absent(link: Any) -> None:
    off, absent = train(stream(30), link), train(stream(30))
    assert all(torch.equal(one, other) for one, other in zip(off, absent, strict=True))


@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
def test_resumes_bit_equal(link: Any) -> None:
    grads = stream(40)
    straight = train(grads, link)
    params = [nn.Parameter(torch.tensor(w)) for w in weights()]
    optimizer = Chain(params, link, AdamWRule(), lr=0.01, path="plain")
    for number, step in enumerate(grads):
        if number == 20:
            saved = optimizer.state_dict()
            params = [nn.Parameter(p.detach().clone()) for p in params]
            optimizer = Chain(params, link, AdamWRule(), lr=0.01, path="plain")
            optimizer.load_state_dict(saved)
        for p, grad in zip(params, step, strict=True):
            p.grad = torch.tensor(grad)
        optimizer.step()
    assert all(torch.equal(p.detach(), expected) for p, expected in zip(params, straight, strict=True))


@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
def test_zero_gradients_at_first_freeze_nothing(link: Any) -> None:
    """Tensor 1 and row 1 of tensor 0 see zeros for five steps; afterwards they move as their fellows do."""
    grads = stream(20)
    shaped = shape(grads, link)
    for number in (10, 15):
        assert np.abs(shaped[number][1]).max() > 1e-3
        assert np.abs(shaped[number][0][1]).max() > 1e-3


def test_agc_lets_rows_of_zeros_move() -> None:
    p = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    shaper = GradChain([p], AGC(), path="plain")
    p.grad = torch.ones(3, 4, dtype=torch.float64)
    p.grad[2] = 0.0
    shaper.step()
    np.testing.assert_allclose(p.grad.norm(dim=1).numpy(), [1e-5, 1e-5, 0.0], rtol=1e-12)


def test_clip_block_leaves_other_tensors_alone() -> None:
    grads = [[np.full(shape, 1e-3 if number else 50.0) for number, shape in enumerate(SHAPES)]]
    shaped = shape(grads, ClipBlock(1.0))
    assert np.linalg.norm(shaped[0][0]) == pytest.approx(1.0, rel=1e-5)
    assert all(np.array_equal(one, other) for one, other in zip(shaped[0][1:], grads[0][1:], strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
def test_a_non_finite_step_leaves_the_state_alone(link: Any, bad: float) -> None:
    params = [nn.Parameter(torch.tensor(w)) for w in weights()]
    shaper = GradChain(params, link, path="plain")
    before: dict[Any, torch.Tensor] = {}
    for number, step in enumerate(stream(10)):
        for p, grad in zip(params, step, strict=True):
            p.grad = torch.tensor(grad)
        if number == 9:
            params[2].grad[0, 1, 1] = bad
            state = shaper.state_dict()["state"]
            before = {(n, key): value.clone() for n, one in state.items() for key, value in one.items()}
        shaper.step()
    after = {(n, key): value for n, one in shaper.state_dict()["state"].items() for key, value in one.items()}
    assert set(after) == set(before) and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("link", "options", "value"),
    [
        (AutoClip, {"percentile": 101.0}, "101.0"),
        (AutoClip, {"percentile": math.nan}, "nan"),
        (AutoClip, {"window": 0}, "0"),
        (AGC, {"clip_factor": 0.0}, "0.0"),
        (AGC, {"clip_factor": math.nan}, "nan"),
        (AGC, {"eps": 0.0}, "0.0"),
        (ClipBlock, {"max_norm": -1.0}, "-1.0"),
        (ClipBlock, {"max_norm": math.inf}, "inf"),
    ],
)
def test_refuses(link: Any, options: dict[str, Any], value: str) -> None:
    with pytest.raises(UserError, match=f"{link.__name__} .*{value}"):
        link(**options)


def one_rank(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    expected = shape(stream(10), AGC())
    for dim in (0, 1):  # rows on one rank; rows split over both, whose norms have to be put together
        p = nn.Parameter(distribute_tensor(torch.tensor(weights()[0]), mesh, [Shard(dim)]))
        shaper = GradChain([p], AGC())
        for step, whole in zip(stream(10), expected, strict=True):
            p.grad = distribute_tensor(torch.tensor(step[0]), mesh, [Shard(dim)])
            shaper.step()
            np.testing.assert_allclose(p.grad.full_tensor().numpy(), whole[0], rtol=1e-12)


@pytest.mark.dist
def test_agc_on_sharded_rows_equals_whole_ones(two_ranks: Ranks) -> None:
    two_ranks.run(one_rank)
