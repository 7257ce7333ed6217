"""The files of a Hub repository that pruning needs."""

from fnmatch import fnmatch
from pathlib import Path

from barber_jax.console.errors import BarberError
from barber_jax.convert.folder import COMPANIONS
from barber_jax.data import hub

SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
TORCH = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def download(repository: str) -> Path:
    """Fetch the files of a Hub repository that pruning needs; returns the local folder.

    Raises:
        BarberError: it is neither a path nor a repository that can be reached.
    """
    missing = f"{repository}: no such file or folder"
    if repository.count("/") > 1 or repository.startswith((".", "/", "~")):
        raise BarberError(f"{missing}; check the path")
    try:
        return _snapshot(repository)
    except Exception as error:
        # The hub client raises many types (offline, gated, not found); all end the run the same way.
        cause = str(error).strip().split("\n")[0]
        raise BarberError(f"{missing}, and it could not be fetched as a Hub id ({cause})") from None


def patterns(files: list[str]) -> list[str]:
    """Glob patterns of what to fetch from a repository of these files: one format's weights, not every format's."""
    safe = any(fnmatch(file, pattern) for file in files for pattern in SAFETENSORS)
    return ["config.json", *COMPANIONS, *(SAFETENSORS if safe else TORCH)]


def _snapshot(repository: str) -> Path:
    """A repository's files from the Hub or, if that cannot be reached, from the cache."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        hub.probe()
    except Exception as unreachable:
        try:
            return Path(snapshot_download(repository, local_files_only=True))
        except LocalEntryNotFoundError:
            raise unreachable from None
    return Path(snapshot_download(repository, allow_patterns=patterns(list_repo_files(repository))))
