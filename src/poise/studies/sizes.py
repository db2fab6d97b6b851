"""Named sizes of a study's runs: recipes without a name of a method in them.

Adam with linear warm-up and a cosine to 1 % of the peak, clipping at 1, decay independent of the learning rate and an
untied head follow the small-scale proxies of Wortsman et al. 2024 (arXiv 2309.14322); lengths are far shorter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from poise.core import config as configs
from poise.core.errors import UserError, nearest
from poise.train.recipe import Recipe

_COMMON: Final[Mapping[str, Any]] = {
    "model": {"tied": False, "methods": []},
    "data": {"source": "stdlib"},
    "optim": {
        "lr": 1e-2,
        "weight_decay": 1e-4,
        "decay": "independent",
        "clip": "global_norm",
        "clip_norm": 1.0,
        "schedule": {"kind": "cosine", "final_fraction": 0.01},
    },
    "guard": {"enabled": False},
    "train": {"compile": "off", "dtype": "fp32", "eval_every": 0},
}

SIZES: Final[Mapping[str, Mapping[str, Any]]] = {
    "tiny": {  # about a second
        "model": {"n_layers": 2, "d_model": 32, "n_heads": 2},
        "data": {"vocab_size": 512},
        "optim": {"schedule": {"warmup_steps": 10}},
        "train": {"steps": 100, "batch_size": 8, "seq_len": 32, "eval_batches": 8},
    },
    "proxy": {  # 0.4M parameters, about ten seconds; six blocks, so that methods about depth can act
        "model": {"n_layers": 6, "d_model": 64, "n_heads": 2},
        "data": {"vocab_size": 1024},
        "optim": {"schedule": {"warmup_steps": 30}},
        "train": {"steps": 300, "batch_size": 8, "seq_len": 64, "eval_batches": 32},
    },
    "1m": {  # about a minute
        "model": {"n_layers": 6, "d_model": 96, "n_heads": 3},
        "data": {"vocab_size": 2048},
        "optim": {"schedule": {"warmup_steps": 60}},
        "train": {"steps": 600, "batch_size": 8, "seq_len": 128, "eval_every": 200, "eval_batches": 16},
    },
    "10m": {
        "model": {"n_layers": 8, "d_model": 320, "n_heads": 5},
        "data": {"vocab_size": 4096},
        "optim": {"schedule": {"warmup_steps": 100}},
        "train": {"steps": 1000, "batch_size": 16, "seq_len": 256, "eval_every": 250, "eval_batches": 16},
    },
}


def recipe(name: str, over: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe of a size, with a nested dict of values laid on top.

    >>> recipe("1m").model.n_layers
    6

    Raises:
        UserError: there is no such size, an unknown key, or a value that cannot be.
    """
    if name not in SIZES:
        raise UserError(f"no size '{name}'{nearest(name, SIZES)}; there are {', '.join(SIZES)}")
    values = configs.merge({"name": name, **_COMMON}, SIZES[name])
    return configs.build(Recipe, configs.merge(values, over or {}))
