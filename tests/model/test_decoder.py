"""The decoder: causality, attention kernels, positions, dtypes, taps, starting values, counts."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from poise.core.errors import UserError
from poise.core.types import IGNORE
from poise.model import attention
from poise.model.build import apply, build
from poise.model.counts import count
from poise.model.layers import LayerNorm, RMSNorm
from poise.model.methods import METHODS
from poise.model.methods_page import table_markdown
from poise.model.place import Place
from poise.model.presets import PRESETS
from poise.model.spec import Part, Spec

TINY = Spec(vocab_size=61, seq_len=16, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)


def ids(rows=2, length=16, seed=0, vocab=61):
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def shaken(spec, dtype=torch.float64, seed=0):
    """A model away from its small starting values, so that every part of it matters."""
    model = build(spec, seed=seed, compute_dtype=dtype)
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(number))
            param += 0.2 * noise.to(param.dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fused", "matmul"])
def test_the_past_does_not_see_the_future(dtype):
    model = shaken(TINY, dtype)
    one, other = ids(), ids()
    other[:, 9] = (other[:, 9] + 1) % 61
    a, b = model.logits(one), model.logits(other)
    assert torch.equal(a[:, :9], b[:, :9])
    assert not torch.equal(a[:, 9], b[:, 9]) and not torch.equal(a[:, 10], b[:, 10])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_two_attention_kernels_agree(kv_heads):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, 9, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for h in (4, kv_heads, kv_heads)
    )
    results = []
    for core in (attention.matmul_attention, attention.fused_attention):
        out = core(q, k, v)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_kernel_is_chosen_by_length_dtype_and_device():
    bf16, fp32 = torch.bfloat16, torch.float32
    assert attention.use_matmul(256, bf16, "cpu") and not attention.use_matmul(1024, bf16, "cpu")
    assert not attention.use_matmul(256, fp32, "cpu") and not attention.use_matmul(256, bf16, "cuda")


def test_grouped_queries_equal_full_attention_with_repeated_keys():
    grouped = shaken(TINY)
    full = build(replace(TINY, n_kv_heads=4), seed=0, compute_dtype=torch.float64)
    state = grouped.state_dict()
    K = TINY.head_dim
    for key in [k for k in state if k.endswith("qkv.weight")]:
        q, k, v = state[key].split((4 * K, 2 * K, 2 * K))
        repeated = [x.view(2, K, -1).repeat_interleave(2, 0).flatten(0, 1) for x in (k, v)]
        state[key] = torch.cat([q, *repeated])
    full.load_state_dict(state)
    torch.testing.assert_close(full.logits(ids()), grouped.logits(ids()), rtol=1e-10, atol=1e-12)


def test_rope_depends_on_distance_only():
    rope = build(TINY, seed=0, compute_dtype=torch.float64).trunk.rope
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).double()
    turned_q, turned_k = (rope(x.expand(1, 1, 16, 8))[0, 0] for x in (q, k))
    scores_TT = turned_q @ turned_k.T
    for distance in range(16):
        same = scores_TT.diagonal(-distance)
        torch.testing.assert_close(same, same[:1].expand_as(same))
    assert (scores_TT[0] - scores_TT[0, 0]).abs()[1:].min() > 1e-6
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(16))


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_norms_equal_torch_and_pass_gradcheck(norm):
    module = norm(Place(TINY), 6).double()
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    with torch.no_grad():
        module.weight.copy_(torch.linspace(0.5, 2, 6))
    plain = F.rms_norm if norm is RMSNorm else F.layer_norm
    torch.testing.assert_close(module(x), plain(x, (6,), module.weight, eps=1e-6))
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(module, {"weight": w}, x), (x, module.weight)
    )


def test_rope_passes_gradcheck():
    rope = build(TINY, seed=0, compute_dtype=torch.float64).trunk.rope
    x = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    assert torch.autograd.gradcheck(rope, (x,))


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_bf16_is_close_to_fp32_with_fp32_masters(mlp, norm):
    spec = replace(TINY, mlp=mlp, norm=Part(norm), branch_out=Part("norm"))
    exact, rounded = build(spec, seed=0), build(spec, seed=0, compute_dtype=torch.bfloat16)
    a, b = (model(ids(), ids(seed=1)) for model in (exact, rounded))
    torch.testing.assert_close(a.ce, b.ce, rtol=5e-3, atol=0)
    a.loss.backward()
    b.loss.backward()
    for (name, p), q in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert q.dtype == q.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() < 0.05 * p.grad.norm(), name
    assert rounded.hidden(ids()).dtype == torch.bfloat16 and rounded.logits(ids()).dtype == torch.float32


def test_the_loss_equals_cross_entropy_of_the_logits():
    model = shaken(apply(TINY, "z_loss:coefficient=0.01"))
    inputs, targets = ids(), ids(seed=1)
    targets[0, :5] = IGNORE
    out = model(inputs, targets, token_loss=True)
    each = F.cross_entropy(model.logits(inputs).flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(out.token_loss.flatten(), each)
    torch.testing.assert_close(out.ce, each.sum() / 27)
    torch.testing.assert_close(out.loss.detach(), out.ce + out.parts["z_loss"])
    assert model(inputs, targets).token_loss is None


def test_sequences_longer_than_the_model_are_refused():
    with pytest.raises(UserError, match="17 tokens is longer than the model's seq_len 16"):
        build(TINY, seed=0).hidden(ids(length=17))
    with pytest.raises(UserError, match=r"compute_dtype is torch\.float16"):
        build(TINY, seed=0, compute_dtype=torch.float16)


def test_taps_are_where_the_table_says():
    model = build(TINY, seed=0)
    seen = {}
    for name, tap in model.taps().items():
        tap.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
    silent = build(TINY, seed=0)(ids(), ids(seed=1)).loss
    loud = model(ids(), ids(seed=1)).loss
    assert torch.equal(silent, loud) and seen.keys() == model.taps().keys()
    shapes = {name.removeprefix("block.1."): tuple(out.shape) for name, out in seen.items()}
    assert shapes["q"] == (2, 4, 16, 8) and shapes["k"] == shapes["v"] == (2, 2, 16, 8)
    assert shapes["mlp_hidden"] == (2, 16, 48)
    assert torch.equal(seen["block.0.residual"], seen["embed"] + seen["block.0.attn_out"] + seen["block.0.mlp_out"])
    assert torch.equal(seen["final"], model.hidden(ids()))
    page = (Path(__file__).parents[2] / "docs" / "model.md").read_text(encoding="utf-8")
    missing = [name for name in model.taps() if f"`{name.replace('.0.', '.N.').replace('.1.', '.N.')}`" not in page]
    assert not missing


def test_starting_values_follow_the_role():
    spec = replace(PRESETS["nano"], tied=False)
    model = build(spec, seed=0)
    roles = model.roles()
    shrink = {"attn_out": 1 / math.sqrt(2 * 4), "mlp_out": 1 / math.sqrt(2 * 4)}
    for name, param in model.named_parameters():
        if roles[name] == "norm":
            assert (param == 1).all()
            continue
        std = 0.02 * shrink.get(roles[name], 1.0)
        assert param.std().item() == pytest.approx(0.9866 * std, rel=0.02), name
        assert param.abs().max() <= 3 * std * (1 + 1e-6)
    assert set(roles.values()) == {"embedding", "head", "norm", "qkv", "attn_out", "mlp_in", "mlp_out"}


@pytest.mark.parametrize(
    ("part", "embedding", "qkv", "out"),
    [
        (Part("small"), 0.11180, 0.11180, 0.05590),
        (Part.of("default", {"embedding_std": 1.0}), 1.0, 0.02, 0.01),
        (Part.of("default", {"std": 0.1, "scale_residual": False}), 0.02, 0.1, 0.1),
    ],
)
def test_init_parts(part, embedding, qkv, out):
    model = build(replace(TINY, init=part, vocab_size=400), seed=0)
    block = model.trunk.blocks[0]
    for weight, std in (
        (model.embedding.weight, embedding),
        (block.attn.qkv.weight, qkv),
        (block.mlp.out.weight, out),
    ):
        assert weight.std().item() == pytest.approx(0.9866 * std, rel=0.05)


def test_starting_values_depend_on_seed_and_name_only():
    small, deep = build(TINY, seed=5), build(replace(TINY, n_layers=3, tied=False), seed=5)
    a, b = dict(small.named_parameters()), dict(deep.named_parameters())
    kept = [name for name in a if not name.endswith("out.weight")]  # those are scaled by depth
    assert all(torch.equal(a[name], b[name]) for name in kept)
    weights = [block.mlp.inner.weight for block in deep.trunk.blocks]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(a["embedding.weight"], build(TINY, seed=6).embedding.weight)


def test_hand_counts():
    # GPT: V d + N (4 d² + 2 d f + 2 d) + d
    gpt = replace(TINY, n_kv_heads=4, mlp="gelu")
    assert count(gpt).params == 61 * 32 + 2 * (4 * 32 * 32 + 2 * 32 * 48 + 2 * 32) + 32
    # Llama, untied: 2 V d + N (2 d² + 2 d G K + 3 d f + 2 d) + d
    llama = replace(TINY, tied=False)
    body = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
    counts = count(llama)
    assert (counts.params, counts.params_non_embedding) == (2 * 61 * 32 + body, body)
    matrices = body - 2 * 2 * 32 - 32 + 61 * 32
    assert counts.flops_per_token == 6 * matrices + 12 * 2 * 32 * 16
    assert count(TINY).flops_per_token == counts.flops_per_token  # a tied head multiplies just the same
    # QK-norm: one gain of the head width for queries and one for keys, a block
    assert count(apply(TINY, "qk_norm")).params - count(TINY).params == 2 * 2 * 8


@pytest.mark.parametrize("name", [None, *METHODS])
def test_counts_equal_the_built_model(name):
    spec = TINY if name is None else apply(replace(TINY, tied=False), name)
    model = build(spec, seed=0)
    assert count(spec).params == sum(p.numel() for p in model.parameters())
    assert sum(n for _, n in count(spec).by_role) == count(spec).params


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [{"mlp": "gelu", "n_kv_heads": 4}, {"mlp": "swiglu"}, {"seq_len": 640, "n_kv_heads": 4}],
    ids=["gpt", "llama", "long"],
)
def test_activation_estimate_is_near_what_autograd_keeps(changes, compute):
    spec = replace(Spec(256, 128, 3, 64, 4, 2, 192), **changes)
    model = build(spec, seed=0, compute_dtype=getattr(torch, compute))
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    data = ids(2, spec.seq_len, vocab=256)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(data, data)
    assert out.loss.requires_grad
    head = 4 * 256 * 64  # the head's gradient is counted under logits
    assert count(spec).memory(2, compute).activations == pytest.approx(sum(kept.values()) - head, rel=0.05)


def test_memory_adds_up():
    memory = count(TINY).memory(4)
    assert memory.params == memory.grads == 4 * count(TINY).params == memory.optimizer // 2
    parts = (memory.params, memory.grads, memory.optimizer, memory.activations, memory.logits)
    assert memory.total == sum(parts)
    with pytest.raises(UserError, match="batch is 0"):
        count(TINY).memory(0)


def test_a_billion_parameters_on_the_meta_device_take_no_time():
    start = time.process_time()
    model = build(PRESETS["1b"], seed=0, device="meta")
    assert time.process_time() - start < 1.0
    assert sum(p.numel() for p in model.parameters()) == count(PRESETS["1b"]).params == 1_107_363_840


def test_the_state_dict_holds_parameters_only():
    for tied in (True, False):
        model = build(replace(TINY, tied=tied), seed=0)
        assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
        assert ("head.weight" in model.state_dict()) == (not tied)


def test_embed_scale_never_touches_a_tied_head():
    plain, scaled = build(TINY, seed=0), build(apply(TINY, "embed_scale"), seed=0)
    final = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    for model in (plain, scaled):
        model.trunk.forward = lambda x: (final, None)
    assert torch.equal(plain.logits(ids(1)), scaled.logits(ids(1)))
    embeds = [m.embed_out(m.embedding(ids())) for m in (scaled, plain)]
    torch.testing.assert_close(embeds[0], math.sqrt(32) * embeds[1])


def test_the_methods_page_is_current():
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    assert page.read_text(encoding="utf-8") == table_markdown(), "run: python -m poise.model.methods > docs/methods.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler warns of is its own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_trunk_compiles_as_one_graph(dtype):
    spec = apply(TINY, *(name for name in METHODS if name != "embed_norm"))
    eager, compiled = (build(spec, seed=0, compute_dtype=dtype) for _ in range(2))
    compiled.compile_trunk()
    outs = [model(ids(), ids(seed=1)) for model in (eager, compiled)]
    for out in outs:
        out.loss.backward()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(outs[0].ce, outs[1].ce, rtol=tolerance, atol=tolerance)
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= tolerance * p.grad.norm(), name
    assert list(eager.state_dict()) == list(compiled.state_dict())
