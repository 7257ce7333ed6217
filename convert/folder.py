"""What checkpoint folders share: configuration, tokenizer, companion files, and tensors spread over shards."""

import abc
import json
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import Checkpoint

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
"""Small files that travel with a model, as glob patterns."""

ORBAX = "orbax"
"""Where a folder keeps its Orbax checkpoint."""

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder with none of these has no tokenizer."""

FLOATS = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes that weights may have."""


class ModelFolder(Checkpoint):
    """A folder with config.json and, perhaps, a tokenizer's files.

    Attributes:
        folder: where it is.
    """

    def __init__(self, folder: Path, location: str | None = None):
        self.folder = Path(folder)
        self.location = location or str(folder)
        self.config = read_json(
            self.folder / "config.json", f"{self.location}: no config.json: not a checkpoint folder; give one"
        )

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


class ShardedFolder(ModelFolder):
    """A folder whose tensors lie in one file, or in shards that an index names.

    A subclass says which files those are and how one is opened.

    Attributes:
        weights: name of the one file.
        index: name of the index, which wins over the one file.
        dtypes: the format's name of a dtype -> NumPy dtype.
    """

    weights: str
    index: str
    dtypes: dict[str, np.dtype]

    def __init__(self, folder: Path, location: str | None = None):
        super().__init__(folder, location)
        places = self._locate()
        held = {file: self._open(file) for file in sorted(set(places.values()))}
        for name, file in places.items():
            if name not in held[file]:
                raise BarberError(f"{self.folder / file}: no tensor {name}, which {self.index} names; fetch both again")
        prefix = _missing_prefix(places)
        self._stored = {prefix.get(name, name): (file, name) for name, file in places.items()}
        self._headers = {name: held[file][stored] for name, (file, stored) in self._stored.items()}
        self.files = {name: self._exported(file) for name, (file, _) in self._stored.items()}

    @classmethod
    def found(cls, folder: Path) -> bool:
        """Whether a folder holds weights of this format."""
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
        shards = sorted({file for file, _ in self._stored.values()})
        return [self.folder / file for file in ("config.json", *index, *shards)]

    def fetch(self, name: str) -> np.ndarray:
        file, stored = self._stored[name]
        return self._fetch(self.folder / file, stored)

    @abc.abstractmethod
    def _open(self, file: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype (the format's name of it) of every tensor in a file; BarberError if it is damaged."""

    @abc.abstractmethod
    def _fetch(self, path: Path, name: str) -> np.ndarray:
        """Read one tensor of a file, under the name that the file has for it; BarberError if it is damaged."""

    def _exported(self, file: str) -> str:
        """Name of the safetensors file that an exported folder has in place of `file`."""
        return file

    def _locate(self) -> dict[str, str]:
        """Name of every tensor, as stored -> file."""
        index = self.folder / self.index
        if index.exists():
            table = read_json(index, f"{index}: missing").get("weight_map")
            if not isinstance(table, dict) or not table:
                raise BarberError(f"{index}: no weight_map in it; fetch it again")
            ending = Path(self.weights).suffix
            for name, file in table.items():
                # The output has the same shards: with a path for a name they would be written over the source.
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


def _missing_prefix(names: dict[str, str]) -> dict[str, str]:
    """Stored name -> name in the whole model, for a checkpoint saved from the model without its head.

    Such files, the widespread ones of OPT among them, leave `model.` out.
    """
    if any(name.startswith("model.") for name in names):
        return {}
    return {name: f"model.{name}" for name in names if not name.startswith("lm_head.")}


def read_json(path: Path, absent: str) -> dict:
    """The JSON object in a file.

    Raises:
        BarberError: it cannot be read, or, with `absent` for a message, it is not there.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BarberError(absent) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BarberError(f"{path}: cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise BarberError(f"{path}: not a JSON object; fetch it again")
    return content
