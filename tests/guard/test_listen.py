"""Listening to every layer: right numbers, nothing changed, no model too strange."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from poise.guard.signals.attention import AttentionTally, Intercept, tally_queries_keys
from poise.guard.signals.listen import find_sites, floats, listening
from poise.model.build import build
from poise.model.spec import Spec

SPEC = Spec(vocab_size=61, seq_len=16, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)
LAYER = ("out_rms@{}.qkv", "out_max@{}.proj", "out_rms@{}.fc1", "out_max@{}.fc2", "residual_rms@{}", "dead@{}.fc2")
SCORES = ("attn_logit_max@{}", "attn_entropy@{}", "first_token@{}")


class SelfAttention(nn.Module):
    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.dropout, self.flash = nn.Dropout(0.1), flash

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (part.view(B, T, 4, 8).transpose(1, 2) for part in self.c_attn(x).split(D, -1))
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0, is_causal=True)
        else:
            logits = (q @ k.mT) * 8**-0.5
            hidden = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            y = self.dropout(F.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1)) @ v
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.dropout = nn.Linear(32, 128), nn.Linear(128, 32), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Layer(nn.Module):
    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attn, self.mlp = SelfAttention(flash), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """The layout and the names of nanoGPT: (ids, targets) -> (logits, loss)."""

    def __init__(self, flash: bool = True, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.ModuleList(Layer(flash) for _ in range(2))
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(61, 32), "wpe": nn.Embedding(16, 32), "h": layers, "ln_f": nn.LayerNorm(32)}
        )
        self.lm_head = nn.Linear(32, 61, bias=False)
        self.recompute = recompute

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for layer in self.transformer["h"]:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        logits = self.lm_head(self.transformer["ln_f"](x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def ids(seed: int = 0, rows: int = 4) -> tuple[Tensor, Tensor]:
    found = torch.randint(0, 61, (rows, 17), generator=torch.Generator().manual_seed(seed))
    return found[:, :-1].contiguous(), found[:, 1:].contiguous()


def make(name: str) -> Any:
    """Return (model, function from the model to its loss)."""
    inputs, targets = ids()
    if name.startswith("decoder"):
        dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
        return build(SPEC, seed=0, compute_dtype=dtype), lambda m: m(inputs, targets).loss
    if name.startswith("nanogpt"):
        model = NanoGPT(flash="eager" not in name, recompute="recompute" in name)
        return model, lambda m: m(inputs, targets)[1]
    transformers = pytest.importorskip("transformers")
    kind, attention = name.split("-")
    sizes = {"vocab_size": 61, "attn_implementation": attention}
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=16, **sizes)
    else:
        sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind](**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return model.train(), lambda m: m(input_ids=inputs, labels=inputs).loss


MODELS = ["decoder-fp32", "decoder-bf16", "nanogpt", "nanogpt-eager", "nanogpt-recompute"]
FOREIGN = [f"{kind}-{attention}" for kind in ("llama", "qwen2", "gpt2") for attention in ("sdpa", "eager")]


def step(model: Any, loss_of: Any, listen: bool) -> tuple[Tensor, list[Tensor], Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    with listening(model) if listen else contextlib.nullcontext() as heard:
        loss = loss_of(model)
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    return loss.detach(), grads, torch.get_rng_state(), heard.readings() if heard else {}


@pytest.mark.parametrize("name", MODELS + FOREIGN)
def test_all_layers_are_heard_and_nothing_changes(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        if name in FOREIGN:
            warnings.simplefilter("ignore")  # the library's own
        model, loss_of = make(name)
        loss, grads, rng, _ = step(model, loss_of, listen=False)
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        loss_heard, grads_heard, rng_heard, readings = step(model, loss_of, listen=True)
    assert torch.equal(loss, loss_heard) and torch.equal(rng, rng_heard)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_heard, strict=True))
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for number in range(2):
        for reading in (*LAYER, *SCORES):
            value = readings[reading.format(f"block.{number}")]
            assert value.dim() == 0 and math.isfinite(value), reading
        assert 0.0 < readings[f"attn_entropy@block.{number}"] <= 1.0
        assert 0.0 < readings[f"first_token@block.{number}"] < 1.0
    assert readings["embed_variability"] > 0
    assert not [record for record in caplog.records if record.name == "poise"]


def test_values_of_the_decoder_are_those_of_its_taps() -> None:
    model, loss_of = make("decoder-fp32")
    kept: dict[str, Tensor] = {}
    handles = [
        tap.register_forward_hook(lambda m, a, out, name=name: kept.update({name: out.detach()}))
        for name, tap in model.taps().items()
    ]
    handles += [model.trunk.blocks[1].attn.qkv.register_forward_hook(lambda m, a, out: kept.update(qkv=out.detach()))]
    with listening(model, rows=3) as heard:
        loss_of(model)
    for handle in handles:
        handle.remove()
    found = floats(heard.readings())
    rms = {name: float(x.double().square().mean().sqrt()) for name, x in kept.items()}
    assert found["residual_rms@block.1"] == pytest.approx(rms["block.1.residual"], rel=1e-5)
    assert found["out_rms@block.1.qkv"] == pytest.approx(rms["qkv"], rel=1e-5)
    assert found["out_max@block.1.fc2"] == pytest.approx(float(kept["block.1.mlp_out"].abs().max()), rel=1e-6)
    q, k = kept["block.1.q"][:3], kept["block.1.k"][:3].repeat_interleave(2, 1)
    z = (q @ k.mT * 8**-0.5).masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), float("-inf"))
    assert found["attn_logit_max@block.1"] == pytest.approx(float(z.amax()), rel=1e-4)
    assert found["first_token@block.1"] == pytest.approx(float(z.softmax(-1)[:, :, 1:, 0].mean()), rel=1e-4)
    table = model.embedding.weight.detach().double()
    spread = table.std(0).mean() / table.square().mean().sqrt()
    assert found["embed_variability"] == pytest.approx(float(spread), rel=1e-5)


@pytest.mark.parametrize("names", [("nanogpt", "nanogpt-eager"), *zip(FOREIGN[::2], FOREIGN[1::2], strict=True)])
def test_eager_and_fused_attention_read_the_same(names: tuple[str, str]) -> None:
    readings = []
    with warnings.catch_warnings():
        if names[0] in FOREIGN:
            warnings.simplefilter("ignore")  # the library's own
        for name in names:
            model, loss_of = make(name)
            model.eval()
            with listening(model) as heard:
                loss_of(model)
            readings.append(floats(heard.readings()))
    assert readings[0] == pytest.approx(readings[1], rel=1e-4)


def test_bfloat16_autocast_reads_in_fp32() -> None:
    model, loss_of = make("nanogpt")
    seen: list[AttentionTally] = []

    def read(q: Tensor, k: Tensor, scale: float | None, causal: bool, mask: Tensor | None) -> None:
        with torch.autocast("cpu", enabled=False):
            seen.append(AttentionTally())
            tally_queries_keys(seen[-1], q[:2].detach(), k[:2].detach(), causal=causal)

    with torch.autocast("cpu", torch.bfloat16), Intercept(read, lambda logits: None), listening(model) as heard:
        loss_of(model)
    found = heard.readings()
    for number, tally in enumerate(seen):
        assert all(torch.equal(found[f"{name}@block.{number}"], value) for name, value in tally.readings().items())
    assert len(seen) == 2 and all(value.dtype == torch.float32 for value in found.values())


def test_attention_outside_all_blocks_is_nobodys() -> None:
    model, loss_of = make("nanogpt-eager")
    with listening(model) as heard:
        loss_of(model)
        before = floats(heard.readings())
        torch.softmax(torch.full((1, 1, 2, 2), 1e4), -1)
    assert floats(heard.readings()) == before


def test_damage_shows_at_its_layer() -> None:
    model, loss_of = make("nanogpt")
    with listening(model) as heard:
        loss_of(model)
    before = floats(heard.readings())
    with torch.no_grad():
        model.transformer["h"][1].attn.c_attn.weight[:64] *= 10  # queries and keys: logits grow a hundredfold
        model.transformer["h"][0].mlp.c_fc.weight[:32] = 0
        model.transformer["h"][0].mlp.c_fc.bias[:32] = -4.5  # gelu of it is not quite zero
        model.transformer["h"][0].mlp.c_proj.weight[0, 100] = float("nan")
    with listening(model) as heard:
        loss_of(model)
    after = floats(heard.readings())
    assert before["dead@block.0.fc2"] == 0.0 and after["dead@block.0.fc2"] == 0.25
    assert after["out_rms@block.0.fc1"] > before["out_rms@block.0.fc1"]
    assert after["out_max@block.0.fc1"] == 4.5  # a magnitude
    assert after["out_rms@block.0.qkv"] == before["out_rms@block.0.qkv"]
    assert math.isnan(after["out_rms@block.0.fc2"]) and math.isnan(after["out_max@block.0.fc2"])
    assert math.isnan(after["residual_rms@block.0"])


def test_the_rms_of_a_large_output_keeps_its_digits() -> None:
    layer = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"c_fc": nn.Identity()})})])})
    layer["h"][0]["mlp"]["c_fc"].weight = nn.Parameter(torch.ones(1, 1))
    x = 3 * torch.randn(1500, 4000, generator=torch.Generator().manual_seed(0)) + 1
    with listening(layer) as heard:
        layer["h"][0]["mlp"]["c_fc"](x)
    assert float(heard.readings()["out_rms@block.0.fc1"]) == pytest.approx(
        float(x.double().square().mean() ** 0.5), 1e-6
    )


def test_growing_logits_raise_the_maximum_and_lower_the_entropy() -> None:
    model, loss_of = make("decoder-fp32")
    found = []
    for _ in range(2):
        with listening(model) as heard:
            loss_of(model)
        found.append(floats(heard.readings()))
        with torch.no_grad():
            model.trunk.blocks[1].attn.qkv.weight[:48] *= 30.0
    assert found[1]["attn_logit_max@block.1"] == pytest.approx(900 * found[0]["attn_logit_max@block.1"], rel=1e-3)
    assert found[1]["attn_entropy@block.1"] < 0.8 * found[0]["attn_entropy@block.1"]
    assert found[1]["attn_entropy@block.0"] == found[0]["attn_entropy@block.0"]


class Experts(nn.Module):
    """A top-2 mixture with its router called ``gate``, as in Mixtral."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.top_k = nn.Linear(8, 4, bias=False), 2
        self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(8, 8), "w2": nn.Linear(8, 8)}) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).topk(2, -1).indices
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).any(-1)
            out[mine] += expert["w2"](F.relu(expert["w1"](x[mine])))
        return out


class Strange(nn.Module):
    """Blocks with experts, a block that returns a dictionary, a linear layer that returns None."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": Experts()}), Silent()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0]["mlp"](x))["x"]


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": self.self_attn(x, x, x, need_weights=False)[0]}


def test_experts_are_taken_together_and_the_router_is_weighed() -> None:
    model = Strange()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        model.layers[0]["mlp"].gate.weight[:] = 0.0
        model.layers[0]["mlp"].gate.weight[0, :] = 1.0
        x[..., 0] = 40.0  # every token prefers expert 0; the second choice is a tie
    with listening(model) as heard:
        model(x)
    found = floats(heard.readings())
    assert found["router_balance@block.0"] == pytest.approx(2.0)  # 10 of 20 places over a mean of 5
    assert {"out_rms@block.0.fc1", "dead@block.0.fc2"} <= set(found)


def test_what_cannot_be_read_is_dropped_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = Strange()
    x = torch.randn(2, 5, 8)
    expected = model(x)
    with caplog.at_level(logging.WARNING, "poise"), listening(model) as heard:
        found = model(x)
        model(x)
    assert torch.equal(found, expected)
    assert len(caplog.records) == 1 and "block.1" in caplog.text
    assert "residual_rms@block.1" not in heard.readings() and "attn_entropy@block.1" not in heard.readings()
    assert "out_rms@block.0.fc1" in heard.readings()


def test_model_without_layers_and_forward_that_raises() -> None:
    with listening(nn.Linear(3, 3)) as heard:
        assert heard.readings() == {}
    model, loss_of = make("nanogpt")
    with pytest.raises(IndexError), listening(model):
        model(torch.full((1, 4), 99), torch.zeros(1, 4, dtype=torch.int64))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with listening(model) as heard:
        loss_of(model)
    assert "attn_entropy@block.1" in heard.readings()


def test_wrappers_are_looked_through() -> None:
    model = NanoGPT()
    plain = find_sites(model)
    wrapped = find_sites(nn.DataParallel(model))
    assert [place for _, place in plain.linears] == [place for _, place in wrapped.linears]
    assert [place for _, place in plain.blocks] == ["block.0", "block.1"]
    assert plain.embedding is model.transformer["wte"]
    kinds = ("qkv", "proj", "fc1", "fc2")
    assert [place for _, place in plain.linears] == [f"block.{n}.{kind}" for n in (0, 1) for kind in kinds]
