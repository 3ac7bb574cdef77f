"""Toy models with reproducible weights, and the inputs that their forward needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers.models.auto import modeling_auto

from tests.matrix.inputs import asked_for, text
from tests.matrix.shrink import toy_config

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
IMAGE_TEXT = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
MODEL_TYPES = tuple(sorted({*CAUSAL, *IMAGE_TEXT}))

MOST_PARAMETERS = 60_000_000  # beyond it a rule of the shrinker has missed a size
WEIGHT_STD, BIAS_STD, OPEN_GATE = 0.15, 0.1, 0.5


class CannotBuild(Exception):
    """The model can't be built or run at toy size; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A toy model in eval mode, and the arguments of a forward pass."""

    model: nn.Module
    inputs: dict[str, Any]

    def logits(self) -> torch.Tensor:
        """The model's logits (B, T, V); seeded, for models that draw numbers in the forward pass."""
        torch.manual_seed(0)
        return self.model(**self.inputs).logits


def build(model_type: str) -> Toy:
    """The toy model of `model_type`, of its image-text-to-text class where it has one; the same at every call.

    Raises:
        CannotBuild: its default config makes no model, or its forward pass doesn't run on any inputs known here.
    """
    with _step("config"):
        config = toy_config(model_type)
    with _step("model"):
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in _model(model_type, config).parameters())
        if size > MOST_PARAMETERS:
            raise CannotBuild(f"model: {size:,} parameters at toy size")
        torch.manual_seed(0)
        model = _model(model_type, config).eval()
    _fill(model)
    with _step("forward"), torch.no_grad():
        toy = _with_inputs(model)
        if not torch.isfinite(toy.logits()).all():
            raise CannotBuild("forward: its logits are not finite")
    return toy


@contextmanager
def _step(name: str) -> Iterator[None]:
    """Whatever a model's own code raises becomes the reason why it can't be built."""
    try:
        yield
    except CannotBuild:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise CannotBuild(f"{name}: {type(cause).__name__}: {' '.join(str(cause).split())}"[:200]) from error


def _model(model_type: str, config: Any) -> nn.Module:
    """The mapped class on its config, or on the part of it that is of the class's own kind of config."""
    model_class = getattr(tf, IMAGE_TEXT.get(model_type) or CAUSAL[model_type])
    parts = [part for part in vars(config).values() if type(part) is model_class.config_class]
    return model_class(parts[0] if parts else config)


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Weights and biases of a size that makes every part of the model heard in its logits."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D":
            module.weight.normal_(0.0, WEIGHT_STD)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(0.0, BIAS_STD)
    for parameter in model.parameters():
        if parameter.numel() == 1 and not parameter.any():  # a gate that is closed at first
            parameter.fill_(OPEN_GATE)


def _with_inputs(model: nn.Module) -> Toy:
    """The model with the least inputs that its forward pass runs on."""
    toy = Toy(model=model, inputs=text(model))
    while True:
        try:
            toy.logits()
            return toy
        except Exception as error:
            inputs = asked_for(error, model, toy.inputs)
            if inputs is None:
                raise
            toy = Toy(model=model, inputs=inputs)
