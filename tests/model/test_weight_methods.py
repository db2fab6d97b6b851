"""The methods of weights beside their twins: differential tests of their papers, state, compilation, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from poise.core.errors import Conflict, UserError
from poise.model.build import build
from poise.model.init import SmallInit
from poise.model.methods import apply_methods
from poise.model.methods.layer_scale import start_of
from poise.model.methods.locater import Locater
from poise.model.methods.sigma_reparam import SigmaLinear
from poise.model.methods.wesar import GatedLinear
from poise.model.place import Place
from poise.model.spec import Part, Spec
from poise.model.starts import stds

TINY = Spec(vocab_size=31, seq_len=12, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24)
LINEARS = ("attn.qkv", "attn.out", "mlp.inner", "mlp.out")
MINE = (
    "small_init",
    "scaled_init",
    "embed_std:std=0.3",
    "zero_init",
    "rezero",
    "skip_init",
    "layer_scale",
    "wesar",
    "sigma_reparam",
    "mlra",
    "locater",
)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, TINY.vocab_size, (3, TINY.seq_len + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linears(model: torch.nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if name.endswith(LINEARS)}


def step(model: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Loss, gradients and buffers after one forward and backward."""
    model.zero_grad()
    out = model(*batch(seed))
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach()} | grads | {name: b.clone() for name, b in model.named_buffers()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- starting values --


@pytest.mark.parametrize(("d_model", "n_layers"), [(64, 4), (32, 8)])
def test_matrices_of_small_init_start_with_the_deviations_of_the_table(d_model: int, n_layers: int) -> None:
    model = build(apply_methods(Spec(97, 8, n_layers, d_model, 4, 2, 96), ["small_init"]), seed=0)
    cut = 0.98658  # deviation of a unit normal cut off at three
    roles = model.roles()
    for name, param in model.named_parameters():
        if roles[name] != "norm":
            wanted = math.sqrt(2 / (5 * d_model)) / (math.sqrt(2 * n_layers) if roles[name].endswith("_out") else 1)
            assert param.std().item() == pytest.approx(cut * wanted, rel=0.07), name


def test_residual_and_embedding_starts_are_those_of_the_methods() -> None:
    plain = {"init": Part.of("default", {"scale_residual": False})}
    unscaled = Spec(31, 12, 8, 16, 4, 2, 24, tied=False, **plain)  # type: ignore[arg-type]
    assert stds(unscaled)["attn_out"] == stds(unscaled)["q"] == 0.02
    scaled = stds(apply_methods(unscaled, ["scaled_init"]))
    assert scaled["attn_out"] == scaled["mlp_out"] == 0.02 / 4 and scaled["q"] == scaled["head"] == 0.02
    assert stds(apply_methods(unscaled, ["zero_init"]))["mlp_out"] == 0
    treated = stds(apply_methods(unscaled, ["embed_std"]))
    assert treated["embedding"] == 1.0 and treated["head"] == 0.02
    assert SmallInit(Place(unscaled)).std("q") == math.sqrt(2 / 80)


def test_zero_initialised_blocks_and_rezero_blocks_are_the_identity() -> None:
    for words in ("zero_init", "rezero", "skip_init"):
        model = build(apply_methods(TINY, [words]), seed=0)
        seen: dict[str, torch.Tensor] = {}
        for name in ("embed", "block.1.residual"):
            model.taps()[name].register_forward_hook(lambda _, __, x, name=name, seen=seen: seen.update({name: x}))
        model(*batch())
        assert torch.equal(seen["embed"], seen["block.1.residual"])


def test_layer_scale_starts_by_depth() -> None:
    assert [start_of(n) for n in (1, 18, 19, 24, 25, 96)] == [0.1, 0.1, 1e-5, 1e-5, 1e-6, 1e-6]
    deep = build(apply_methods(Spec(31, 4, 20, 8, 2, 2, 8), ["layer_scale"]), seed=0)
    assert torch.equal(deep.trunk.blocks[3].mlp_add.weight, torch.full((8,), 1e-5))


def test_embedding_of_deviation_one_needs_a_head_of_its_own() -> None:
    with pytest.raises(UserError, match=r"tied = false.*at most 0\.5"):
        apply_methods(TINY, ["embed_std"])
    apply_methods(TINY, ["embed_std:std=0.5"])


# -- σReparam --


def layer(d_in: int = 7, d_out: int = 5, gamma: str = "sigma") -> SigmaLinear:
    module = SigmaLinear(Place(TINY), d_in, d_out, "qkv", gamma).double()
    with torch.no_grad():
        module.weight.copy_(noise(d_out, d_in))
        module.gamma.fill_(1.0)
    module.fill_buffers()
    return module


@pytest.mark.parametrize(("d_in", "d_out"), [(7, 5), (5, 7)])
def test_sigma_starts_exact_and_the_iteration_finds_the_spectral_norm(d_in: int, d_out: int) -> None:
    module = layer(d_in, d_out)
    assert torch.allclose(module.effective_weight(), module.weight, rtol=1e-12)
    assert torch.linalg.matrix_norm(layer(d_in, d_out, "one").effective_weight(), 2).item() == pytest.approx(1.0)
    with torch.no_grad():
        module.weight.copy_(noise(d_out, d_in, seed=1))
        module.gamma.fill_(1.7)
    x_D = noise(2, d_in)
    assert abs(torch.linalg.matrix_norm(module.effective_weight(), 2).item() - 1.7) > 1e-3, "u was of other weights"
    for _ in range(400):
        module(x_D).sum().backward()
    hat_OD = module.effective_weight()
    assert torch.linalg.matrix_norm(hat_OD, 2).item() == pytest.approx(1.7, rel=1e-12)
    assert torch.allclose(hat_OD, 1.7 / torch.linalg.matrix_norm(module.weight, 2) * module.weight, rtol=1e-12)


def test_sigma_training_step_equals_the_formulas() -> None:
    module, x_ND, c_NO = layer(), noise(3, 7, seed=2), noise(3, 5, seed=3)
    with torch.no_grad():
        module.weight.add_(0.3 * noise(5, 7, seed=4))
    w_OD, u_D, gamma = module.weight.detach().numpy(), module.u_D.numpy().copy(), module.gamma.item()
    v_O = w_OD @ u_D / np.linalg.norm(w_OD @ u_D)
    u_D = w_OD.T @ v_O / np.linalg.norm(w_OD.T @ v_O)
    sigma = v_O @ w_OD @ u_D
    g_OD = c_NO.numpy().T @ x_ND.numpy()  # gradient of the loss with respect to Ŵ
    along = (g_OD * w_OD).sum()
    (module(x_ND) * c_NO).sum().backward()
    wanted_OD = gamma / sigma * (g_OD - along / sigma * np.outer(v_O, u_D))
    assert module.weight.grad is not None and module.gamma.grad is not None
    np.testing.assert_allclose(module.weight.grad.numpy(), wanted_OD, rtol=1e-11)
    assert module.gamma.grad.item() == pytest.approx(along / sigma, rel=1e-11)
    np.testing.assert_allclose(module.u_D.numpy(), u_D, rtol=1e-11)


def test_sigma_iterates_once_a_training_step_and_nowhere_else() -> None:
    module, x_D = layer(), noise(2, 7)
    with torch.no_grad():
        module.weight.copy_(noise(5, 7, seed=5))
    before = module.u_D.clone()
    module.eval()
    evaluated = module(x_D)
    evaluated.sum().backward()
    module.train()
    with torch.no_grad():
        assert torch.equal(module(x_D), evaluated)
    module.effective_weight().sum().backward()
    assert torch.equal(module.u_D, before), "evaluation and a look at the weights change nothing"
    trained = module(x_D)
    assert torch.equal(trained, evaluated), "evaluation takes the same step and forgets it"
    assert torch.equal(torch.nn.functional.linear(x_D, module.effective_weight()), trained)
    trained.sum().backward()
    once = module.u_D.clone()
    assert not torch.equal(once, before)
    module(x_D).sum().backward()
    assert not torch.equal(module.u_D, once), "a second micro-batch is a second step"


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_layer_iterates_once(reentrant: bool) -> None:
    found = []
    for wanted in (False, True):
        module, x_D = layer(), noise(2, 7).requires_grad_()
        with torch.no_grad():
            module.weight.copy_(noise(5, 7, seed=5))
        y = checkpoint(module, x_D, use_reentrant=reentrant) if wanted else module(x_D)
        y.square().sum().backward()
        assert module.weight.grad is not None
        found.append((y.detach(), module.weight.grad, module.gamma.grad, module.u_D, x_D.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def moved(*models: Any) -> None:
    """A step of its own for every parameter, the same in all models."""
    with torch.no_grad():
        for model in models:
            for param in model.parameters():
                param.add_(0.01 * param.sign())


@pytest.mark.parametrize("words", ["sigma_reparam", "locater:coefficient=0.01"])
def test_recomputed_blocks_leave_the_same_state(words: str) -> None:
    models = [build(apply_methods(TINY, [words]), seed=1) for _ in range(2)]
    models[1].recompute_blocks()
    start = step(models[0], 4)
    assert equal(start, step(models[1], 4))
    for seed in (5, 6):
        moved(*models)
        assert equal(step(models[0], seed), step(models[1], seed))
    assert any(not torch.equal(start[name], buffer) for name, buffer in models[0].named_buffers()) or "locater" in words


@pytest.mark.filterwarnings("ignore")  # what the compiler warns of is its own
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("words", ["sigma_reparam", "locater:coefficient=0.01", "wesar", "mlra"])
def test_compiled_modules_equal_the_eager_ones(words: str, recompute: bool) -> None:
    """The matrix product and the penalty, two steps with another value of every parameter between."""
    torch._dynamo.reset()
    spec = apply_methods(TINY, [words])
    attentions = [build(spec, seed=1, compute_dtype=torch.float64).trunk.blocks[0].attn for _ in range(2)]
    x_D = noise(3, 16)

    def loss(attention: Any) -> torch.Tensor:
        def inside(x: torch.Tensor) -> tuple[torch.Tensor, Any]:
            return attention.qkv(x), attention.penalty(attention.qkv, x.sum())

        y, penalty = checkpoint(inside, x_D, use_reentrant=False) if recompute else inside(x_D)
        return y.square().sum() + penalty

    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")
    for _ in range(2):
        found = []
        for attention, of in zip(attentions, (loss, compiled), strict=True):
            attention.zero_grad()
            value = of(attention)
            value.backward()
            grads = [p.grad for p in attention.qkv.parameters()]
            found.append([value.detach(), *grads, *attention.qkv.buffers(), *attention.penalty.buffers()])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-13)
        moved(*attentions)


# -- WeSaR --


def test_gates_start_where_the_paper_says() -> None:
    spec = apply_methods(Spec(31, 8, 12, 768, 12, 12, 3072), ["wesar:embed_gate=true"])
    sigma = math.sqrt(4e-5)
    block = build(Spec.from_dict({**spec.to_dict(), "n_layers": 12}), seed=0, device="meta").trunk.blocks[0]
    starts = {name: module.param_fill["gate"] for name, module in linears(block).items()}
    assert starts["attn.qkv"] == starts["mlp.inner"] == pytest.approx(math.sqrt(1 / 768) / sigma)
    assert starts["attn.out"] == pytest.approx(math.sqrt(1 / (2 * 12 * 768)) / sigma)
    assert starts["mlp.out"] == pytest.approx(math.sqrt(2 / (8 * 12 * 768)) / sigma)
    model = build(apply_methods(TINY, ["wesar:embed_gate=true"]), seed=0)
    assert model.embed_out.gate.item() == pytest.approx(1 / sigma)
    assert model.head_in.gate.item() == pytest.approx(0.25 / sigma)
    gates = {name: tuple(module.gate.shape) for name, module in linears(model.trunk.blocks[0]).items()}
    assert gates == {"attn.qkv": (3,), "attn.out": (1,), "mlp.inner": (2,), "mlp.out": (1,)}
    assert set(stds(model.spec).values()) == {sigma}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_gates_give_the_same_model(dtype: torch.dtype) -> None:
    spec = Spec(31, 12, 2, 16, 4, 2, 24, tied=False)
    gated, plain = (
        build(apply_methods(spec, ["wesar"]), seed=1, compute_dtype=dtype),
        build(spec, seed=2, compute_dtype=dtype),
    )
    with torch.no_grad():
        for module in linears(gated).values():
            module.gate.mul_(torch.linspace(0.8, 1.3, len(module.gate)))
        mine = dict(gated.named_parameters())
        for name, param in plain.named_parameters():
            param.copy_(mine[name])
        for name, module in linears(gated).items():
            plain.get_submodule(name).weight.copy_(module.effective_weight())
        inputs, _ = batch()
        assert torch.equal(gated.hidden(inputs), plain.hidden(inputs) * gated.head_in.gate.to(dtype))
        assert plain.head is not None and gated.head is not None
        plain.head.weight.mul_(gated.head_in.gate)
        if dtype == torch.float32:
            torch.testing.assert_close(plain.logits(inputs), gated.logits(inputs), rtol=2e-6, atol=2e-6)


def test_adam_steps_do_not_depend_on_the_gate() -> None:
    moves = []
    for alpha in (0.05, 1.0, 5.0):
        module = GatedLinear(Place(TINY), 16, 16, "attn_out", 4e-5).double()
        with torch.no_grad():
            module.weight.copy_(noise(16, 16))
            module.gate.fill_(alpha)
        adam = torch.optim.Adam([module.weight], lr=1e-2, eps=0.0)
        for t in range(10):  # a loss linear in W, so that the gradients are the same at all times
            adam.zero_grad()
            (module(noise(4, 16, seed=t)) * noise(4, 16, seed=t + 100)).sum().backward()
            adam.step()
        moves.append(module.weight.detach() - noise(16, 16))
    for move in moves[1:]:
        torch.testing.assert_close(move, moves[0], rtol=1e-10, atol=1e-14)


def test_gradients_of_the_gates_are_those_of_differences() -> None:
    module = GatedLinear(Place(TINY), 16, 32, "qkv", 4e-5).double()
    x_D = noise(3, 16, seed=1)
    weight, gate = noise(32, 16).requires_grad_(), torch.tensor([0.5, 1.5, -2.0]).double().requires_grad_()

    def loss(w_OD: torch.Tensor, gate_S: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(module, {"weight": w_OD, "gate": gate_S}, (x_D,)).square().sum()
        return out

    assert torch.autograd.gradcheck(loss, (weight, gate))


def test_update_ratios_are_uniform_with_wesar_and_not_with_small_init() -> None:
    spread = {}
    for words in ("wesar", "small_init"):
        spec = apply_methods(Spec(31, 12, 8, 32, 4, 4, 128, mlp="gelu"), [words])
        model = build(spec, seed=0)
        before = {name: module.weight.detach().clone() for name, module in linears(model).items()}
        adam = torch.optim.Adam(model.parameters(), lr=1e-4, eps=0.0)
        model(*batch()).loss.backward()
        adam.step()
        ratios = [
            ((module.weight - before[name]).norm() / before[name].norm()).item()
            for name, module in linears(model).items()
        ]
        spread[words] = max(ratios) / min(ratios)
    assert spread["wesar"] == pytest.approx(1.0, abs=0.06)
    assert spread["small_init"] == pytest.approx(math.sqrt(2 * 8), rel=0.06)


# -- low-rank projections --


def test_low_rank_products_start_with_the_plain_deviation() -> None:
    spec = apply_methods(Spec(31, 8, 1, 128, 4, 2, 64), ["small_init", "mlra"])
    model = build(spec, seed=0)
    block = model.trunk.blocks[0]
    w_OD = block.attn.qkv.effective_weight()
    for rows in w_OD.split((128, 64, 64)):  # both factors are cut off at three deviations
        assert rows.std().item() == pytest.approx(0.98658**2 * math.sqrt(2 / (5 * 128)), rel=0.06)
    assert torch.linalg.matrix_rank(w_OD[:128]).item() == 64 and torch.linalg.matrix_rank(w_OD[128:192]).item() == 32
    assert type(block.attn.out).__name__ == type(block.mlp.inner).__name__ == "Linear"
    x_D = noise(3, 128).float()
    torch.testing.assert_close(block.attn.qkv(x_D), x_D @ w_OD.T, rtol=1e-4, atol=1e-6)
    small = build(apply_methods(TINY, ["mlra:rank=3"]), seed=0).trunk.blocks[1].attn.qkv
    assert [tuple(p.shape) for p in small.down.values()] == [(3, 16)] * 3


# -- LocATER --


def test_the_penalty_is_that_of_the_full_matrices_and_so_is_its_gradient() -> None:
    model = build(TINY, seed=1, compute_dtype=torch.float64)
    qkv = model.trunk.blocks[0].attn.qkv
    with torch.no_grad():
        qkv.weight.copy_(0.3 * noise(*qkv.weight.shape))

    def explicit(weight_OD: torch.Tensor, measure: str) -> torch.Tensor:
        heads = weight_OD.split(4)
        total = torch.zeros((), dtype=torch.float64)
        for head in range(4):
            m_DD = heads[head].T @ heads[4 + head // 2]
            size = m_DD.square().sum() if measure == "frobenius" else torch.trace(m_DD @ m_DD)
            total = total + 0.2 * (size + 3 * (torch.trace(m_DD) - 1.5) ** 2)
        return total

    for measure in ("frobenius", "square"):
        module = Locater(Place(TINY), 0.2, 3.0, 1.5, measure)
        found = module(qkv, None)
        assert found is not None
        (grad_OD,) = torch.autograd.grad(found, qkv.weight)
        copy_OD = qkv.weight.detach().clone().requires_grad_()
        wanted = explicit(copy_OD, measure)
        (wanted_OD,) = torch.autograd.grad(wanted, copy_OD)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
        torch.testing.assert_close(grad_OD, wanted_OD, rtol=1e-10, atol=1e-13)
        assert module(qkv, found).item() == pytest.approx(2 * wanted.item(), rel=1e-12)

        def of(w_OD: torch.Tensor, module: Locater = module) -> torch.Tensor:
            holder = torch.nn.Module()
            holder.effective_weight = lambda: w_OD  # type: ignore[assignment]
            value = module(holder, None)
            assert value is not None
            return value

        assert torch.autograd.gradcheck(of, (copy_OD,))


def test_the_trace_of_the_first_training_step_is_remembered_and_saved() -> None:
    spec = apply_methods(TINY, ["locater:coefficient=0.1,rho=2"])
    model = build(spec, seed=1)
    model.eval()(*batch())
    attention = model.trunk.blocks[0].attn
    assert attention.penalty.known.item() == 0
    first = model.train()(*batch())
    heads = attention.qkv.weight.detach().split(4)
    traces = torch.stack([(heads[h] * heads[4 + h // 2]).sum() for h in range(4)])
    torch.testing.assert_close(attention.penalty.start_H, traces)
    scale = 0.0
    for block in model.trunk.blocks:
        rows_HKD = block.attn.qkv.weight.detach()[:24].view(6, 4, 16)
        m_HDD = rows_HKD[:4].mT @ rows_HKD[4:].repeat_interleave(2, 0)
        scale += m_HDD.square().sum().item()
    assert first.parts["penalty"].item() == pytest.approx(0.1 * scale, rel=1e-4), "at first only the scale counts"
    assert first.loss.item() == pytest.approx(first.ce.item() + first.parts["penalty"].item(), rel=1e-6)
    with torch.no_grad():
        attention.qkv.weight.mul_(1.5)
    later = model(*batch()).parts["penalty"].item()
    torch.testing.assert_close(attention.penalty.start_H, traces)
    other = build(spec, seed=2)
    other.load_state_dict(model.state_dict())
    assert other(*batch()).parts["penalty"].item() == later


# -- together --


def test_every_pair_composes_or_says_why_not() -> None:
    refused = set()
    for a, b in itertools.combinations(MINE, 2):
        try:
            spec = apply_methods(TINY, [a, b])
        except Conflict as error:
            assert all(name.split(":")[0] in str(error) for name in (a, b))
            refused.add((a.split(":")[0], b.split(":")[0]))
            continue
        found = step(build(spec, seed=1))
        assert all(torch.isfinite(value).all() for value in found.values()), (a, b)
    assert {
        ("zero_init", "sigma_reparam"),
        ("wesar", "sigma_reparam"),
        ("small_init", "zero_init"),
        ("rezero", "layer_scale"),
    } <= refused
    assert ("sigma_reparam", "locater") not in refused and ("small_init", "sigma_reparam") not in refused


def test_locater_and_normalised_queries_exclude_each_other() -> None:
    for words in (("locater", "qk_norm"), ("qk_norm", "locater")):
        with pytest.raises(Conflict, match="weight decay and nothing else"):
            apply_methods(TINY, words)


@pytest.mark.parametrize(
    "words",
    [
        "embed_std:std=0",
        "skip_init:init=inf",
        "layer_scale:init=nan",
        "layer_scale:init=0",
        "sigma_reparam:gamma=two",
        "wesar:variance=0",
        "mlra:rank=0",
        "mlra:rank=9",
        "locater:coefficient=-1",
        "locater:rho=-1",
        "locater:target=inf",
        "locater:measure=trace",
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(words: str) -> None:
    with pytest.raises(UserError) as error:
        apply_methods(TINY, [words])
    message = str(error.value)
    assert "\n" not in message and words.split(":")[0] in message
