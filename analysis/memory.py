"""What a training step holds in memory, read off a step that runs on tensors without data.

The model's own code runs, forward, backward and AdamW, with tensors that have a shape, a dtype, a device and a storage
of a size, and no memory (pretend.py): a 7B model at 32768 tokens takes a minute of one core and no weights.
`LiveBytes` adds up the storages that are alive. No term is a formula of ours: a saved tensor, a recomputed block, a
temporary or a cast counts because the step makes it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_adapter.analysis.pretend import VALUES_NEEDED, without_data
from moe_adapter.errors import MoEAdapterError


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes alive at one moment of the step beside weights and optimizer states."""

    gradients: int
    activations: int  # saved for backward, passing through, or gradients of such
    logits: int  # whatever is as wide as the vocabulary: logits, their copies, the loss's own and its gradients

    @property
    def rest(self) -> int:
        return self.activations + self.logits


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of one training step on one device that holds everything.

    `frozen` and `trained` are weights (buffers count as frozen), `gradients` those of all that trains, `optimizer`
    AdamW's states. `moments` holds, for each amount of gradients that backward passes through, the moment with most
    else alive: what shards the gradients changes which of them is the fullest.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    moments: tuple[Moment, ...]

    @property
    def peak_moment(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.gradients + moment.rest)

    @property
    def peak(self) -> int:
        moment = self.peak_moment
        return self.frozen + self.trained + self.optimizer + moment.gradients + moment.rest


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators return, from when they do until the last tensor on them is gone."""

    def __init__(self, vocabulary: int | None = None):
        super().__init__()
        self.vocabulary = vocabulary
        self.now = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "logits"), 0)
        self.fullest: dict[int, Moment] = {}
        self._kinds: dict[int, str] = {}
        self._ends: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                wide = self.vocabulary is not None and tensor.dim() > 0 and tensor.shape[-1] == self.vocabulary
                self.count(tensor, "logits" if wide else "activations", again=False)
        self._note()
        return out

    def count(self, tensor: Tensor, kind: str, *, again: bool = True) -> None:
        """Count a tensor's storage as `kind`; one that is counted already moves to it, if `again`."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._kinds:
            self._ends[key] = weakref.ref(storage, partial(self._drop, key, storage.nbytes()))
        elif again:
            self.now[self._kinds[key]] -= storage.nbytes()
        else:
            return
        self._kinds[key] = kind
        self.now[kind] += storage.nbytes()

    def _drop(self, key: int, size: int, _: weakref.ref) -> None:
        self.now[self._kinds.pop(key)] -= size
        del self._ends[key]

    def _note(self) -> None:
        now = Moment(**{kind: self.now[kind] for kind in ("gradients", "activations", "logits")})
        before = self.fullest.get(now.gradients)
        if before is None or now.rest > before.rest:
            self.fullest[now.gradients] = now


def simulate_step(
    model: nn.Module, batch: Mapping[str, Tensor], *, autocast: bool = True, device: str = "cuda"
) -> StepMemory:
    """The memory of one step of AdamW on `model`, in training mode, as it is: its stage, checkpointing and loss.

    Args:
        model: on the meta device. Weights count in their own dtypes: those that train are float32 in the recipe.
        batch: what the model is called with; integers with their values, floating-point tensors on the meta device.
        autocast: whether products are in bf16 by autocast, as the recipe trains.
        device: "cuda" for the operators of an H100 with flash attention, or "cpu". Neither has to be there.

    Raises:
        MoEAdapterError: the model has data, nothing of it trains, or its forward needs values that only data give.
    """
    if any(not tensor.is_meta for tensor in model.parameters()):
        raise MoEAdapterError(
            'the model holds data; expected one on the meta device: build it in torch.device("meta").'
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise MoEAdapterError("nothing in the model trains: call set_stage(model, 1 or 2) first.")
    counter = LiveBytes(_vocabulary(model))
    try:
        with without_data(model, device), counter:
            inputs = {name: torch.empty_like(t, device="cpu") if t.is_meta else t for name, t in batch.items()}
            return _step(model, inputs, counter, torch.autocast("cpu", torch.bfloat16, enabled=autocast))
    except VALUES_NEEDED as error:
        raise MoEAdapterError(
            f"{type(model).__name__} asks for the values of a tensor ({error}), which a step without data has not: "
            "expected a forward that goes by shapes and by its integer inputs."
        ) from error


def _step(model: nn.Module, inputs: Mapping[str, Any], counter: LiveBytes, autocast: Any) -> StepMemory:
    """The second step, as the first one makes the optimizer's states after its backward."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for tensor in (*parameters, *model.buffers()):
        counter.count(tensor, "weights")
    weights = counter.now["weights"]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
        parameter.register_post_accumulate_grad_hook(lambda p: counter.count(p.grad, "gradients"))
    optimizer.step()
    optimizer.zero_grad()
    for state in tree_leaves(dict(optimizer.state)):
        if isinstance(state, Tensor):
            counter.count(state, "optimizer")
    counter.fullest.clear()
    with autocast:
        loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    return StepMemory(
        frozen=weights - sum(map(_nbytes, trained)),
        trained=sum(map(_nbytes, trained)),
        gradients=counter.now["gradients"],
        optimizer=counter.now["optimizer"],
        moments=tuple(counter.fullest.values()),
    )


def _vocabulary(model: nn.Module) -> int | None:
    """The width of the model's logits, if it says what makes them."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore
    return None if head is None else len(head.weight)


def _nbytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
