"""Base classes of checkpoint folders: configuration, tokenizer, companion files, and tensors in one or more shards."""

import abc
import json
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.files import check_fetched
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.tensor_names import stored_names

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
    "README.md",
)
"""Glob patterns of the small files that are copied with a model."""

ORBAX = "orbax"
"""Name of the subfolder that holds an Orbax checkpoint."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder with none of these files has no tokenizer."""

FLOATS = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The supported dtypes of weights."""


class ModelFolder(Checkpoint):
    """A folder with config.json and, optionally, tokenizer files.

    Attributes:
        folder: its path.
    """

    def __init__(self, folder: Path, location: str | None = None):
        self.folder = Path(folder)
        self.location = location or str(folder)
        self.config = read_json(
            self.folder / "config.json", f"{self.location}: no config.json: not a checkpoint folder; give one"
        )

    def tokenizer(self):
        from transformers import AutoTokenizer

        if not any((self.folder / file).is_file() for file in TOKENIZER_FILES):
            raise BarberError(f"{self.location}: no tokenizer there; put its files there or give token ids (.npy)")
        for file in (*TOKENIZER_FILES, "tokenizer_config.json"):
            check_fetched(self.folder / file)
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:
            # transformers raises many types for a missing or broken tokenizer; the message is the same for all of them.
            cause = str(error).strip().split("\n")[0]
            raise BarberError(
                f"{self.location}: no usable tokenizer there ({cause}); give token ids (.npy) instead"
            ) from None

    def save_tokenizer(self, folder: Path) -> None:
        for pattern in COMPANIONS:
            for file in self.folder.glob(pattern):
                if file.is_file():
                    check_fetched(file)
                    shutil.copyfile(file, folder / file.name)


class ShardedFolder(ModelFolder):
    """A folder whose tensors are stored in a single file, or in shards listed in an index file.

    A subclass sets the file names and reads the files.

    Attributes:
        weights: name of the single file.
        index: name of the index file, which takes precedence over the single file.
        dtypes: dtype name in this format -> NumPy dtype.
    """

    weights: str
    index: str
    dtypes: dict[str, np.dtype]

    def __init__(self, folder: Path, location: str | None = None):
        super().__init__(folder, location)
        shards = self._locate()
        headers = {file: self._open(file) for file in sorted(set(shards.values()))}
        for name, file in shards.items():
            if name not in headers[file]:
                raise BarberError(f"{self.folder / file}: no tensor {name}, which {self.index} names; fetch both again")
        names = stored_names(shards, self.config.get("model_type"), self.location)
        self._stored = {name: (shards[stored], stored) for name, stored in names.tensors.items()}
        self._masks = {name: (shards[stored], stored) for name, stored in names.masks.items()}
        self._headers = {name: headers[file][stored] for name, (file, stored) in self._stored.items()}
        self.files = {name: self._exported(file) for name, (file, _) in self._stored.items()}

    @classmethod
    def has_weights(cls, folder: Path) -> bool:
        """Whether a folder contains weights in this format."""
        return any((folder / file).is_file() for file in (cls.weights, cls.index))

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._headers[name][0]

    def dtype(self, name: str) -> np.dtype:
        given = self._headers[name][1]
        if given not in self.dtypes:
            raise BarberError(f"{self.location}: tensor {name} has dtype {given}; known: {', '.join(self.dtypes)}")
        return self.dtypes[given]

    def sources(self) -> list[Path]:
        index = [self.index] if (self.folder / self.index).exists() else []
        shards = sorted({file for file, _ in (*self._stored.values(), *self._masks.values())})
        return [self.folder / file for file in ("config.json", *index, *shards)]

    def fetch(self, name: str) -> np.ndarray:
        file, stored = self._stored[name]
        value = self._fetch(self.folder / file, stored)
        if name not in self._masks:
            return value
        mask = self._fetch_mask(name)
        # Only kept weights are multiplied: the product of a pruned one may be a negative zero or NaN.
        return np.multiply(value, mask.astype(value.dtype), where=mask != 0, out=np.zeros_like(value))

    def mask(self, name: str) -> np.ndarray | None:
        return self._fetch_mask(name) != 0 if name in self._masks else None

    def _fetch_mask(self, name: str) -> np.ndarray:
        file, stored = self._masks[name]
        mask = self._fetch(self.folder / file, stored)
        if mask.shape != self.shape(name):
            wanted = list(self.shape(name))
            raise BarberError(
                f"{self.folder / file}: tensor {stored} has shape {list(mask.shape)}, its weight {wanted}"
            )
        return mask

    @abc.abstractmethod
    def _open(self, file: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Read the shape and dtype name of every tensor in a file. Raises BarberError if it is damaged."""

    @abc.abstractmethod
    def _fetch(self, path: Path, name: str) -> np.ndarray:
        """Read one tensor of a file by its stored name. Raises BarberError if the file is damaged."""

    def _exported(self, file: str) -> str:
        """Name of the safetensors file that replaces `file` in an exported folder."""
        return file

    def _locate(self) -> dict[str, str]:
        """Stored tensor name -> name of the file that holds it."""
        index = self.folder / self.index
        if index.exists():
            table = read_json(index, f"{index}: missing").get("weight_map")
            if not isinstance(table, dict) or not table:
                raise BarberError(f"{index}: no weight_map in it; fetch it again")
            ending = Path(self.weights).suffix
            for name, file in table.items():
                # The exported folder has the same file names; a path among them could overwrite the source.
                if not isinstance(file, str) or not re.fullmatch(rf"[^/\\\0]{{1,200}}\{ending}", file):
                    raise BarberError(f"{index}: {file!r} ({name}) is not the name of a {ending} file beside it")
                if not (self.folder / file).is_file():
                    raise BarberError(
                        f"{self.folder / file}: named in {self.index} but not there; fetch the missing shard"
                    )
            return table
        if (self.folder / self.weights).is_file():
            return dict.fromkeys(self._open(self.weights), self.weights)
        raise BarberError(f"{self.location}: neither {self.weights} nor {self.index} in it; fetch the weights")


def read_json(path: Path, absent: str) -> dict:
    """Read the JSON object in a file.

    Raises:
        BarberError: the file does not exist (with `absent` as the message), or is not a JSON object.
    """
    check_fetched(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BarberError(absent) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BarberError(f"{path}: cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise BarberError(f"{path}: not a JSON object; fetch it again")
    return content
