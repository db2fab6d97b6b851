"""The bound of Spike No More: the published vectors, and the true Jacobians of small models below it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from poise.core.errors import UserError
from poise.model.bound import bound, conditions, mlp_factor, unjudged
from poise.model.build import apply, build
from poise.model.jacobian import branch_norms
from poise.model.spec import Part, Spec

TINY = Spec(vocab_size=64, seq_len=24, n_layers=2, d_model=64, n_heads=4, n_kv_heads=4, d_ff=160, init=Part("small"))


def paper(width: int, d_ff: int, layers: int) -> Spec:
    return Spec(100, 2048, layers, width, width // 64, width // 64, d_ff, mlp="gelu", init=Part("small"))


@pytest.mark.parametrize(
    ("shape", "vanilla", "scaled", "normed"),
    [
        ((1024, 4096, 24), "26.3", "0.82", "0.52"),
        ((2304, 9216, 24), "39.4", "0.82", "0.52"),
        ((5120, 20480, 40), "45.5", "0.64", "0.40"),
    ],
)
def test_vectors_of_the_reference(shape: tuple[int, int, int], vanilla: str, scaled: str, normed: str) -> None:
    spec = replace(paper(*shape), n_layers=shape[2])

    def first(*methods: str) -> float:
        return bound(apply(spec, *methods)).sublayers[1].factor

    assert f"{first():.1f}" == vanilla
    assert (f"{first('embed_scale'):.2f}", f"{first('embed_norm'):.2f}") == (scaled, normed)
    width, d_ff, layers = shape
    std = math.sqrt(2 / (5 * width))
    assert math.isclose(first(), mlp_factor(width, d_ff, std, std / math.sqrt(2 * layers), std), rel_tol=1e-5)


# -- true Jacobians ---------------------------------------------------------------------------------------------


def ratios(spec: Spec, seed: int = 0) -> dict[str, float]:
    """Measured over bound, minus 1 each, of every branch that has a bound."""
    model = build(spec, seed=seed, compute_dtype=torch.float64)
    ids = torch.randint(0, spec.vocab_size, (1, spec.seq_len), generator=torch.Generator().manual_seed(seed))
    true = branch_norms(model, ids, rounds=8)
    return {f"{sub.layer}.{sub.branch}": true[sub.layer, sub.branch] / sub.factor for sub in bound(spec).sublayers}


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("methods", [(), ("embed_scale",), ("qk_norm", "embed_norm")])
def test_true_jacobians_of_pre_ln_stay_below(mlp: str, methods: tuple[str, ...]) -> None:
    spec = apply(replace(TINY, mlp=mlp, n_kv_heads=2 if mlp == "swiglu" else 4), *methods)
    for name, share in ratios(spec).items():
        assert 0.01 < share <= 1.0, (name, share)


def test_layer_norm_and_other_scales() -> None:
    spec = replace(TINY, norm=Part("layernorm"), init=Part.of("default", {"std": 0.1, "embedding_std": 0.5}))
    assert all(0.01 < share <= 1.0 for share in ratios(spec, seed=3).values())


@pytest.mark.parametrize("method", ["sigma_reparam", "u_mup", "layer_scale", "sub_ln", "olmo2_norm"])
def test_methods_that_change_sizes(method: str) -> None:
    found = ratios(apply(replace(TINY, tied=False), method))
    assert all(0.005 < share <= 1.0 for share in found.values()), found


def test_a_method_that_is_not_covered_leaves_the_rest_on_the_safe_side() -> None:
    model = apply(TINY, "gated_attention")
    subs, plain = bound(model).sublayers, bound(TINY).sublayers
    assert [math.isnan(sub.factor) for sub in subs] == [True, False, True, False]
    assert bound(model).reasons == ("not covered: slot 'attn_gate' holds 'gated_attention'",)
    assert [sub.factor for sub in subs[1::2]] == [sub.factor for sub in plain[1::2]]


@pytest.mark.parametrize("branch_in", ["norm", "none"])
def test_a_norm_on_the_output_of_a_branch(branch_in: str) -> None:
    spec = replace(TINY, branch_in=Part(branch_in), branch_out=Part("norm"), embed_out=Part("embed_norm"))
    subs = bound(spec).sublayers
    assert [sub.branch_std for sub in subs] == pytest.approx([1.0] * 4, rel=1e-6)
    assert [sub.stream_std for sub in subs] == pytest.approx([1, 2**0.5, 3**0.5, 2], rel=1e-6)
    assert all(0.005 < share <= 1.0 for share in ratios(spec).values())
    assert all(math.isnan(sub.condition) for sub in subs) and conditions(spec) == []


def test_the_stream_grows_as_measured() -> None:
    spec = replace(apply(TINY, "embed_scale"), n_layers=6, residual_init=Part("plain"))
    model = build(spec, seed=0, compute_dtype=torch.float64)
    kept: list[float] = []
    hooks = [
        model.taps()[f"block.{n}.residual"].register_forward_hook(
            lambda m, a, out: kept.append(float(out.detach().std()))
        )
        for n in range(6)
    ]
    assert hooks
    ids = torch.arange(48).reshape(48, 1)  # one token a sequence: attention sees that token only
    model.hidden(ids)
    predicted = [sub.stream_std for sub in bound(spec, keys=1).sublayers[2::2]]
    assert kept[:-1] == pytest.approx(predicted, rel=0.1) and kept[-1] > 1.5 * kept[0]
    assert all(late.stream_std <= std for late, std in zip(bound(spec).sublayers[2::2], predicted, strict=True))


# -- conditions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 6, 24])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_conditions_tell_vanilla_from_its_mends(layers: int, mlp: str) -> None:
    spec = Spec(100, 64, layers, 256, 4, 4, 1024 if mlp == "gelu" else 704, mlp=mlp, init=Part("small"))
    said = conditions(spec)
    assert len(said) == 2 and said[0].startswith("attn of layer 1") and "embed_scale" in said[1]
    for mend in ("embed_scale", "embed_norm"):
        assert conditions(apply(spec, mend)) == []
    assert conditions(replace(spec, init=Part.of("default", {"embedding_std": 1.0}))) == []


def test_large_sub_layers_have_another_mend() -> None:
    spec = replace(apply(paper(1024, 4096, 24), "embed_scale"), residual_init=Part("plain"))
    (said,) = conditions(spec)
    assert said.startswith("mlp of layer 1") and "scaled_init" in said and "24 layers" in said


def test_what_is_not_covered_says_so() -> None:
    class Normalised(torch.nn.Module):
        def forward(self, x: Tensor, branch: Tensor) -> Tensor:
            return torch.nn.functional.rms_norm(x + branch, x.shape[-1:])

    from poise.model import bound as module

    spec = replace(TINY, linear=Part("another"))
    assert all(math.isnan(sub.factor) for sub in bound(spec).sublayers)
    assert bound(spec).reasons[0] == "not covered: slot 'linear' holds 'another'"
    assert math.isnan(bound(spec).log10_product) and conditions(spec) == []
    with pytest.MonkeyPatch.context() as patch:
        real = module._module
        patch.setattr(module, "_module", lambda s, slot, p: Normalised() if slot == "residual" else real(s, slot, p))
        module._slots.cache_clear()
        post = bound(replace(TINY, rope_theta=9.0))
    module._slots.cache_clear()
    assert len(post.reasons) == 1 and post.reasons[0].startswith("Post-LN")
    assert post.sublayers[1].stream_std == pytest.approx(1.0, rel=1e-3) and conditions(TINY)


def test_keys_below_one() -> None:
    with pytest.raises(UserError, match="keys is 0"):
        bound(TINY, keys=0)


def test_what_is_not_judged_is_said_once_a_reason() -> None:
    assert unjudged(TINY) == []
    (said,) = unjudged(apply(TINY, "peri_ln"))
    assert said.startswith(
        "attention of 2 layers and MLP of 2 layers are not judged: the conditions are those of Pre-LN"
    )
    (said,) = unjudged(apply(TINY, "gated_attention"))
    assert said == "attention of 2 layers is not judged: not covered: slot 'attn_gate' holds 'gated_attention'"
    deep = apply(replace(TINY, n_layers=8), "mix_ln")
    judged = sum(not math.isnan(sub.condition) for sub in bound(deep).sublayers)
    (said,) = unjudged(deep)
    assert judged == 12 and said.startswith("attention of 2 layers and MLP of 2 layers are not judged: Post-LN")


@pytest.mark.parametrize("asked", [bound, conditions, unjudged])
def test_a_name_is_no_spec(asked: Any) -> None:
    with pytest.raises(UserError, match="not of a str"):
        asked("30m")
