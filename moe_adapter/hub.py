"""The Hugging Face Hub: an adapter's directory there and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_adapter.directory import INDEX, OURS
from moe_adapter.errors import MoEAdapterError

WEIGHTS, LORA = OURS[0], f"{OURS[1]}/*"


def hub():
    """The library huggingface_hub. Raises MoEAdapterError where it is missing."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MoEAdapterError(
            'model cards and the hub need huggingface_hub: pip install "moe-adapter[hub]".'
        ) from error
    return huggingface_hub


def download(repo_id: str, **options: Any) -> str:
    """Fetch a repository's adapter; returns the directory it lies in. Raises MoEAdapterError where that fails."""
    errors = hub().errors
    try:
        return hub().snapshot_download(repo_id, allow_patterns=[INDEX, WEIGHTS, LORA], **options)
    except (errors.EntryNotFoundError, errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise MoEAdapterError(
            f"{repo_id!r} is no directory here, and no repository that could be fetched ({error}); expected the "
            "directory of save_adapter() or a repository of push_to_hub()."
        ) from error


def upload(
    folder: Path,
    repo_id: str,
    write_card: Callable[[], object],
    *,
    new_card: bool,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Upload an adapter's directory over an older one, with a new card or its old one; returns the commit's URL."""
    api = hub().HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not api.revision_exists(repo_id, revision):
        api.create_branch(repo_id, branch=revision)
    if new_card or not api.file_exists(repo_id, "README.md", revision=revision):
        write_card()
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        delete_patterns=[WEIGHTS, LORA],
    ).commit_url
