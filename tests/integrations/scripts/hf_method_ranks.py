"""One rank of two: a transformers model with methods, sharded or copied, has the gradients of one process."""

from __future__ import annotations

import torch
import transformers
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import poise

METHODS = (
    "qk_norm",
    "sandwich_ln",
    "layer_norm_scaling",
    "embed_norm",
    "gated_attention",
    "final_soft_cap",
    "z_loss:coefficient=0.1",
)


def make() -> transformers.LlamaForCausalLM:
    """Return the same model on every rank."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return poise.apply(transformers.LlamaForCausalLM(config), *METHODS)


def gradients(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return all gradients in full, by name."""
    model(ids, labels=ids).loss.backward()
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def main() -> None:
    """Compare; an assertion that fails ends the rank with an error."""
    ids = torch.randint(32, (4, 12), generator=torch.Generator().manual_seed(1))
    alone = gradients(make(), ids)
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    mine = ids.chunk(world)[rank]
    sharded = make()
    mesh = init_device_mesh("cpu", (world,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    copied = torch.nn.parallel.DistributedDataParallel(make())
    for model in (sharded, copied):
        for name, gradient in gradients(model, mine).items():
            torch.testing.assert_close(gradient, alone[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
