"""The bound of Spike No More: the reference's vectors, and how far above the true Jacobians it is.

    python benchmarks/bound.py --seeds 3

Part 1: the MLP's bound minus 1 in layer 1 at the paper's shapes. Part 2: small models at the start, float64, random
tokens; the smallest and largest of bound / measured over layers and seeds, "measured" being the norm of the branch's
true Jacobian over the whole sequence by power iteration (``poise.model.jacobian``; a little low until it has converged,
so the ratios are a little high). A ratio below 1 would be a bound that does not hold. The last column has the product
over the depth of the bound, and of 1 + measured (the largest over seeds).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace


def main() -> None:
    import torch

    from poise.model.bound import bound, conditions
    from poise.model.build import apply, build
    from poise.model.jacobian import branch_norms
    from poise.model.spec import Part, Spec

    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()

    print("1. bound of the MLP minus 1, layer 1 (width, MLP width, layers), init part `small`, GELU")
    print(f"   {'':<20}{'vanilla':>10}{'Scaled Embed':>14}{'Embed LN':>10}   conditions that do not hold")
    for width, d_ff, layers in ((1024, 4096, 24), (2304, 9216, 24), (5120, 20480, 40)):
        spec = Spec(50257, 2048, layers, width, width // 64, width // 64, d_ff, mlp="gelu", init=Part("small"))
        cells, said = [], []
        for methods in ((), ("embed_scale",), ("embed_norm",)):
            one = apply(spec, *methods)
            cells.append(bound(one).sublayers[1].factor)
            said.append(str(len(conditions(one))))
        shape = f"({width}, {d_ff}, {layers})"
        print(f"   {shape:<20}{cells[0]:>10.1f}{cells[1]:>14.2f}{cells[2]:>10.2f}   {', '.join(said)}")

    gelu = Spec(512, 64, 6, 128, 4, 4, 512, mlp="gelu", init=Part("small"))
    swiglu = replace(gelu, mlp="swiglu", d_ff=352, n_kv_heads=2)
    normed = Part("norm")
    arms = {
        "GELU, vanilla": gelu,
        "GELU, Scaled Embed": apply(gelu, "embed_scale"),
        "GELU, Embed LN": apply(gelu, "embed_norm"),
        "GELU, LayerNorm": replace(gelu, norm=Part("layernorm")),
        "SwiGLU GQA, vanilla": swiglu,
        "SwiGLU GQA, Scaled Embed, QK-norm": apply(swiglu, "embed_scale", "qk_norm"),
        "SwiGLU GQA, std 0.02": replace(swiglu, init=Part("default")),
        "SwiGLU, in and out norm, Embed LN": replace(apply(swiglu, "embed_norm"), branch_out=normed),
        "SwiGLU, out norm only, Embed LN": replace(
            apply(swiglu, "embed_norm"), branch_in=Part("none"), branch_out=normed
        ),
    }
    print(f"\n2. bound / measured, width 128, 6 layers, 64 tokens, {options.seeds} seeds, {options.rounds} rounds")
    print(f"   {'':<36}{'attn, lowest .. highest':>26}{'mlp, lowest .. highest':>26}{'product bound / measured':>27}")
    for name, spec in arms.items():
        ratios: dict[str, list[float]] = {"attn": [], "mlp": []}
        totals: list[float] = []
        said = bound(spec)
        for seed in range(options.seeds):
            model = build(spec, seed=seed, compute_dtype=torch.float64)
            ids = torch.randint(0, 512, (1, 64), generator=torch.Generator().manual_seed(seed))
            true = branch_norms(model, ids, rounds=options.rounds)
            for sub in said.sublayers:
                ratios[sub.branch].append(sub.factor / true[sub.layer, sub.branch])
            totals.append(sum(math.log10(1 + one) for one in true.values()))
        shown = [f"{min(ratios[branch]):.2f} .. {max(ratios[branch]):.2f}" for branch in ("attn", "mlp")]
        product = f"10^{said.log10_product:.1f} / 10^{max(totals):.1f}"
        print(f"   {name:<36}{shown[0]:>26}{shown[1]:>26}{product:>27}")


if __name__ == "__main__":
    main()
