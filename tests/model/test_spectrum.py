"""The monitors of weights against plain float64 eigenvalues and standard deviations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed
from torch.distributed.fsdp import fully_shard

from poise.core.errors import UserError
from poise.model.build import build
from poise.model.spec import Spec
from poise.model.spectrum import decoder_spectra, qk_spectrum, spectrum_readings, token_embedding_variability

SPEC = Spec(vocab_size=61, seq_len=16, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)


def weights(H: int, G: int, K: int, D: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, K, D, generator=generator, dtype=torch.float64) for n in (H, G))  # type: ignore[return-value]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(5, 12), st.integers(0, 99))
def test_spectrum_equals_the_explicit_matrix(G: int, R: int, K: int, D: int, seed: int) -> None:
    wq, wk = weights(G * R, G, K, D, seed)
    found = qk_spectrum(wq, wk)
    for head in range(G * R):
        matrix = (wq[head].T @ wk[head // R]).numpy()
        eigen = np.linalg.eigvals(matrix)
        assert abs(eigen.mean().imag) < 1e-9
        np.testing.assert_allclose(float(found.mean[head]), eigen.mean().real, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(float(found.scale[head]), (eigen**2).mean().real, rtol=1e-9, atol=1e-9)
        variance = ((eigen - eigen.mean()) ** 2).mean().real
        np.testing.assert_allclose(float(found.variance[head]), variance, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(float(found.frobenius[head]), np.linalg.norm(matrix) ** 2, rtol=1e-9)
    assert bool((found.frobenius >= D * found.scale.abs() - 1e-9).all())


def test_gradient_of_the_spectrum() -> None:
    wq, wk = (w.requires_grad_() for w in weights(2, 1, 3, 5, 0))
    for name in ("mean", "scale", "frobenius", "variance"):
        assert torch.autograd.gradcheck(lambda q, k, name=name: getattr(qk_spectrum(q, k), name), (wq, wk))


def test_low_precision_weights_are_read_in_fp32_even_under_autocast() -> None:
    wq, wk = (w.bfloat16() for w in weights(4, 2, 8, 32, 1))
    with torch.autocast("cpu", torch.bfloat16):
        found = qk_spectrum(wq, wk)
    exact = qk_spectrum(wq.double(), wk.double())
    assert found.mean.dtype == torch.float32 and exact.mean.dtype == torch.float64
    for name in ("mean", "scale", "frobenius"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-5)


def test_decoder_takes_the_weight_that_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(SPEC, seed=0)
    qkv = model.trunk.blocks[1].attn.qkv
    weight = qkv.weight.detach().double()
    found = decoder_spectra(model)
    assert list(found) == [0, 1] and found[1].mean.shape == (4,)
    for head in range(4):
        wq, wk = weight[8 * head : 8 * head + 8], weight[32 + 8 * (head // 2) :][:8]
        eigen = torch.linalg.eigvals(wq.T @ wk)
        torch.testing.assert_close(found[1].mean[head].double(), eigen.mean().real, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found[1].scale[head].double(), eigen.square().mean().real, rtol=1e-4, atol=1e-9)
    before = spectrum_readings(model)
    monkeypatch.setattr(qkv, "effective_weight", lambda: 3 * qkv.weight)
    after = spectrum_readings(model)
    torch.testing.assert_close(after["qk_mean@block.1"], 9 * before["qk_mean@block.1"])
    torch.testing.assert_close(after["qk_scale@block.1"], 81 * before["qk_scale@block.1"])
    assert torch.equal(after["qk_frobenius@block.0"], before["qk_frobenius@block.0"])
    assert not any(value.requires_grad or value.dim() for value in after.values())


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 40), st.integers(2, 30), st.floats(0.01, 3.0), st.integers(0, 99))
def test_variability_equals_numpy_and_ignores_the_order_of_tokens(V: int, D: int, s: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(V, D, generator=generator, dtype=torch.float64) * s + 0.3
    found = token_embedding_variability(table)
    rows = table.numpy().std(1, ddof=1)
    np.testing.assert_allclose([float(found.mean), float(found.std)], [rows.mean(), rows.std(ddof=1)], rtol=1e-10)
    mixed = token_embedding_variability(table[torch.randperm(V, generator=generator)])
    torch.testing.assert_close((mixed.mean, mixed.std), (found.mean, found.std), rtol=1e-12, atol=0)
    torch.testing.assert_close(token_embedding_variability(table, factor=2.0).mean, 2 * found.mean)


def test_variability_of_normal_rows_is_their_deviation() -> None:
    table = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    found = token_embedding_variability(table)
    assert float(found.mean) == pytest.approx(0.02, rel=5e-3)
    assert float(found.std) == pytest.approx(0.02 / 512**0.5, rel=0.1)
    assert float(token_embedding_variability(table.bfloat16()).mean) == pytest.approx(float(found.mean), rel=1e-3)


def test_shapes_that_do_not_fit() -> None:
    wq, wk = weights(3, 2, 4, 8, 0)
    with pytest.raises(UserError, match="multiple of key heads"):
        qk_spectrum(wq, wk)
    with pytest.raises(UserError, match="vocabulary"):
        token_embedding_variability(wq)


def test_sharded_weights_are_put_together(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, plain = build(SPEC, seed=0), build(SPEC, seed=0)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        for block in model.trunk.blocks:
            fully_shard(block)
        fully_shard(model)
        assert hasattr(model.embedding.weight, "full_tensor")
        found, expected = spectrum_readings(model), spectrum_readings(plain)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert not any(hasattr(value, "full_tensor") for value in found.values())
    finally:
        distributed.destroy_process_group()


def test_another_module_has_no_spectrum() -> None:
    with pytest.raises(UserError, match="from a Decoder, not a Linear"):
        spectrum_readings(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
