"""The guard in Hugging Face ``Trainer``: one line. Needs ``pip install transformers accelerate``.

    python examples/hf_trainer.py

A tiny Llama with random weights on made-up tokens; at step 20 a gradient becomes NaN.
"""

from __future__ import annotations

import logging
import math
import tempfile
from typing import Any

import torch
import transformers

from poise.integrations.hf_trainer import GuardCallback

VOCAB, LENGTH = 64, 32


class Counting(torch.utils.data.Dataset):
    """Token i is followed by token i + 1."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(LENGTH) + 7 * index) % VOCAB
        return {"input_ids": ids, "labels": ids}


class Poison(transformers.TrainerCallback):
    """Makes one gradient element NaN at step 20."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        """Arrange it."""
        if state.global_step == 20:

            def spoil(parameter: torch.Tensor) -> None:
                parameter.grad[0, 0] = math.nan
                hook.remove()

            hook = model.lm_head.weight.register_post_accumulate_grad_hook(spoil)


def main() -> None:
    """Train 60 steps."""
    logging.basicConfig(format="%(message)s")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder,
            max_steps=60,
            learning_rate=5e-3,
            logging_steps=10,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, args, train_dataset=Counting())
        trainer.add_callback(Poison())
        guard = GuardCallback()
        trainer.add_callback(guard)  # the line
        trainer.train()
    print(f"skipped {guard.skipped} step; all weights finite: {all(p.isfinite().all() for p in model.parameters())}")


if __name__ == "__main__":
    main()
