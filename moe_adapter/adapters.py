"""Named adapters on one base, in peft's verbs: one for each hospital, say.

One adapter answers at a time. The layers of the others are kept whole outside the model, so that switching moves no
weight, and an adapter answers to the bit as if it alone had been loaded. `static_only(model)` is peft's
`disable_adapter`; `save_adapter` saves the active one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from moe_adapter.card import hub, write_card
from moe_adapter.directory import INDEX
from moe_adapter.errors import MoEAdapterError
from moe_adapter.files import load_named, save_adapter
from moe_adapter.lora import DEFAULT, lora_is_on, switch_lora
from moe_adapter.merge import merge_adapters
from moe_adapter.stages import set_stage
from moe_adapter.surgery import NAMED, STATE, Injection, attach, detach, is_peft_model, unwrapped

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
    if not name or "." in name:
        raise MoEAdapterError(f"got the adapter name {name!r}, expected text without dots, which peft can't hold.")
    if name in adapters:
        raise MoEAdapterError(
            f"the model has an adapter {name!r} already, beside {sorted(set(adapters) - {name})}: choose another name, "
            f"or delete_adapter(model, {name!r}) first."
        )
    with _without_adapter(owner):
        model = load_named(model, Path(path), name)
    adapters[name] = getattr(owner, STATE)
    _match_lora(model, adapters)
    return model


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make an adapter the active one, trainable as after `load_adapter`; None for the base model as it was.

    Raises:
        MoEAdapterError: no adapter of that name, or the model is not the PeftModel that the adapters' LoRAs are in.
    """
    owner, adapters = _named(model)
    injection = None if name is None else _known(adapters, name)
    if STATE in vars(owner):
        detach(owner)
    if injection is not None:
        attach(owner, injection)
    _match_lora(model, adapters)
    if injection is not None:
        set_stage(model, 2 if injection.lora else 1)


def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Forget an adapter, its LoRA too; where it was the active one, the base answers.

    Returns the model, which is no PeftModel any more once its last LoRA is gone.

    Raises:
        MoEAdapterError: as for `set_adapter`.
    """
    owner, adapters = _named(model)
    injection = _known(adapters, name)
    if vars(owner).get(STATE) is injection:
        set_adapter(model, None)
    del adapters[name]
    if injection.lora is None:
        return model
    if list(model.peft_config) == [injection.lora]:  # pyright: ignore
        return model.unload()  # pyright: ignore
    model.delete_adapter(injection.lora)  # pyright: ignore
    return model


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter that answers; None where the base does."""
    owner, adapters = _named(model)
    active = vars(owner).get(STATE)
    return next((name for name, injection in adapters.items() if injection is active), None)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, in the order in which they came."""
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
    if not Path(source).is_dir():
        source = _download(str(source), revision=revision, token=token, cache_dir=cache_dir)
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
) -> str:
    """Upload the active adapter and its model card to the Hugging Face Hub; returns the URL of the commit.

    Args:
        card: fields of `write_card`. Without any, a card that the repository has is kept.

    Raises:
        MoEAdapterError: as for `save_adapter`.
    """
    api = hub().HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if card or not api.file_exists(repo_id, "README.md", revision=revision):
            write_card(folder, **card)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=["weights-*.safetensors", "lora-*"],
        ).commit_url


def _download(repo_id: str, **options: Any) -> str:
    errors = hub().errors
    try:
        return hub().snapshot_download(repo_id, allow_patterns=[INDEX, "weights-*.safetensors", "lora-*"], **options)
    except (errors.EntryNotFoundError, errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise MoEAdapterError(
            f"{repo_id!r} is no directory here, and no repository that could be fetched ({error}); expected the "
            "directory of save_adapter() or a repository of push_to_hub()."
        ) from error


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
        if is_peft_model(model) and lora_is_on(model):
            active.lora = model.active_adapters[0]  # pyright: ignore
        adapters[DEFAULT] = active
    if any(injection.lora for injection in adapters.values()) and not is_peft_model(model):
        raise MoEAdapterError("the adapters hold LoRAs: pass the PeftModel that loading the first of them returned.")
    return owner, adapters


def _known(adapters: dict[str, Injection], name: str) -> Injection:
    if name not in adapters:
        raise MoEAdapterError(f"the model has no adapter {name!r}; it has {sorted(adapters)}: add_adapter it first.")
    return adapters[name]


@contextmanager
def _without_adapter(owner: nn.Module) -> Iterator[None]:
    """Within the block the model has no dual-path layers; after an error in it, it is as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in owner.parameters()]
    active = detach(owner) if STATE in vars(owner) else None
    try:
        yield
    except BaseException:
        if active is not None:
            attach(owner, active)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def _match_lora(model: nn.Module, adapters: dict[str, Injection]) -> None:
    """Let the LoRA of the active adapter answer; none, where it has none."""
    if any(injection.lora for injection in adapters.values()):
        active: Injection | None = vars(unwrapped(model)).get(STATE)
        switch_lora(model, active.lora if active else None)
