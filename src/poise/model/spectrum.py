"""Two monitors of weights: the eigen-spectrum of every head's query-key matrix, and the variability of embeddings.

Bao, Hataya and Karakida 2024 (LocATER, arXiv 2402.02098): with W_Q, W_K (D, K) the matrices of a head and
M = W_Q W_Kᵀ (D, D), attention is local, neither uniform nor peaked, when the eigenvalues of M have a mean
μ₁ = tr(M) / D that is not zero and a small scale μ₂ = tr(M²) / D; their variance is μ₂ − μ₁². No (D, D) matrix is
made: with A = W_Kᵀ W_Q (K, K),

    tr(M) = tr(A)      tr(M²) = Σ_ij A_ij A_ji      ‖M‖_F² = Σ_ij (W_Qᵀ W_Q)_ij (W_Kᵀ W_K)_ij

M is not symmetric, so eigenvalues are complex and tr(M²) may be negative; ‖M‖_F² ≥ |tr(M²)|. M is without 1 / √K, the
rotation of RoPE, norms of queries and keys, and the gain of the norm before: the plain weights. Grouped-query
attention: a query head goes with the key head it shares.

Chung et al. 2024 (arXiv 2409.07787), TEV, the token embedding variability: standard deviation of each token's embedding
over its components, as mean and standard deviation over the vocabulary. A low and steady mean goes with stable
training. The paper's normalisation was not seen; both deviations are the unbiased ones (**our interpretation**).

All of it is computed in at least fp32, autocast or not. Sharded weights (DTensor) are put together first, so that under
FSDP2 every rank has to call. Shapes: D width, H query heads, G key heads, R = H / G, K head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.core.errors import UserError
from poise.model.decoder import Decoder


@dataclass(frozen=True, slots=True)
class QKSpectrum:
    """Of the query-key matrix M of every head of a layer; tensors (H,), at least fp32, on the weights' device.

    Attributes:
        mean: μ₁ = tr(M) / D, the mean of the D eigenvalues.
        scale: μ₂ = tr(M²) / D, the mean of their squares.
        frobenius: ‖M‖_F².
    """

    mean: Tensor
    scale: Tensor
    frobenius: Tensor

    @property
    def variance(self) -> Tensor:
        """μ₂ − μ₁² of the eigenvalues; negative where they are mostly imaginary."""
        return self.scale - self.mean.square()


@dataclass(frozen=True, slots=True)
class TEV:
    """Token embedding variability over the vocabulary; 0-dim tensors."""

    mean: Tensor
    std: Tensor


def qk_spectrum(wq_HKD: Tensor, wk_GKD: Tensor) -> QKSpectrum:
    """Return the spectrum of every query head's M. Differentiable; cost O(H D K²).

    Args:
        wq_HKD: query weights of each head as torch keeps them, rows are outputs.
        wk_GKD: key weights; query head h uses key head h // (H / G).

    Raises:
        UserError: shapes that do not go together.
    """
    if wq_HKD.dim() != 3 or wk_GKD.shape[1:] != wq_HKD.shape[1:] or wq_HKD.shape[0] % wk_GKD.shape[0]:
        raise UserError(
            f"query weights {tuple(wq_HKD.shape)} and key weights {tuple(wk_GKD.shape)} do not go together; give "
            "(heads, head width, width) and (key heads, head width, width), with heads a multiple of key heads"
        )
    H, K, D = wq_HKD.shape
    G = wk_GKD.shape[0]
    with torch.autocast(wq_HKD.device.type, enabled=False):
        q_GRKD = _whole(wq_HKD).reshape(G, H // G, K, D)
        k_G1KD = _whole(wk_GKD).reshape(G, 1, K, D)
        a_GRKK = k_G1KD @ q_GRKD.mT
        scale = (a_GRKK * a_GRKK.mT).sum((-1, -2))
        frobenius = ((q_GRKD @ q_GRKD.mT) * (k_G1KD @ k_G1KD.mT)).sum((-1, -2))
        mean = a_GRKK.diagonal(dim1=-2, dim2=-1).sum(-1)
    return QKSpectrum(mean.flatten() / D, scale.flatten() / D, frobenius.flatten())


def token_embedding_variability(weight_VD: Tensor, *, factor: float = 1.0) -> TEV:
    """Return TEV of a (V, D) embedding.

    Args:
        weight_VD: one row a token; the order of rows does not matter.
        factor: what the lookup is multiplied by (Scaled Embed: sqrt(D)), to compare models with and without.

    Raises:
        UserError: not a matrix of at least two rows and two columns.
    """
    if weight_VD.dim() != 2 or min(weight_VD.shape) < 2:
        raise UserError(f"the embedding has shape {tuple(weight_VD.shape)}; give (vocabulary, width), each at least 2")
    spread_V = _whole(weight_VD).std(-1) * factor
    return TEV(spread_V.mean(), spread_V.std())


def decoder_spectra(model: Decoder) -> dict[int, QKSpectrum]:
    """Return the spectrum of every block by its 0-based number, of the weights as they act (``effective_weight``).

    Raises:
        UserError: something else than a decoder of poise.
    """
    if not hasattr(model, "trunk"):  # a compiled decoder is of another class
        raise UserError(f"the spectrum is read from a Decoder, not a {type(model).__name__}; make one with build_model")
    found: dict[int, QKSpectrum] = {}
    for number, block in enumerate(model.trunk.blocks):
        attn: Any = block.attn
        # Only query and key rows are put together in fp32, and before they are cut: a shard knows no heads.
        weight_OD = _full(attn.qkv.effective_weight())
        heads, kv_heads, K = attn.n_heads, attn.n_kv_heads, attn.head_dim
        wq_OD, wk_OD, _ = weight_OD.split((heads * K, kv_heads * K, kv_heads * K))
        found[number] = qk_spectrum(wq_OD.unflatten(0, (heads, K)), wk_OD.unflatten(0, (kv_heads, K)))
    return found


@torch.no_grad()
def spectrum_readings(model: Decoder) -> dict[str, Tensor]:
    """Return the monitors of a decoder as 0-dim tensors by the guard's kind of name; nothing waits for the device.

    ``qk_mean@block.N``, ``qk_scale@block.N``, ``qk_variance@block.N`` and ``qk_frobenius@block.N`` are means over
    heads; ``tev_mean`` and ``tev_std`` are of the embedding table.

    Raises:
        UserError: something else than a decoder of poise.
    """
    out: dict[str, Tensor] = {}
    for number, spectrum in decoder_spectra(model).items():
        for name in ("mean", "scale", "variance", "frobenius"):
            out[f"qk_{name}@block.{number}"] = getattr(spectrum, name).mean()
    tev = token_embedding_variability(model.embedding.weight)
    return out | {"tev_mean": tev.mean, "tev_std": tev.std}


def _full(x: Tensor) -> Tensor:
    """The whole of a sharded tensor; another one as it is."""
    whole: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return whole


def _whole(x: Tensor) -> Tensor:
    return _full(x).to(torch.promote_types(x.dtype, torch.float32))
