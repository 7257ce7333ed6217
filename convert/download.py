"""Downloads the checkpoint files that pruning needs from the Hugging Face Hub."""

from fnmatch import fnmatch
from pathlib import Path

from barber_jax.console.errors import BarberError
from barber_jax.convert.folder import COMPANIONS
from barber_jax.data import hub
from barber_jax.masks.mask_file import FILE_NAME

SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
TORCH = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def download(repository: str) -> Path:
    """Download the configuration, weights, masks and tokenizer of a Hub repository; returns the local folder.

    Raises:
        BarberError: `repository` looks like a path and does not exist, or cannot be downloaded.
    """
    missing = f"{repository}: no such file or folder"
    if repository.count("/") > 1 or repository.startswith((".", "/", "~")):
        raise BarberError(f"{missing}; check the path")
    try:
        return _snapshot(repository)
    except Exception as error:
        # The Hub client raises many types (offline, gated, not found); the message is the same for all of them.
        cause = str(error).strip().split("\n")[0]
        raise BarberError(f"{missing}, and it could not be fetched as a Hub id ({cause})") from None


def download_patterns(files: list[str]) -> list[str]:
    """Glob patterns of what to download from a repository that contains `files`: the weights that are opened."""
    safe = any(fnmatch(file, pattern) for file in files for pattern in SAFETENSORS)
    single, *shards = SAFETENSORS if safe else TORCH
    return ["config.json", "adapter_config.json", FILE_NAME, *COMPANIONS, *([single] if single in files else shards)]


def _snapshot(repository: str) -> Path:
    """Download a repository's files or, if the Hub cannot be reached, find them in the local cache."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        hub.probe()
    except Exception as unreachable:
        try:
            return Path(snapshot_download(repository, local_files_only=True))
        except LocalEntryNotFoundError:
            raise unreachable from None
    return Path(snapshot_download(repository, allow_patterns=download_patterns(list_repo_files(repository))))
