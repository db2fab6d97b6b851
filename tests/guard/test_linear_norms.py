"""Norms of every linear layer: equal to norms worked out by hand, whatever the loop around them does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from poise.core.errors import UserError
from poise.guard.signals.linears import LinearNorms, find_linears
from poise.guard.signals.probe import probe
from poise.guard.signals.watch import watch
from poise.model.build import build
from poise.model.spec import Spec

SPEC = Spec(vocab_size=61, seq_len=16, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)


class Conv1D(nn.Module):
    """As in transformers: the weight is (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Layer(nn.Module):
    """Two linear layers on one input, and one on their product."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = nn.Linear(6, 8), nn.Linear(6, 8, bias=False), Conv1D(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o_proj(self.q_proj(x).tanh() * self.k_proj(x))


class Net(nn.Module):
    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(9, 6)
        self.h = nn.ModuleList(Layer() for _ in range(2))
        self.lm_head = nn.Linear(6, 9, bias=False)
        self.how = how

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for layer in self.h:
            x = layer(x) if self.how == "plain" else checkpoint(layer, x, use_reentrant=self.how == "reentrant")
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), ids.roll(1, -1).flatten())


def ids_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 9, (rows, 5), generator=torch.Generator().manual_seed(seed))


def by_hand(net: Net, ids: Tensor) -> dict[str, float]:
    """The same figures from explicit products and ``autograd.grad``, without a hook."""
    tensors: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    x = net.wte(ids)
    for number, layer in enumerate(net.h):
        inputs = [x.clone() for _ in range(2)]
        q = inputs[0] @ layer.q_proj.weight.T + layer.q_proj.bias
        k = inputs[1] @ layer.k_proj.weight.T
        mix = q.tanh() * k
        out = mix @ layer.o_proj.weight + layer.o_proj.bias
        tensors[f"block.{number}.q_proj"] = (inputs[0], q, layer.q_proj.weight)
        tensors[f"block.{number}.k_proj"] = (inputs[1], k, layer.k_proj.weight)
        tensors[f"block.{number}.o_proj"] = (mix, out, layer.o_proj.weight)
        x = x + out
    before = x.clone()
    logits = before @ net.lm_head.weight.T
    tensors["head"] = (before, logits, net.lm_head.weight)
    loss = F.cross_entropy(logits.flatten(0, 1), ids.roll(1, -1).flatten())
    grads = torch.autograd.grad(loss, [entry for entry, _, _ in tensors.values()])
    found = {}
    for (place, (entry, out, weight)), grad in zip(tensors.items(), grads, strict=True):
        for kind, value in (("in", entry), ("out", out), ("weight", weight), ("in_grad", grad)):
            norm = float(value.detach().double().square().sum().sqrt())
            found[f"linear_{kind}_norm@{place}"] = norm
            found[f"linear_{kind}_rms@{place}"] = norm / math.sqrt(value.numel())
    return found


def measured(net: Any, batches: list[Tensor], **options: Any) -> dict[str, float]:
    norms = LinearNorms(net, every=1)
    with norms.step(0, **options) as listening:
        assert listening
        for batch in batches:
            (net(batch) / len(batches) * options.get("loss_scale", 1.0)).backward()
    assert norms.measured == 0
    return norms.readings()


def close(found: dict[str, float], expected: dict[str, float], rel: float) -> None:
    assert found.keys() == expected.keys()
    assert {n: v for n, v in found.items() if not math.isclose(v, expected[n], rel_tol=rel)} == {}


@pytest.mark.parametrize("how", ["plain", "recomputed", "reentrant"])
def test_values_are_those_worked_out_by_hand(how: str) -> None:
    net = Net(how).double()
    close(measured(net, [ids_of(4)]), by_hand(net, ids_of(4)), 1e-12)


@pytest.mark.parametrize("how", ["plain", "recomputed", "reentrant"])
def test_micro_batches_count_as_one_batch(how: str) -> None:
    net = Net(how).double()
    parts = [ids_of(6)[:2], ids_of(6)[2:4], ids_of(6)[4:]]
    close(measured(net, parts), by_hand(net, ids_of(6)), 1e-12)


def test_scale_of_the_loss_is_taken_out() -> None:
    net = Net().double()
    close(measured(net, [ids_of(4)], loss_scale=1024.0), by_hand(net, ids_of(4)), 1e-12)
    norms = LinearNorms(net)
    with norms.step(0, loss_scale=torch.tensor(64.0)):
        (net(ids_of(4)) * 64).backward()
    close(norms.readings(), by_hand(net, ids_of(4)), 1e-6)


def test_bf16_is_summed_in_fp32() -> None:
    net = Net().bfloat16()
    found, exact = measured(net, [ids_of(50)]), by_hand(Net().bfloat16().double(), ids_of(50))
    assert all(math.isclose(found[name], exact[name], rel_tol=0.03) for name in exact)
    weight = "linear_weight_norm@head"  # nothing rounded on the way there
    assert math.isclose(found[weight], exact[weight], rel_tol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        under = measured(Net(), [ids_of(50)])
    assert all(math.isclose(under[name], exact[name], rel_tol=0.05) for name in exact)


@pytest.mark.parametrize("how", ["plain", "recomputed", "reentrant"])
def test_hooks_leave_no_trace_and_change_no_bit(how: str) -> None:
    states = []
    for every in (1, 10**9):
        net = Net(how)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        norms = LinearNorms(net, every=every)
        for number in range(1, 4):
            with norms.step(number) as listening:
                assert listening == (every == 1)
                hooked = [m for m in net.modules() if m._forward_hooks or m._forward_pre_hooks]
                assert len(hooked) == (7 if listening else 0)
                net(ids_of(4, number)).backward()
            assert not any(
                m._forward_hooks or m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in net.modules()
            )
            optimizer.step()
            optimizer.zero_grad()
        states.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        assert bool(norms.readings()) == (every == 1)
    assert torch.equal(*states)


def test_steps_between_are_not_measured_and_the_last_one_stays() -> None:
    net, seen = Net(), []
    norms = LinearNorms(net, every=3)
    assert norms.readings() == {} and norms.measured is None
    for number in range(7):
        with norms.step(number) as listening:
            net(ids_of(2, number)).backward()
        seen.append((listening, norms.measured))
    assert seen == [(True, 0), (False, 0), (False, 0), (True, 3), (False, 3), (False, 3), (True, 6)]
    kept = norms.readings()
    with pytest.raises(ValueError, match="in the middle"), norms.step(9):
        net(ids_of(2)).backward()
        raise ValueError("in the middle")
    assert kept and norms.readings() == {} and norms.measured is None
    assert not any(m._forward_hooks for m in net.modules())


def test_a_graph_of_an_older_step_does_not_speak_for_a_newer() -> None:
    net = Net().double()
    norms = LinearNorms(net, every=1)
    with norms.step(1):
        late = net(ids_of(4, 1))
    with norms.step(2):
        net(ids_of(4, 2)).backward()
        late.backward()
    close(norms.readings(), by_hand(net, ids_of(4, 2)), 1e-12)


def test_what_runs_aside_does_not_count() -> None:
    net = Net().double()
    norms = LinearNorms(net, every=1)
    with norms.step(0):
        net(ids_of(4)).backward()
        probe(net, lambda: net(ids_of(2, 9)))
    close(norms.readings(), by_hand(net, ids_of(4)), 1e-12)


def test_an_input_given_by_name_and_one_without_gradient() -> None:
    linear = nn.Linear(3, 2)
    norms = LinearNorms(linear, every=1)
    x = torch.ones(4, 3)
    with norms.step(0):
        linear(input=x).sum().backward()
    assert norms.readings()["linear_in_norm@model"] == pytest.approx(12**0.5)
    assert "linear_in_grad_norm@model" not in norms.readings()
    with norms.step(0):
        linear(input=x.requires_grad_()).sum().backward()
    expected = float((torch.ones(4, 2) @ linear.weight.detach()).norm())
    assert norms.readings()["linear_in_grad_norm@model"] == pytest.approx(expected, rel=1e-6)


def test_not_finite_stays_in_its_place() -> None:
    net = Net()
    with torch.no_grad():
        net.h[1].o_proj.weight[0, 0] = math.nan
    found = measured(net, [ids_of(2)])
    assert math.isnan(found["linear_weight_norm@block.1.o_proj"]) and math.isnan(found["linear_out_rms@head"])
    assert math.isfinite(found["linear_out_norm@block.1.q_proj"])
    assert math.isfinite(found["linear_weight_rms@block.0.o_proj"])


def test_names_choose_layers() -> None:
    net = Net()
    assert LinearNorms(net, names=["*.o_proj", "head"]).places == ("block.0.o_proj", "block.1.o_proj", "head")
    with pytest.raises(UserError, match=r"no linear layer is at 'block\.7\.\*'; there are block\.0\.q_proj"):
        LinearNorms(net, names=["block.7.*"])
    with pytest.raises(UserError, match="every is 0"):
        LinearNorms(net, every=0)


def test_poises_own_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(SPEC, seed=0)
    names = ("attn.qkv", "attn.out", "mlp.inner", "mlp.out")
    norms = LinearNorms(model, every=1)
    assert norms.places == tuple(f"block.{n}.{name}" for n in range(2) for name in names)
    out = model.trunk.blocks[1].mlp.out
    monkeypatch.setattr(out, "effective_weight", lambda: 2 * out.weight)
    ids = torch.randint(0, 61, (2, 16))
    kept: list[Tensor] = []
    handle = model.taps()["block.1.mlp_hidden"].register_forward_hook(lambda m, a, o: kept.append(o))
    with norms.step(0):
        model(ids, ids).loss.backward()
    handle.remove()
    found = norms.readings()
    assert len(found) == 2 * 4 * 8
    assert found["linear_in_norm@block.1.mlp.out"] == pytest.approx(float(kept[0].detach().norm()), rel=1e-6)
    assert found["linear_weight_norm@block.1.mlp.out"] == pytest.approx(2 * float(out.weight.detach().norm()), rel=1e-6)
    untied = find_linears(build(replace(SPEC, tied=False), seed=0))
    assert [place for _, place in untied if not place.startswith("block")] == ["head"]


def test_places_of_a_transformers_model() -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 31}
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes)
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, 31, (2, 5))
    norms = LinearNorms(model, every=1)
    with norms.step(0):
        model(input_ids=ids, labels=ids).loss.backward()
    attn = [f"block.0.self_attn.{name}_proj" for name in "qkvo"]
    mlp = [f"block.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert list(norms.places) == [*attn, *mlp, "head"]
    assert len(norms.readings()) == 8 * 8 and all(value > 0 for value in norms.readings().values())
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=31))
    found = measured_hf(gpt, ids)
    assert {name.partition("@")[2] for name in found} == {
        "block.0.attn.c_attn", "block.0.attn.c_proj", "block.0.mlp.c_fc", "block.0.mlp.c_proj", "head"
    }  # fmt: skip


def measured_hf(model: Any, ids: Tensor) -> dict[str, float]:
    norms = LinearNorms(model, every=1)
    with norms.step(0):
        model(input_ids=ids, labels=ids).loss.backward()
    return norms.readings()


# -- in the watch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["plain", "recomputed", "reentrant"])
def test_the_watch_has_them_too(how: str) -> None:
    net = Net(how).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    watching = watch(net, every=2, linears=True)
    for number in range(4):
        expected = by_hand(net, ids_of(4, number))
        for micro in range(2):
            net(ids_of(4, number if micro == 0 else 50)).backward()
            if number % 2 == 0:
                found = {n: v for n, v in watching.readings.items() if n.startswith("linear_")}
                close(found, expected, 1e-6)
        optimizer.step()
        optimizer.zero_grad()
        if number == 2:
            taken = watching.take()
            assert taken is not None and "linear_in_grad_rms@block.1.q_proj" in taken and "loss" in taken
    assert watching.step == 3 and not any(m._forward_hooks for m in net.h.modules())
    watching.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    plain = watch(net, every=1)
    net(ids_of(2)).backward()
    assert not any(name.startswith("linear_") for name in plain.readings)


# -- over ranks -------------------------------------------------------------------------------------------------


def rank_main(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2,))
    expected = by_hand(Net().double(), ids_of(4))
    own = ids_of(4)[2 * rank : 2 * rank + 2]
    results: dict[str, Callable[[], Any]] = {}

    def sharded() -> nn.Module:
        net = Net().double()
        for layer in net.h:
            fully_shard(layer, mesh=mesh)
        return fully_shard(net, mesh=mesh)

    results["ddp"] = lambda: DistributedDataParallel(Net().double())
    results["fsdp2"] = sharded
    for make in results.values():
        model = make()
        found = measured(model, [own])
        close(found, expected, 1e-9)
    one_rank_only = LinearNorms(Net(), every=1, names=["head"] if rank else ["block.0.*"])
    with one_rank_only.step(0):
        pass
    found = one_rank_only.readings()
    assert sorted(found) == sorted(n for n in expected if "weight" in n and ("head" in n or "block.0" in n)), found
    close(found, {name: expected[name] for name in found}, 1e-6)
    return json.dumps(found)


@pytest.mark.dist
def test_two_processes_read_what_one_reads(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(rank_main)
    assert first == second


def test_what_has_no_linear_layers_and_what_is_no_module(caplog: pytest.LogCaptureFixture) -> None:
    for wrong in (lambda: LinearNorms(None), lambda: watch(None)):  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"torch module.* a NoneType"):
            wrong()
    assert LinearNorms(nn.Sequential(nn.ReLU())).places == () and "no linear layers" in caplog.text


def test_a_watch_with_linears_alone_does_not_say_that_it_has_nothing(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    watch(net).remove()
    assert "nothing to measure" in caplog.text
    caplog.clear()
    with watch(net, every=1, linears=True) as watching:
        net(torch.ones(2, 3)).sum().backward()
        assert watching.readings["linear_out_norm@0"] > 0 and not caplog.text
