"""A folder of weights to the Hugging Face hub. Needs the extra `hub`; the token is the library's own business."""

from __future__ import annotations

from pathlib import Path

from visft_ds.redaction import redacted


def files_to_upload(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of what an upload takes along: the files of the folder itself, hidden ones apart."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    return [(path.name, path.stat().st_size) for path in files]


def upload(folder: Path, repository: str, *, private: bool) -> str:
    """Make the repository where it is missing and upload the folder's files in one commit; returns the address.

    Raises ValueError where huggingface_hub is not installed, for what the hub refuses (name, token, rights), and
    without a network.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    except ModuleNotFoundError as error:
        raise ValueError("uploading needs huggingface_hub: pip install 'visft_ds[hub]'") from error
    names = [name for name, _ in files_to_upload(folder)]
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=names, commit_message="Weights by visft_ds"
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        raise ValueError(f"the hub refuses {repository}: {redacted(error)}") from error
    except (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError) as error:  # of whatever it speaks HTTP by
        reason = redacted(str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise ValueError(
            f"{api.endpoint} cannot be reached ({reason}). {folder} is written: send it later, hf upload {repository} "
            f"{folder}{' --private' * private}"
        ) from error
    return str(commit.commit_url)
