"""Uploading an exported folder to the Hugging Face hub, asked for by name and only when the folder is complete.

Reads the folder and the login of `hf auth login` (or HF_TOKEN). Traffic: every file once.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def check_upload(repository: str) -> None:
    """Checks, before anything slow, what an upload needs.

    Raises:
        ValueError: A name that is no OWNER/NAME, or nobody is logged in.
    """
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"push_to_hub is {repository!r}; name a repository as OWNER/NAME")
    if get_token() is None:
        raise ValueError(f"push_to_hub: {repository} needs a login; run `hf auth login` or set HF_TOKEN")


def upload(folder: Path, repository: str, private: bool) -> None:
    """Makes the repository where it is missing and uploads every file of the folder."""
    hub = HfApi()
    hub.create_repo(repository, private=private, exist_ok=True)
    hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="The exported folder")
