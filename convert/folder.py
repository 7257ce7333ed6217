"""Base classes of checkpoint folders: configuration, tokenizer, companion files, and tensors in one or more shards."""

import abc
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np

from barber_jax.console import causes, documents
from barber_jax.console.documents import read_json
from barber_jax.console.errors import BarberError
from barber_jax.console.files import FileState, check_fetched
from barber_jax.console.quiet import held_output
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.tensor_names import stored_names
from barber_jax.convert.tied_head import settle_head

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

TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json")
"""Files of a tokenizer whose size and depth are checked before transformers reads them."""

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
            for file in TOKENIZER_JSON:
                if (self.folder / file).is_file():
                    documents.read(self.folder / file)
            with held_output():
                return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except BaseException as error:
            # transformers raises many types for a missing or broken tokenizer; the message is the same for all of them.
            if not causes.is_foreign(error):
                raise
            cause = str(error).strip().split("\n")[0]
            if "trust_remote_code" in str(error):
                raise BarberError(
                    f"{self.location}: its tokenizer is Python code of the checkpoint's own (auto_map in "
                    "tokenizer_config.json), which is never run; put a tokenizer.json there and remove auto_map, or "
                    "give token ids (.npy)"
                ) from None
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
        index: name of the index file, which is not looked at where there is the single file, as in transformers.
        dtypes: dtype name in this format -> NumPy dtype.
    """

    weights: str
    index: str
    dtypes: dict[str, np.dtype]

    def __init__(self, folder: Path, location: str | None = None):
        super().__init__(folder, location)
        if self.config.get("transformers_weights") is not None:
            raise BarberError(
                f"{self.location}: config.json: transformers_weights {self.config['transformers_weights']!r} is not "
                f"supported; give that file the name {self.weights} (or {self.index}) and remove the entry"
            )
        self._listed = self._locate()
        files = sorted(set(self._listed.values()) or {self.weights})
        self._states = {file: FileState(self.folder / file) for file in files}
        self._headers = {file: self._open(file) for file in files}
        for name, file in self._listed.items():
            if name not in self._headers[file]:
                raise BarberError(f"{self.folder / file}: no tensor {name}, which {self.index} names; fetch both again")
        # As in transformers, an index only says which files there are: a tensor that it does not name counts too, and
        # of a tensor that several files hold, the last one counts.
        shards = self._listed | {name: file for file, header in self._headers.items() for name in header}
        names = stored_names(shards, self.config.get("model_type"), self.location)
        self._masks = {names.tensors[name]: (shards[mask], mask) for name, mask in names.masks.items()}
        self._stored = {name: (shards[stored], stored) for name, stored in names.tensors.items()}
        self._stored = settle_head(self, self._stored)
        exported = self._export_names()
        self.files = {name: exported[file] for name, (file, _) in self._stored.items()}

    @classmethod
    def has_weights(cls, folder: Path) -> bool:
        """Whether a folder contains weights in this format."""
        return any((folder / file).is_file() for file in (cls.weights, cls.index))

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored = self._stored[name]
        return self._headers[file][stored][0]

    def dtype(self, name: str) -> np.dtype:
        file, stored = self._stored[name]
        given = self._headers[file][stored][1]
        if given not in self.dtypes:
            raise BarberError(
                f"{self.location}: tensor {name} has dtype {given}; known: {', '.join(self.dtypes)}; save it as one"
            )
        return self.dtypes[given]

    def sources(self) -> list[Path]:
        index = [self.index] if self._listed else []
        shards = sorted({file for file, _ in (*self._stored.values(), *self._masks.values())})
        return [self.folder / file for file in ("config.json", *index, *shards)]

    def fetch(self, name: str) -> np.ndarray:
        file, stored = self._stored[name]
        value = self._fetch_same(file, stored)
        if stored not in self._masks:
            return value
        mask = self._fetch_mask(name)
        # Only kept weights are multiplied: the product of a pruned one may be a negative zero or NaN.
        return np.multiply(value, mask.astype(value.dtype), where=mask != 0, out=np.zeros_like(value))

    def mask(self, name: str) -> np.ndarray | None:
        return self._fetch_mask(name) != 0 if self._stored[name][1] in self._masks else None

    def _fetch_mask(self, name: str) -> np.ndarray:
        file, stored = self._masks[self._stored[name][1]]
        mask = self._fetch_same(file, stored)
        if mask.shape != self.shape(name):
            wanted = list(self.shape(name))
            raise BarberError(
                f"{self.folder / file}: tensor {stored} has shape {list(mask.shape)}, its weight {wanted}"
            )
        return mask

    def _fetch_same(self, file: str, stored: str) -> np.ndarray:
        """`_fetch`, of a file that is the one that was opened. Raises BarberError."""
        value = self._fetch(self.folder / file, stored)
        self._states[file].check()
        return value

    @abc.abstractmethod
    def _open(self, file: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Read the shape and dtype name of every tensor in a file. Raises BarberError if it is damaged."""

    @abc.abstractmethod
    def _fetch(self, path: Path, name: str) -> np.ndarray:
        """Read one tensor of a file by its stored name. Raises BarberError if the file is damaged."""

    def _exported(self, file: str) -> str:
        """Name of the safetensors file that replaces `file` in an exported folder."""
        return file

    def _export_names(self) -> dict[str, str]:
        """File -> name of the safetensors file that replaces it in an exported folder."""
        exported = {file: self._exported(file) for file, _ in self._stored.values()}
        if len(set(exported.values())) == 1:
            return exported
        # Beside others, a file with this name would be taken for the whole model.
        return {file: "model-0.safetensors" if to == "model.safetensors" else to for file, to in exported.items()}

    def _locate(self) -> dict[str, str]:
        """Stored tensor name -> name of the file that holds it, as the index lists them; {} for the single file."""
        if (self.folder / self.weights).is_file():
            return {}
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
                        f"{self.folder / file}: named in {self.index} but not there; fetch the missing shard, "
                        f"or delete {self.index} if it is a leftover"
                    )
            return table
        raise BarberError(f"{self.location}: neither {self.weights} nor {self.index} in it; fetch the weights")
