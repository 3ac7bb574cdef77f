"""Named adapters on one base, in peft's verbs: one for each hospital, say.

One adapter answers at a time. The layers of the others are kept whole outside the model, so that switching moves no
weight, and an adapter answers to the bit as if it alone had been loaded. `static_only(model)` is peft's
`disable_adapter`; `save_adapter` saves the active one.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from moe_adapter.card import write_card
from moe_adapter.directory import as_folder
from moe_adapter.errors import MoEAdapterError
from moe_adapter.files import load_named, save_adapter
from moe_adapter.hub import download, upload
from moe_adapter.injection import STATE, Injection, attach, detach
from moe_adapter.lora import active_loras, is_peft_model, switch_lora
from moe_adapter.lora_files import DEFAULT
from moe_adapter.merge import merge_adapters
from moe_adapter.sharding import has_spread, is_main_process, together
from moe_adapter.stages import set_stage
from moe_adapter.surgery import NAMED, unwrapped

__all__ = [
    "active_adapter",
    "adapter_names",
    "add_adapter",
    "delete_adapter",
    "from_pretrained",
    "merge_adapters",
    "push_to_hub",
    "set_adapter",
    "write_card",
]


def add_adapter(model: nn.Module, path: str | os.PathLike, name: str) -> nn.Module:
    """Load the adapter of a directory beside those that the model has, and make it the active one.

    A model that was injected or loaded without a name has the adapter "default". Returns the model, a PeftModel once
    an adapter holds a LoRA; go on with what it returns.

    Raises:
        MoEAdapterError: the name is taken, or as for `load_adapter`; the model stays as it was.
    """
    owner, adapters = _named(model)
    if not isinstance(name, str) or not name or "." in name:
        raise MoEAdapterError(
            f"got the adapter name {name!r}, expected text without dots, which peft can't hold: name it anew."
        )
    if name in adapters:
        raise MoEAdapterError(
            f"the model has an adapter {name!r} already, beside {sorted(set(adapters) - {name})}: choose another name, "
            f"or delete_adapter(model, {name!r}) first."
        )
    folder = as_folder(path)
    with _without_adapter(model):
        model = load_named(model, folder, name)
    adapters[name] = getattr(owner, STATE)
    return model


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make an adapter the active one, trainable as after `load_adapter`; None for the base model as it was.

    That is with a LoRA of its own, where one answered before the first adapter came.

    Raises:
        MoEAdapterError: no adapter of that name, the model is not the PeftModel that the adapters' LoRAs are in, or it
            is in `static_only`.
    """
    owner, adapters = _named(model)
    injection = None if name is None else _known(adapters, name)
    if STATE in vars(owner):
        detach(model)
    if injection is not None:
        _put_back(model, injection)
        set_stage(model, 2 if injection.loras else 1)


def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Forget an adapter, and the LoRA that came with it; where it was the active one, the base answers.

    Returns the model, which is no PeftModel any more once its last LoRA is gone.

    Raises:
        MoEAdapterError: as for `set_adapter`.
    """
    owner, adapters = _named(model)
    injection = _known(adapters, name)
    if vars(owner).get(STATE) is injection:
        detach(model)
    del adapters[name]
    for lora in set(injection.loras) - set(injection.own_loras):
        model = _forget_lora(model, lora)
    return model


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter that answers; None where the base does.

    Raises:
        MoEAdapterError: the model is wrapped for training, or not the PeftModel that the adapters' LoRAs are in.
    """
    owner, adapters = _named(model)
    active = vars(owner).get(STATE)
    return next((name for name, injection in adapters.items() if injection is active), None)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, in the order in which they came.

    Raises:
        MoEAdapterError: as for `active_adapter`.
    """
    return list(_named(model)[1])


def from_pretrained(
    model: nn.Module,
    source: str | os.PathLike,
    name: str = DEFAULT,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> nn.Module:
    """`add_adapter` from a directory or from a repository of the Hugging Face Hub.

    Raises:
        MoEAdapterError: `source` is neither, or as for `add_adapter`.
    """
    if not as_folder(source).is_dir():
        source = download(str(source), revision=revision, token=token, cache_dir=cache_dir)
    return add_adapter(model, source, name)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    **card: Any,
) -> str | None:
    """Upload the active adapter and its model card to the Hugging Face Hub; returns the URL of the commit.

    In a distributed run every rank calls, as for `save_adapter`; rank 0 uploads, the others return None.

    Args:
        revision: a branch, made where there is none.
        card: fields of `write_card`. Without any, a card that the repository has is kept.

    Raises:
        MoEAdapterError: as for `save_adapter`.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        with together(has_spread(model)):
            if not is_main_process():
                return None
            return upload(
                Path(folder),
                repo_id,
                lambda: write_card(folder, **card),
                new_card=bool(card),
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
            )


def _named(model: nn.Module) -> tuple[nn.Module, dict[str, Injection]]:
    """The model under peft, and its adapters by name, among them the one that was put in without a name."""
    owner = unwrapped(model)
    adapters: dict[str, Injection] = vars(owner).setdefault(NAMED, {})
    active: Injection | None = vars(owner).get(STATE)
    if active is not None and active not in adapters.values():
        if DEFAULT in adapters:
            raise MoEAdapterError(
                f"the model was injected without a name, and its adapter {DEFAULT!r} has that one: save_adapter and "
                "eject the model, then add_adapter each by a name."
            )
        adapters[DEFAULT] = active
    loras = {*active_loras(owner), *(lora for injection in adapters.values() for lora in injection.loras)}
    if adapters and loras and not is_peft_model(model):
        raise MoEAdapterError("the adapters hold LoRAs: pass the PeftModel that loading the first of them returned.")
    return owner, adapters


def _known(adapters: dict[str, Injection], name: str) -> Injection:
    if name not in adapters:
        raise MoEAdapterError(
            f"the model has no adapter {name!r}, expected one of {sorted(adapters)}: adapter_names(model) lists them, "
            "add_adapter loads another."
        )
    return adapters[name]


@contextmanager
def _without_adapter(model: nn.Module) -> Iterator[None]:
    """Within the block the model has no dual-path layers; after an error in it, it is as it was."""
    owner = unwrapped(model)
    flags = [(parameter, parameter.requires_grad) for parameter in owner.parameters()]
    active = detach(model) if STATE in vars(owner) else None
    try:
        yield
    except BaseException:
        if STATE in vars(owner):
            detach(model)
        if active is not None:
            _put_back(model, active)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def _put_back(model: nn.Module, injection: Injection) -> None:
    attach(unwrapped(model), injection)
    switch_lora(model, injection.loras)


def _forget_lora(model: Any, name: str) -> nn.Module:
    """Delete a LoRA that is off; the model without peft once it was the last."""
    if list(model.peft_config) == [name]:
        return model.unload()
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    others = active_loras(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that peft makes the next one the active one
        model.delete_adapter(name)
    switch_lora(model, [next(iter(model.peft_config))])  # a PeftModel needs one by name, on or off
    switch_lora(model, others)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return model
