"""Hugging Face checkpoints: a local folder of safetensors, or the needed files of a Hub repository."""

import json
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from barber_jax import hub
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.errors import BarberError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "LICENSE*",
)
"""Small files that travel with a model, as glob patterns."""

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder with none of these has no tokenizer."""

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""safetensors' names of the dtypes that weights may have."""


class HFFolder(Checkpoint):
    """A folder with config.json and one or many safetensors files."""

    def __init__(self, folder: Path, location: str | None = None):
        self.folder = Path(folder)
        self.location = location or str(folder)
        self.config = _read_json(
            self.folder / "config.json", f"{self.location}: no config.json: not a checkpoint folder; give one"
        )
        self.files = self._locate()
        held = {file: dict(self._open(file)) for file in sorted(set(self.files.values()))}
        for name, file in self.files.items():
            if name not in held[file]:
                raise BarberError(f"{self.folder / file}: no tensor {name}, which {INDEX} names; fetch both again")
        self._headers = {name: held[file][name] for name, file in self.files.items()}

    def names(self) -> list[str]:
        return list(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._headers[name][0]

    def dtype(self, name: str) -> np.dtype:
        given = self._headers[name][1]
        if given not in DTYPES:
            raise BarberError(f"{self.location}: tensor {name} has dtype {given}; known: {', '.join(DTYPES)}")
        return DTYPES[given]

    def fetch(self, name: str) -> np.ndarray:
        path = self.folder / self.files[name]
        # Opened anew for each tensor: a file that stays mapped would let resident memory grow to the checkpoint's size.
        try:
            with safe_open(path, "np") as handle:
                return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None

    def tokenizer(self):
        from transformers import AutoTokenizer

        if not any((self.folder / file).is_file() for file in TOKENIZERS):
            raise BarberError(f"{self.location}: no tokenizer there; put its files there or give token ids (.npy)")
        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except Exception as error:
            # transformers raises many types for a missing or broken tokenizer; all mean the same to the user.
            cause = str(error).strip().split("\n")[0]
            raise BarberError(
                f"{self.location}: no usable tokenizer there ({cause}); give token ids (.npy) instead"
            ) from None

    def save_tokenizer(self, folder: Path) -> None:
        for pattern in COMPANIONS:
            for file in self.folder.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)

    def _locate(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.exists():
            content = _read_json(index, f"{index}: missing")
            table = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(table, dict) or not table:
                raise BarberError(f"{index}: no weight_map in it; fetch it again")
            for name, file in table.items():
                # The output has the same shards: with a path for a name they would be written over the source.
                if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]{1,200}\.safetensors", file):
                    raise BarberError(f"{index}: {file!r} ({name}) is not the name of a .safetensors file beside it")
                if not (self.folder / file).is_file():
                    raise BarberError(f"{self.folder / file}: named in {INDEX} but not there; fetch the missing shard")
            return table
        if (self.folder / WEIGHTS).is_file():
            return {name: WEIGHTS for name, _ in self._open(WEIGHTS)}
        raise BarberError(f"{self.location}: neither {WEIGHTS} nor {INDEX} in it; fetch the weights")

    def _open(self, file: str) -> list[tuple[str, tuple[tuple[int, ...], str]]]:
        path = self.folder / file
        try:
            with safe_open(path, "np") as handle:
                slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
                return [(name, (tuple(part.get_shape()), part.get_dtype())) for name, part in slices.items()]
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None


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


def _snapshot(repository: str) -> Path:
    """A repository's files from the Hub or, if that cannot be reached, from the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["config.json", WEIGHTS, "model-*.safetensors", INDEX, *COMPANIONS]
    try:
        hub.probe()
    except Exception as unreachable:
        try:
            return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
        except LocalEntryNotFoundError:
            raise unreachable from None
    return Path(snapshot_download(repository, allow_patterns=patterns))


def _read_json(path: Path, absent: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BarberError(absent) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BarberError(f"{path}: cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise BarberError(f"{path}: not a JSON object; fetch it again")
    return content


def _damaged(path: Path, error: Exception) -> BarberError:
    return BarberError(f"{path}: truncated or corrupt safetensors file ({error}); fetch it again")
