"""The optimizer of a model: what the recipe says, with what the model's methods ask of it."""

from __future__ import annotations

from torch import Tensor, distributed

from poise.model import methods
from poise.model.decoder import Decoder
from poise.model.methods import logit_tap
from poise.optim.build import OptimConfig, build
from poise.optim.chain import Chain
from poise.optim.weights.qk_clip import MaxLogits, QKClip
from poise.optim.weights.unit_rows import UnitRows
from poise.train import mend


def optimizer_for(config: OptimConfig, model: Decoder) -> Chain:
    """Return the optimizer for ``model``, built and sharded: with the learning-rate shares of its methods, and with
    what they want done to weights after every step.

    Raises:
        UserError: methods that ask for what this optimizer does not have, or for what this model cannot do.
    """
    optimizer = build(
        config,
        model.named_parameters(),
        model.roles(),
        multipliers=model.lr_multipliers(),
        fixed_decay=model.fixed_decay,
    )
    unit = {role: dim for name in model.spec.methods for role, dim in getattr(methods.load(name), "UNIT", {}).items()}
    if unit:
        roles = model.roles()
        UnitRows([(p, unit[roles[name]]) for name, p in model.named_parameters() if roles[name] in unit]).attach(
            optimizer
        )
    if model.spec.qk_tap.name == "logit_tap":
        threshold = dict(model.spec.qk_tap.fields)["threshold"]
        QKClip(mend.qk_layers(model), _Largest(model).take, float(threshold)).attach(optimizer)
    return optimizer


class _Largest:
    """The largest logits of the step's whole batch, on all ranks the same."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        many = distributed.is_available() and distributed.is_initialized()
        self._seen = MaxLogits(distributed.group.WORLD if many else None)

    def take(self) -> dict[str, Tensor]:
        for name, largest_H in logit_tap.readings(self._model).items():
            self._seen.add(name, largest_H)
        logit_tap.reset(self._model)
        return self._seen.take()
