"""Upload a complete exported folder to the Hugging Face hub.

Reads the folder and the login of `hf auth login` (or HF_TOKEN). Traffic: every file once.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode

from lit_puzzle.serve.settings import Upload

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def check_upload(upload: Upload) -> None:
    """Check what an upload needs before anything slow.

    Raises:
        ValueError: the repository is not OWNER/NAME, HF_HUB_OFFLINE is set, or nobody is logged in.
    """
    if upload.repository is None:
        return
    if not REPOSITORY.fullmatch(upload.repository):
        raise ValueError(f"upload.repository is {upload.repository!r}; name a repository as OWNER/NAME")
    if is_offline_mode():
        raise ValueError(f"upload.repository: HF_HUB_OFFLINE is set; unset it to upload to {upload.repository}")
    if get_token() is None:
        raise ValueError(f"upload.repository: {upload.repository} needs a login; run `hf auth login` or set HF_TOKEN")


def upload_folder(folder: Path, upload: Upload) -> None:
    """Create the repository if it does not exist and upload every file of the folder, if a repository is given."""
    if upload.repository is None:
        return
    hub = HfApi()
    hub.create_repo(upload.repository, private=upload.private, exist_ok=True)
    hub.upload_folder(repo_id=upload.repository, folder_path=folder, commit_message="Upload the exported folder")
