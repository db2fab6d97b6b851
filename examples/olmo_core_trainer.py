"""The guard in OLMo-core's trainer: one line. Needs ``pip install ai2-olmo-core``.

    python examples/olmo_core_trainer.py

A tiny transformer with random weights on made-up tokens; at step 20 a gradient becomes infinite.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from olmo_core.data import TextDataLoaderBase
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import AdamWConfig
from olmo_core.train import Duration, TrainerConfig
from olmo_core.train.callbacks import Callback, CheckpointerCallback
from olmo_core.train.train_module import TransformerTrainModuleConfig

from poise.integrations.olmo_core import GuardCallback

VOCAB, LENGTH, ROWS = 64, 32, 8


class Counting(TextDataLoaderBase):
    """Token i is followed by token i + 1."""

    total_batches = 1000

    def __init__(self, folder: str) -> None:
        super().__init__(
            collator=None, work_dir=folder, global_batch_size=ROWS * LENGTH, dp_world_size=1, dp_rank=0, fs_local_rank=0
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"batches": self.batches_processed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the position over."""
        self.batches_processed = state_dict["batches"]

    def reshuffle(self, epoch: int | None = None, **kwargs: Any) -> None:
        """Nothing is shuffled."""
        self._epoch = epoch or 1

    def get_mock_batch(self) -> dict[str, Any]:
        """Return any batch."""
        return self.batch(0)

    def batch(self, number: int) -> dict[str, Any]:
        """Return batch ``number``, (8, 32) int64."""
        return {"input_ids": (torch.arange(ROWS)[:, None] * 5 + torch.arange(LENGTH) + number * 7) % VOCAB}

    def _iter_batches(self) -> Iterator[dict[str, Any]]:
        yield from map(self.batch, range(self.batches_processed, self.total_batches))


class Poison(Callback):
    """Makes one gradient element infinite at step 20."""

    priority = 10

    def pre_optim_step(self) -> None:
        """Before the guard looks."""
        if self.step == 20:
            self.trainer.train_module.model.blocks["1"].feed_forward.w1.weight.grad[0, 0] = math.inf


def main() -> None:
    """Train 60 steps."""
    logging.basicConfig(format="%(message)s")
    torch.manual_seed(0)
    device = torch.device("cpu")
    model = TransformerConfig.llama_like(d_model=32, vocab_size=VOCAB, n_layers=2, n_heads=2).build()
    model.init_weights(device=device, max_seq_len=LENGTH)
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=ROWS * LENGTH, max_sequence_length=LENGTH, optim=AdamWConfig(lr=5e-3), max_grad_norm=1.0
    ).build(model, device=device)
    guard = GuardCallback()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainerConfig(save_folder=folder, max_duration=Duration.steps(60), no_evals=True)
        config = config.with_callback(
            "checkpointer", CheckpointerCallback(save_interval=1000, pre_train_checkpoint=False)
        )
        config = config.with_callback("poison", Poison()).with_callback("guard", guard)  # the line
        trainer = config.build(module, Counting(folder))
        trainer.fit()
        used = trainer.callbacks["guard"]
    assert isinstance(used, GuardCallback)
    print(f"skipped {used.skipped} step; all weights finite: {all(p.isfinite().all() for p in model.parameters())}")


if __name__ == "__main__":
    main()
