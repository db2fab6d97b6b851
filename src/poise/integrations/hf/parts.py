"""The modules that methods add to a transformers model, and the hooks that put them to work.

Every part is an ordinary submodule: its parameters are in ``state_dict``, moved, sharded and saved with the rest.
A part works through a hook on the module whose output (or input) it changes; names and classes of the model's own
modules stay what they are. Hooks hold modules and no closures, so a model can still be copied and pickled.

Shapes: B batch, T positions, D width, H query heads, K head width, E = H K, V vocabulary, ... any.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from poise.core.errors import UserError
from poise.integrations.hf.layout import wide


class PoiseRMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) · g`` over the last ``width`` elements, head by head where there are more.

    Statistics in at least fp32. The name is one by which transformers knows how a norm starts (gains of one).
    """

    def __init__(self, width: int, eps: float, like: Tensor) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.reshape(*x.shape[:-1], -1, len(self.weight))
        exact = wide(heads)
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return (exact.to(x.dtype) * self.weight).flatten(-2)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class Gain(nn.Module):
    """``x · g``, one learnable gain for each of ``width`` channels."""

    def __init__(self, width: int, initial: float, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), initial, dtype=like.dtype, device=like.device))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * self.weight


class Scale(nn.Module):
    """``x · factor``, a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * self.factor

    def extra_repr(self) -> str:
        return f"factor={self.factor:.6g}"


class GradientShare(nn.Module):
    """``x`` unchanged, bit for bit; its gradient times ``gamma``."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, x_BTD: Tensor) -> Tensor:
        fixed_BTD = x_BTD.detach()
        return fixed_BTD + self.gamma * (x_BTD - fixed_BTD)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}"


class SoftCap(nn.Module):
    """``cap · tanh(x / cap)``, computed in at least fp32."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, x_BTV: Tensor) -> Tensor:
        return (self.cap * torch.tanh(wide(x_BTV) / self.cap)).to(x_BTV.dtype)

    def extra_repr(self) -> str:
        return f"cap={self.cap}"


class OnOutput:
    """A forward hook: the module's output goes through ``part``."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        result: Tensor = self.part(out)
        return result


class Gating:
    """Two hooks: hear the attention's input, and multiply the input of its output matrix by a gate of it.

    Args:
        part: (B, T, D) -> gate logits, (B, T, E) or one a head, (B, T, H).
    """

    def __init__(self, part: nn.Linear) -> None:
        self.part = part
        self._heard_BTD: Tensor | None = None

    def hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the attention: keep its normed input."""
        self._heard_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def gate(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the output matrix."""
        assert self._heard_BTD is not None, "the output matrix was called outside its attention"
        heard_BTD, self._heard_BTD = self._heard_BTD, None
        mix_BTE = args[0]
        gate_BTG = torch.sigmoid(wide(self.part(heard_BTD))).to(mix_BTE.dtype)
        gated = mix_BTE.unflatten(-1, (gate_BTG.shape[-1], -1)) * gate_BTG.unsqueeze(-1)
        return (gated.flatten(-2), *args[1:])


class Capping:
    """A hook before an attention that asks its implementation to cap the logits, and refuses one that would not."""

    def __init__(self, cap: float) -> None:
        self.cap = cap
        self._asked: str | None = None

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if module.config._attn_implementation != self._asked:  # it can be changed at any time
            check_softcap(module)
            self._asked = module.config._attn_implementation
        return args, {**kwargs, "softcap": self.cap}


def check_softcap(attention: Any) -> None:
    """Raise unless the attention implementation in use takes ``softcap``.

    Raises:
        UserError: it would refuse the cap (sdpa) or ignore it (eager).
    """
    name = attention.config._attn_implementation
    eager = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    if function is None or "softcap" not in inspect.signature(function).parameters:
        raise UserError(
            f"soft_cap needs attention that can cap its logits, and '{name}' cannot; make the model with"
            " attn_implementation='flex_attention' or 'flash_attention_2', or use qk_norm"
        )


class Seats:
    """Where hooks were put; looks before each forward pass of the whole model whether they are still there.

    What swaps modules (LoRA, float8 and quantising converters, ``resize_token_embeddings`` for the head) leaves hooks
    behind without a word, and the method would be off from then on.

    Args:
        method: name of the method that puts them.
    """

    def __init__(self, method: str) -> None:
        self.method = method
        self._seats: list[tuple[nn.Module, str, str, Any]] = []

    def put(self, parent: nn.Module, name: str, part: nn.Module, *, first: bool = False) -> None:
        """Send the output of ``parent.name`` through ``part``; ``first`` is before all that sits there already."""
        hook = OnOutput(part)
        parent.get_submodule(name).register_forward_hook(hook, prepend=first)
        self._seats.append((parent, name, "_forward_hooks", hook))

    def put_before(self, parent: nn.Module, name: str, hook: Any, *, with_kwargs: bool) -> None:
        """Call ``hook`` before ``parent.name``."""
        parent.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=with_kwargs)
        self._seats.append((parent, name, "_forward_pre_hooks", hook))

    def look(self, module: nn.Module, args: Any) -> None:
        """A hook before the model's forward pass.

        Raises:
            UserError: a module that a method sat on was replaced.
        """
        if torch.compiler.is_compiling():
            return
        for parent, name, kind, hook in self._seats:
            if hook not in getattr(parent._modules[name], kind).values():
                raise UserError(
                    f"'{name}' was replaced after poise.apply, so '{self.method}' would no longer act on it;"
                    " apply the methods last, or do not replace it"
                )
