"""Methods on tiny transformers models with random weights: each against a plain transcription in float64."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

transformers = pytest.importorskip("transformers")

import poise  # noqa: E402
from poise.core.errors import Conflict, UserError  # noqa: E402
from poise.face import load_hf  # noqa: E402
from poise.integrations.hf.loss import ReportZLoss, ZLoss  # noqa: E402
from poise.integrations.hf_methods import METHODS, RECORD, applied, apply_hf  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # what libraries warn about is not ours

VOCAB, LENGTH, WIDTH, HEADS, GROUPS, HEAD = 32, 12, 16, 4, 2, 4
WORKING = [name for name in METHODS if name != "soft_cap"]
TEXTS = [*WORKING, "gated_attention:score=headwise"]


def make(kind: str = "Llama", seed: int = 0, layers: int = 3, **settings: Any) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD,
        max_position_embeddings=32,
        rms_norm_eps=1e-8,
        initializer_range=0.2,
        **settings,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def ids_of(seed: int = 1, rows: int = 2) -> Tensor:
    return torch.randint(VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def shake(model: Any) -> Any:
    """Move all gains off their start, so that a gain that is forgotten shows."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=random).to(p.dtype))
    return model


def logits_of(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids_of() if ids is None else ids, use_cache=False).logits
    return out


def gradients(model: Any, ids: Tensor | None = None) -> dict[str, Tensor]:
    ids = ids_of() if ids is None else ids
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# --- parity: the decoder written down again -------------------------------------------------------------------------


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-8).sqrt() * gain


def turn(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BHTK.chunk(2, -1)
    return x_BHTK * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def reference(model: Any, ids: Tensor, methods: set[str]) -> Tensor:
    """Logits of a Llama with methods, from its parameters and the papers' formulas."""
    w = dict(model.named_parameters())
    x = w["model.embed_tokens.weight"][ids]
    if "embed_scale" in methods:
        x = 4.0 * x  # sqrt(16)
    if methods & {"embed_norm", "peri_ln"}:
        x = rms(x, w["model.embed_norm.weight"])
    cos, sin = model.model.rotary_emb(x, torch.arange(LENGTH)[None])
    for number in range(3):
        at = f"model.layers.{number}."
        lns = 1 / math.sqrt(number + 1) if "layer_norm_scaling" in methods else 1.0
        h = rms(x, w[at + "input_layernorm.weight"]) * lns
        parts = {n: h @ w[f"{at}self_attn.{n}_proj.weight"].T for n in "qkv"}
        q, k, v = (parts[n].view(2, LENGTH, -1, HEAD).transpose(1, 2) for n in "qkv")
        if methods & {"qk_norm", "qk_fc_norm"}:
            q, k = rms(q, w[at + "self_attn.q_norm.weight"]), rms(k, w[at + "self_attn.k_norm.weight"])
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(HEAD)
        if "soft_cap" in methods:
            scores = 0.5 * torch.tanh(scores / 0.5)
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
        mix = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        if "gated_attention" in methods:
            mix = mix * torch.sigmoid(h @ w[at + "self_attn.attn_gate.weight"].T)
        if "gated_attention:score=headwise" in methods:
            mix = mix * torch.sigmoid(h @ w[at + "self_attn.attn_gate.weight"].T).repeat_interleave(HEAD, -1)
        x = x + leave(mix @ w[at + "self_attn.o_proj.weight"].T, w, at + "attn_", methods)
        h = rms(x, w[at + "post_attention_layernorm.weight"]) * lns
        hidden = F.silu(h @ w[at + "mlp.gate_proj.weight"].T) * (h @ w[at + "mlp.up_proj.weight"].T)
        x = x + leave(hidden @ w[at + "mlp.down_proj.weight"].T, w, at + "mlp_", methods)
    logits = rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T
    return 30 * torch.tanh(logits / 30) if "final_soft_cap" in methods else logits


def leave(out: Tensor, w: dict[str, Tensor], at: str, methods: set[str]) -> Tensor:
    if methods & {"peri_ln", "sandwich_ln", "qk_fc_norm"}:
        out = rms(out, w[at + "out_norm.weight"])
    return out * w[at + "layer_scale.weight"] if "layer_scale" in methods else out


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own norms in the dtype of their input; they are fp32 also in a float64 model."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: rms(x, self.weight))


FORWARD = [text for text in TEXTS if text not in ("embed_detach", "z_loss", "small_init")]
TOGETHER = "qk_norm layer_scale sandwich_ln layer_norm_scaling embed_norm gated_attention final_soft_cap z_loss"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("text", ["", *FORWARD, TOGETHER])
def test_forward_and_gradients_are_those_of_the_formulas(text: str, attention: str, exact: None) -> None:
    methods = text.split()
    model = make(attn_implementation=attention).double()
    model = shake(poise.apply(model, *methods))
    weights_BTV = torch.randn(2, LENGTH, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    logits, expected = model(ids_of()).logits, reference(model, ids_of(), set(methods))
    near = {"rtol": 1e-9, "atol": 1e-11} if attention == "sdpa" else {"rtol": 1e-4, "atol": 3e-5}  # eager: fp32 softmax
    torch.testing.assert_close(logits, expected, **near)
    found = torch.autograd.grad((logits * weights_BTV).sum(), list(model.parameters()))
    wanted = torch.autograd.grad((expected * weights_BTV).sum(), list(model.parameters()))
    for name, a, b in zip(dict(model.named_parameters()), found, wanted, strict=True):
        torch.testing.assert_close(a, b, **near, msg=lambda m, name=name: f"{name}: {m}")
        assert b.abs().max() > 1e-6, name


def test_a_llama_with_qk_norm_is_a_qwen3() -> None:
    llama = shake(poise.apply(make(), "qk_norm"))
    qwen = make("Qwen3", seed=9)
    qwen.load_state_dict(llama.state_dict(), strict=True)
    torch.testing.assert_close(logits_of(llama), logits_of(qwen), rtol=0, atol=0)


@pytest.mark.parametrize("projection", ["q_proj", "k_proj"])
def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant(projection: str) -> None:
    def change(model: Any) -> float:
        before = logits_of(model)
        with torch.no_grad():
            for layer in model.model.layers:
                getattr(layer.self_attn, projection).weight.mul_(1e3)
        return float((logits_of(model) - before).abs().max())

    assert change(poise.apply(make().double(), "qk_norm")) < 1e-6
    assert change(make().double()) > 0.1


# --- what a method is when it is off, and that it acts when it is on ------------------------------------------------


def test_a_model_without_methods_is_not_touched() -> None:
    config = make().config
    plain = transformers.LlamaForCausalLM(copy.deepcopy(config))
    state, before = plain.state_dict(), logits_of(plain)
    other = transformers.LlamaForCausalLM(plain.config)  # one config object for both
    poise.apply(other, *TOGETHER.split())
    assert torch.equal(logits_of(plain), before)
    assert plain.state_dict().keys() == state.keys()
    assert not hasattr(plain.config, RECORD)
    assert "_loss_function" not in vars(plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    assert all(m.config is other.config for m in other.modules() if hasattr(m, "config"))


def test_apply_without_names_changes_nothing() -> None:
    model = make()
    before = logits_of(model)
    assert poise.apply(model) is model
    assert torch.equal(logits_of(model), before)
    assert model.config.poise_methods == []


@pytest.mark.parametrize(
    "text", ["layer_scale:init=1", "embed_scale:factor=1", "embed_detach:gamma=1", "z_loss:coefficient=0"]
)
def test_identity_settings_are_the_plain_model_bit_for_bit(text: str) -> None:
    plain, model = make(), poise.apply(make(), text)
    assert torch.equal(logits_of(plain), logits_of(model))
    changed = gradients(model)
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradient, changed[name]), name


def test_a_very_high_cap_is_no_cap() -> None:
    plain, model = make().double(), poise.apply(make().double(), "final_soft_cap:cap=1e9")
    torch.testing.assert_close(logits_of(plain), logits_of(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", TEXTS)
def test_every_method_acts(text: str) -> None:
    plain, model = make(), poise.apply(make(), text)
    before, after = gradients(plain), gradients(model)
    assert any(not torch.allclose(before[name], after[name], rtol=1e-5, atol=1e-9) for name in before)
    if text.partition(":")[0] not in ("embed_detach", "z_loss"):
        assert not torch.allclose(logits_of(plain), logits_of(model), rtol=1e-4)


@pytest.mark.parametrize("text", TEXTS)
def test_every_new_parameter_gets_a_gradient_in_bf16(text: str) -> None:
    model = poise.apply(make().bfloat16(), text)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in gradients(model).values())


def test_norm_statistics_of_a_bf16_model_are_fp32() -> None:
    norm = poise.apply(make().bfloat16(), "qk_norm").model.layers[0].self_attn.q_norm
    x = torch.randn(64, HEADS, HEAD, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded_once = rms(x.double(), torch.ones(HEAD, dtype=torch.float64)).bfloat16()
    out = norm(x.flatten(-2)).view_as(x)
    assert out.dtype == torch.bfloat16
    assert (out == rounded_once).double().mean() > 0.99  # with statistics in bf16 it is 0.69


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_embed_detach_leaves_the_output_and_shrinks_one_gradient() -> None:
    plain, model = make().double(), poise.apply(make().double(), "embed_detach:gamma=0.1")
    assert torch.equal(logits_of(plain), logits_of(model))
    before, after = gradients(plain), gradients(model)
    for name, gradient in before.items():
        if name == "model.embed_tokens.weight":
            torch.testing.assert_close(after[name], 0.1 * gradient, rtol=1e-12, atol=0)
        else:
            assert torch.equal(after[name], gradient), name


@pytest.mark.parametrize("text", ["embed_scale", "embed_norm", "embed_detach"])
def test_a_tied_head_is_left_alone(text: str) -> None:
    """The head's share of a tied matrix' gradient is that of the untied model."""
    tied, untied = (poise.apply(make(tie_word_embeddings=tie).double(), text) for tie in (True, False))
    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.state_dict()["model.embed_tokens.weight"]})
    assert torch.equal(logits_of(tied), logits_of(untied))
    apart = gradients(untied)
    both = apart["lm_head.weight"] + apart["model.embed_tokens.weight"]
    torch.testing.assert_close(gradients(tied)["model.embed_tokens.weight"], both, rtol=1e-6, atol=1e-9)


# --- z-loss ----------------------------------------------------------------------------------------------------------


def z_of(logits: Tensor, labels: Tensor, items: int | None = None) -> Tensor:
    counts = labels[:, 1:] != -100
    squares = logits[:, :-1].double().logsumexp(-1).square()[counts]
    return squares.sum() / (items or counts.sum())


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
def test_z_loss_value_and_gradient(items: Any) -> None:
    model = poise.apply(make().double(), "z_loss:coefficient=0.5")
    labels = ids_of().clone()
    labels[0, :5] = -100
    logits = model(ids_of()).logits.detach().requires_grad_()
    loss = model.loss_function(logits=logits, labels=labels, vocab_size=VOCAB, num_items_in_batch=items)
    plain = make().loss_function(logits=logits, labels=labels, vocab_size=VOCAB, num_items_in_batch=items)
    expected = 0.5 * z_of(logits, labels, None if items is None else int(items))
    torch.testing.assert_close((loss - plain).double(), expected, rtol=1e-5, atol=0)
    (found,) = torch.autograd.grad(loss - plain, logits)
    log_z = logits.logsumexp(-1, keepdim=True)
    counts = F.pad(labels[:, 1:] != -100, (0, 1))[..., None]
    number = int(items) if items is not None else int(counts.sum())
    formula = 2 * 0.5 * log_z * logits.softmax(-1) * counts / number
    torch.testing.assert_close(found, formula, rtol=1e-5, atol=1e-9)


def test_z_loss_takes_shifted_labels_and_no_counted_token() -> None:
    model = poise.apply(make(), "z_loss:coefficient=0.5")
    shifted = F.pad(ids_of()[:, 1:], (0, 1), value=-100)
    a = model(ids_of(), labels=ids_of()).loss
    b = model(ids_of(), labels=ids_of(), shift_labels=shifted).loss
    assert torch.equal(a, b)
    none = model(ids_of(), labels=torch.full_like(ids_of(), -100), num_items_in_batch=5).loss
    assert none.item() == 0


def test_an_evaluation_loss_is_the_cross_entropy_alone() -> None:
    model, ids = poise.apply(make(), "z_loss:coefficient=0.5"), ids_of()
    with torch.no_grad():
        assert torch.equal(model(ids, labels=ids).loss, make()(ids, labels=ids).loss)
    assert model(ids, labels=ids).loss > make()(ids, labels=ids).loss


def test_z_loss_and_cap_see_the_same_logits() -> None:
    model = poise.apply(make(), "z_loss:coefficient=1", "final_soft_cap:cap=0.5")
    out = model(ids_of(), labels=ids_of())
    assert out.logits.abs().max() <= 0.5
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids_of()[:, 1:].flatten()) + z_of(out.logits, ids_of())
    torch.testing.assert_close(out.loss.double(), expected.double(), rtol=1e-5, atol=0)


def test_readings_of_the_z_loss_are_taken_once() -> None:
    model = poise.apply(make(), "z_loss:coefficient=0.5")
    first, second = ids_of(1), ids_of(2)
    for ids in (first, second):
        model(ids, labels=ids)
    mean = (z_of(logits_of(model, first), first) + z_of(logits_of(model, second), second)) / 2
    assert model.loss_function.take() == pytest.approx(0.5 * float(mean), rel=1e-5)
    assert model.loss_function.take() is None
    model(first, labels=first, num_items_in_batch=10)
    model(second, labels=second, num_items_in_batch=10)
    total = z_of(logits_of(model, first), first, 10) + z_of(logits_of(model, second), second, 10)
    assert model.loss_function.take(steps=1) == pytest.approx(0.5 * float(total), rel=1e-5)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Counting, with a different number of ignored labels in each row."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (torch.arange(LENGTH) + index * 7) % VOCAB
        labels = ids.clone()
        labels[: index % 9] = -100
        return {"input_ids": ids, "labels": labels}


def train(tmp_path: Path, model: Any, accumulate: int, steps: int = 3, **settings: Any) -> Any:
    pytest.importorskip("accelerate")
    args = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate,
        learning_rate=settings.pop("learning_rate", 0.05),
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy=settings.pop("save_strategy", "no"),
        **settings,
    )
    trainer = transformers.Trainer(model, args, train_dataset=Rows(), callbacks=[ReportZLoss()])
    trainer.train()
    return trainer


def test_in_the_trainer_accumulated_micro_batches_equal_the_whole_batch(tmp_path: Path) -> None:
    runs = [train(tmp_path, poise.apply(make(), "z_loss:coefficient=0.1"), n) for n in (1, 4)]
    for a, b in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    logs = [[line for line in run.state.log_history if "loss" in line] for run in runs]
    assert [len(lines) for lines in logs] == [3, 3]
    for whole, parts in zip(*logs, strict=True):
        assert whole["z_loss"] == pytest.approx(parts["z_loss"], rel=1e-3)
        assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-3)
    assert logs[0][0]["loss"] - logs[0][2]["loss"] > 0.2


def test_the_trainers_log_names_the_z_loss_that_is_in_its_loss(tmp_path: Path) -> None:
    with_z = train(tmp_path, poise.apply(make(), "z_loss:coefficient=0.1"), 2, steps=1, learning_rate=0.0)
    plain = train(tmp_path, make(), 2, steps=1, learning_rate=0.0)
    (a,), (b,) = ([line for line in run.state.log_history if "loss" in line] for run in (with_z, plain))
    assert "z_loss" not in b
    assert a["z_loss"] > 0.1
    assert a["loss"] - a["z_loss"] == pytest.approx(b["loss"], abs=2e-4)


# --- initialisation --------------------------------------------------------------------------------------------------


def test_small_init_deviations() -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=3,
    )
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.fill_(1.0)
    poise.apply(model, "small_init", "gated_attention")
    small = math.sqrt(2 / (5 * 128))
    for name, p in model.named_parameters():
        if "norm" in name:
            assert bool((p == 1).all()), name
        elif p.dim() == 1:
            assert not p.any(), name
        else:
            wanted = small / 2 if "o_proj" in name or "down_proj" in name else small  # sqrt(2 N) = 2
            assert float(p.detach().std()) == pytest.approx(wanted, rel=0.04), name
    assert not model.model.embed_tokens.weight[3].any()


def test_gates_after_small_init_start_small_too() -> None:
    model = poise.apply(poise.apply(make(), "small_init"), "gated_attention")
    assert float(model.model.layers[0].self_attn.attn_gate.weight.detach().std()) == pytest.approx(
        math.sqrt(2 / 80), rel=0.25
    )
    plain = poise.apply(make(), "gated_attention")
    assert float(plain.model.layers[0].self_attn.attn_gate.weight.detach().std()) == pytest.approx(0.2, rel=0.25)


def test_layer_scale_starts_by_depth() -> None:
    for layers, value in ((18, 0.1), (19, 1e-5), (25, 1e-6)):
        layer = poise.apply(make(layers=layers), "layer_scale").model.layers[0]
        assert bool((layer.attn_layer_scale.weight == torch.tensor(value)).all())


# --- soft cap of attention logits ------------------------------------------------------------------------------------


def capped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, softcap: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention that offers a cap, as flash and flex attention do."""
    key, value = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * kwargs["scaling"]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@pytest.fixture
def capping() -> Any:
    from transformers import AttentionInterface

    AttentionInterface.register("capping_test", capped_attention)
    yield "capping_test"
    AttentionInterface._global_mapping.pop("capping_test")


def test_soft_cap_reaches_an_attention_that_offers_it(capping: str, exact: None) -> None:
    plain = make(attn_implementation=capping).double()
    torch.testing.assert_close(logits_of(plain), reference(plain, ids_of(), set()).detach(), rtol=1e-9, atol=1e-11)
    model = poise.apply(make(attn_implementation=capping).double(), "soft_cap:cap=0.5")
    found = logits_of(model)
    torch.testing.assert_close(found, reference(model, ids_of(), {"soft_cap"}).detach(), rtol=1e-9, atol=1e-11)
    assert not torch.allclose(found, logits_of(plain), rtol=1e-3)
    model.set_attn_implementation("eager")  # would ignore the cap without a word
    with pytest.raises(UserError, match="'eager' cannot"):
        model(ids_of())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_soft_cap_is_refused_where_it_would_not_act(attention: str) -> None:
    with pytest.raises(UserError, match=f"'{attention}' cannot.*flex_attention"):
        poise.apply(make(attn_implementation=attention), "soft_cap")


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_transformers_own_capping_attentions_are_accepted(attention: str) -> None:
    model = make()
    model.config._attn_implementation = attention  # flash attention is not installed here
    assert applied(poise.apply(model, "soft_cap")) == ["soft_cap:cap=50.0"]


# --- composition -----------------------------------------------------------------------------------------------------


def test_all_pairs_compose_or_conflict_by_name() -> None:
    conflicts = set()
    for i, first in enumerate(WORKING):
        for second in WORKING[i:]:
            model = make(layers=1)
            try:
                poise.apply(model, first, second)
            except Conflict as error:
                assert first in str(error) and second in str(error)
                conflicts.add((first, second))
                assert applied(model) == []
                assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
                continue
            assert all(bool(g.isfinite().all()) for g in gradients(model).values()), (first, second)
    claims = {name: METHODS[name]().slots for name in WORKING}
    expected = {(a, b) for i, a in enumerate(WORKING) for b in WORKING[i:] if set(claims[a]) & set(claims[b])}
    assert conflicts == expected | {("layer_norm_scaling", "small_init")}
    assert {("peri_ln", "sandwich_ln"), ("qk_norm", "qk_fc_norm"), ("embed_norm", "embed_scale")} <= conflicts


def test_conflicts_hold_over_several_calls_and_for_the_same_method_twice() -> None:
    model = poise.apply(make(), "qk_norm", "peri_ln")
    for again in ("qk_norm", "qk_fc_norm", "sandwich_ln", "embed_scale"):
        with pytest.raises(Conflict, match=again):
            poise.apply(model, again)
    before = logits_of(model)
    assert torch.equal(logits_of(poise.apply(model, "z_loss")), before)
    assert (
        applied(model) == model.config.poise_methods == ["qk_norm", "peri_ln:embed=true", "z_loss:coefficient=0.0001"]
    )


def test_peri_ln_without_its_embedding_norm_is_sandwich_ln() -> None:
    model, other = (
        poise.apply(make(), "peri_ln:embed=false", "embed_scale"),
        poise.apply(make(), "sandwich_ln", "embed_scale"),
    )
    assert applied(model)[0] == "peri_ln:embed=false"
    assert torch.equal(logits_of(model), logits_of(other))


def test_an_output_norm_comes_before_a_gain_whatever_the_order() -> None:
    first = poise.apply(poise.apply(make(), "layer_scale"), "sandwich_ln")
    second = poise.apply(make(), "sandwich_ln", "layer_scale")
    assert torch.equal(logits_of(first), logits_of(second))
    third = shake(poise.apply(make(), "sandwich_ln"))
    assert not torch.equal(logits_of(second), logits_of(third))


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_architectures(kind: str) -> None:
    methods = [m for m in TOGETHER.split() if kind != "Qwen3" or m != "qk_norm"]
    model = poise.apply(make(kind), *methods)
    assert all(bool(g.isfinite().all()) and bool(g.any()) for n, g in gradients(model).items() if "bias" not in n)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("value_residual", "no method 'value_residual' for transformers models; there are qk_norm, "),
        ("qk_nrom", "did you mean 'qk_norm'"),
        ("z_loss:coeficient=1", "no setting 'coeficient', did you mean 'coefficient'"),
        ("z_loss:coefficient=-1", "coefficient is -1.0"),
        ("z_loss:coefficient=much", "'much'; give a value of type float"),
        ("z_loss:coefficient", "has no value"),
        ("final_soft_cap:cap=0", "cap is 0.0"),
        ("final_soft_cap:cap=inf", "cap is inf"),
        ("embed_detach:gamma=2", "gamma is 2.0"),
        ("embed_scale:factor=0", "factor is 0.0"),
        ("layer_scale:init=nan", "init is nan"),
        ("gated_attention:score=shared", "score is 'shared'; give elementwise or headwise"),
    ],
)
def test_a_users_mistakes_are_one_line_and_change_nothing(text: str, message: str) -> None:
    model = make(layers=1)
    with pytest.raises(UserError, match=message) as error:
        poise.apply(model, "peri_ln", text)
    assert "\n" not in str(error.value)
    assert model.state_dict().keys() == make(layers=1).state_dict().keys()
    assert not hasattr(model.config, RECORD)


def test_models_of_another_kind_are_refused() -> None:
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8))
    spec = poise.PRESETS["nano"]
    wrong: list[tuple[Any, str]] = [
        (gpt2, "type 'gpt2'"),
        (make().model, "no output head"),
        (torch.nn.Linear(2, 2), "methods cannot be put on a Linear"),
        (torch.nn.Sequential(make()), "on a Sequential.*before anything wraps it"),
        (poise.build_model(spec, seed=0, device="meta"), "apply the methods to its Spec"),
        ("llama", "not a str"),
        (None, "not a NoneType"),
    ]
    with pytest.raises(UserError, match="takes the folder of a saved model, not a NoneType"):
        load_hf(None)  # type: ignore[arg-type]
    for thing, message in wrong:
        with pytest.raises(UserError, match=message):
            poise.apply(thing, "qk_norm")
    assert poise.apply(spec, "qk_norm").methods[-1:] == ("qk_norm",)
    for to in (spec, make()):
        for name in (["qk_norm"], None, 3):
            with pytest.raises(UserError, match=r"methods are names, not a \w+; write apply\(spec, \"qk_norm\""):
                poise.apply(to, name)  # type: ignore[arg-type]


def test_a_qwen3_has_qk_norm_already() -> None:
    for name in ("qk_norm", "qk_fc_norm"):
        with pytest.raises(UserError, match="'qwen3' model normalises queries and keys by itself"):
            poise.apply(make("Qwen3"), name)


def test_lora_and_quantised_projections_are_refused() -> None:
    class LoraLinear(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.weight = base, base.weight

    model = make()
    model.model.layers[1].self_attn.q_proj = LoraLinear(model.model.layers[1].self_attn.q_proj)
    with pytest.raises(UserError, match=r"layers.1.self_attn.q_proj is a LoraLinear, not a plain nn.Linear"):
        poise.apply(model, "qk_norm")
    model = make()
    packed = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.down_proj.weight = packed  # a 4-bit matrix is a subclass of nn.Linear
    with pytest.raises(UserError, match="quantised"):
        poise.apply(model, "z_loss")


def test_a_trained_model_takes_only_what_keeps_its_function() -> None:
    model = shake(make())
    before = logits_of(model)
    for name in WORKING:
        if METHODS[name].keeps_function:
            continue
        with pytest.raises(UserError, match=f"has been trained, and '{name}'"):
            poise.apply(model, name)
    poise.apply(model, "z_loss", "embed_detach")
    assert torch.equal(logits_of(model), before)
    for place in ("layers.1.input_layernorm.weight", "layers.0.self_attn.q_proj.bias"):  # frozen final norm
        model = make(attention_bias=True)
        poise.apply(copy.deepcopy(model), "qk_norm")
        with torch.no_grad():
            model.model.get_parameter(place)[0] += 0.1
        with pytest.raises(UserError, match=r"has been trained.*: poise\.load_hf"):
            poise.apply(model, "qk_norm")


@pytest.mark.parametrize(("text", "name"), [("qk_norm", "q_proj"), ("gated_attention", "o_proj")])
def test_a_method_that_lost_its_place_is_noticed(text: str, name: str) -> None:
    model = poise.apply(make(), text)
    attention = model.model.layers[2].self_attn
    swapped = torch.nn.Linear(WIDTH, WIDTH, bias=False)  # as converters to float8 do
    swapped.weight = getattr(attention, name).weight
    setattr(attention, name, swapped)
    with pytest.raises(UserError, match=f"'{name}' was replaced after poise.apply, so '{text}'"):
        model(ids_of())
    model = poise.apply(make(), "embed_scale")
    model.set_input_embeddings(torch.nn.Embedding(VOCAB, WIDTH))
    with pytest.raises(UserError, match="'embed_tokens' was replaced"):
        model(ids_of())


def test_growing_the_vocabulary_keeps_the_embedding_and_replaces_the_head() -> None:
    model = poise.apply(make(), "embed_scale")
    before = logits_of(model)
    model.resize_token_embeddings(VOCAB + 8)
    assert torch.equal(logits_of(model)[..., :VOCAB], before)
    model = poise.apply(make(), "final_soft_cap")
    model.resize_token_embeddings(VOCAB + 8)
    with pytest.raises(UserError, match="'lm_head' was replaced"):
        model(ids_of())


# --- saving, copies, caches, checkpointing, wrapping -----------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_saved_and_loaded_is_bit_equal(text: str, tmp_path: Path) -> None:
    model = shake(poise.apply(make(), text))
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    by_hand = poise.apply(transformers.LlamaForCausalLM(config), *config.poise_methods)
    by_hand.load_state_dict(model.state_dict(), strict=True)
    loaded = load_hf(tmp_path)
    assert type(loaded) is type(model)
    for other in (by_hand, loaded):
        assert torch.equal(logits_of(other), logits_of(model))
        assert applied(other) == applied(model) == other.config.poise_methods
        assert all(torch.equal(a, b) for a, b in zip(gradients(other).values(), gradients(model).values(), strict=True))


def test_loading_keeps_the_dtype_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    model = poise.apply(make(tie_word_embeddings=True).bfloat16(), "qk_norm")
    model.save_pretrained(tmp_path)
    assert load_hf(tmp_path).dtype == torch.bfloat16
    assert load_hf(tmp_path, dtype=torch.float32).model.layers[0].self_attn.q_norm.weight.dtype == torch.float32
    model.config.poise_methods = []
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"are not those of this config and its methods: .*k_norm.weight"):
        load_hf(tmp_path)
    with pytest.raises(UserError, match="no saved model"):
        load_hf(tmp_path / "nothing")


def test_the_trainer_resumes_bit_equal(tmp_path: Path) -> None:
    methods = ["qk_norm", "peri_ln", "z_loss"]
    straight = train(tmp_path / "a", poise.apply(make(), *methods), 2, steps=4)
    train(tmp_path / "b", poise.apply(make(), *methods), 2, steps=2, save_strategy="steps", save_steps=2)
    pytest.importorskip("accelerate")
    args = dataclasses.replace(straight.args, output_dir=str(tmp_path / "b"))
    resumed = transformers.Trainer(poise.apply(make(seed=8), *methods), args, train_dataset=Rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_copy_has_parts_of_its_own() -> None:
    model = poise.apply(make(), *TOGETHER.split())
    before = logits_of(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits_of(other), before)
    shake(other)
    assert not torch.equal(logits_of(other), before)
    assert torch.equal(logits_of(model), before)
    assert isinstance(other.loss_function, ZLoss) and other.loss_function is not model.loss_function


@pytest.mark.parametrize("text", ["", *FORWARD, TOGETHER])
def test_generate_with_cache_equals_without(text: str) -> None:
    model = shake(poise.apply(make(), *text.split())).eval()

    def say(cache: bool) -> Tensor:
        out: Tensor = model.generate(
            ids_of()[:, :5], max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0, eos_token_id=None
        )
        return out

    assert torch.equal(say(True), say(False))
    assert say(True).shape == (2, 11)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = poise.apply(make(), *TOGETHER.split()).train()
    before = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    if reentrant:
        model.enable_input_require_grads()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, before[name], rtol=1e-6, atol=1e-8)


def test_norms_and_gains_of_methods_in_the_trainers_decay_list(tmp_path: Path) -> None:
    model = poise.apply(make(), "qk_norm", "peri_ln", "gated_attention")
    args = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    decayed = transformers.Trainer(model, args).get_decay_parameter_names(model)
    assert not [name for name in decayed if model.get_parameter(name).dim() == 1]
    assert "model.layers.0.self_attn.attn_gate.weight" in decayed


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = make()
    methods = ["qk_norm", "peri_ln", "gated_attention", "small_init"]
    poise.apply(model, *methods)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    real = shake(poise.apply(make(), *methods))
    model.load_state_dict(real.state_dict(), strict=True, assign=True)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_sharded_afterwards_and_refused_before() -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if distributed.is_initialized():
        pytest.skip("another test holds the process group")
    plain = poise.apply(make(), *TOGETHER.split())
    before = gradients(plain)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = poise.apply(make(), *TOGETHER.split())
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient.full_tensor(), before[name], rtol=1e-6, atol=1e-8)
        with pytest.raises(UserError, match="is sharded"):
            poise.apply(model, "embed_detach")
        wrapped = torch.nn.parallel.DistributedDataParallel(poise.apply(make(), *TOGETHER.split()))
        for name, gradient in gradients(wrapped).items():
            torch.testing.assert_close(gradient, before[name.removeprefix("module.")], rtol=1e-6, atol=1e-8)
    finally:
        distributed.destroy_process_group()


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one() -> None:
    script = Path(__file__).parent / "scripts" / "hf_method_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_the_face_settings_are_pairs() -> None:
    model = apply_hf(make(), "qk_norm", ("z_loss", {"coefficient": 1e-5}))
    assert applied(model) == ["qk_norm", "z_loss:coefficient=1e-05"]
    assert apply_hf(make(), ("z_loss", {"coefficient": 1})).config.poise_methods == ["z_loss:coefficient=1"]
    with pytest.raises(UserError, match="no setting 'x'"):
        apply_hf(make(), ("qk_norm", {"x": 1}))


def test_the_example_shows_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "examples" / "hf_methods.py"
    losses = runpy.run_path(str(path))["main"]()
    assert losses["with methods, lr 0.3"] < losses["plain, lr 0.3"] - 1
    assert "loaded model is the same: True" in capsys.readouterr().out
