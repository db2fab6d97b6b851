#!/bin/sh
# LR sensitivity and first diverging rate of 19 arms on the proxy (0.45M parameters, 6 blocks), 3 seeds: 399 runs,
# about 45 minutes on two cores. Then two arms on a wider grid with three other seeds, 54 runs, about 8 minutes.
#
#     sh benchmarks/lr_sensitivity.sh FOLDER
#
# The hypothesis is declared in FOLDER/*/study.toml before the first run. Started again, it goes on where it was.
set -eu
cd "${1:?give a folder for the studies}"
RECOMMENDED='recommended=wesar+peri_ln+qk_norm+z_loss+layer_scale'
poise study lr-sensitivity --size proxy --lrs 3e-4:3e-1:7 --seeds 3 --out lr-sensitivity --cache cells \
  --methods "baseline,$RECOMMENDED,norms=peri_ln+qk_norm+z_loss" \
  --methods 'qk_norm,qk_norm+soft_cap,qkv_norm,qk_fc_norm,soft_cap,soft_temp,sigma_reparam,layer_scale,peri_ln' \
  --methods 'olmo2=olmo2_norm+qk_norm:over=width,layer_norm_scaling,mix_ln,gated_attention,embed_scale,embed_norm,wesar' \
  --hypothesis 'recommended has at most 1/5 of the LR sensitivity of baseline, diverges first at a rate at least 10 times as high, and its best loss is no worse; of the others, those that bound attention logits (qk_norm, qkv_norm, soft_cap) diverge later than baseline, in the order of Rybakov et al. 2024'
poise study lr-sensitivity --size proxy --lrs 3e-4:3:9 --seeds 3,4,5 --out lr-sensitivity-wide --cache cells \
  --methods "baseline,$RECOMMENDED" \
  --hypothesis 'on seeds that had no part in choosing it, recommended has at most 1/5 of the LR sensitivity of baseline, diverges first at a rate at least 10 times as high, and its best loss is no worse; over four decades of rates its advantage is not a shift of the curve'
