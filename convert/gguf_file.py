"""Reads a GGUF file as a checkpoint with Hugging Face names, layout and configuration."""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from barber_jax.console.errors import BarberError
from barber_jax.console.files import FileState
from barber_jax.convert.checkpoint import Checkpoint, split_files
from barber_jax.convert.gguf_config import llama_config
from barber_jax.convert.gguf_gemma import gemma_config
from barber_jax.convert.gguf_header import Header, StoredTensor
from barber_jax.convert.gguf_layout import ATTENTION, LAYOUTS, MLP, model_tensors
from barber_jax.convert.gguf_split import read_parts
from barber_jax.convert.gguf_tokenizer import UnknownTokenizer, build_tokenizer, has_tokenizer, special_ids
from barber_jax.convert.tokenizer_files import save_tokenizer

# Hugging Face's llama has biases on all four attention projections or on none. llama.cpp also allows them on the first
# three only; this bias is then zero.
OPTIONAL_BIAS = "attn_output.bias"
ROPE_FREQS = "rope_freqs.weight"
DECODED_AT_ONCE = 1 << 22
"""Values of a quantised tensor that are decoded at a time."""
UNQUANTISED = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


class GGUFCheckpoint(Checkpoint):
    """A .gguf file, or all parts of a split one, opened for reading; each tensor is decoded when it is fetched.

    F32, F16 and BF16 tensors keep their dtype; all other types are dequantised to float32.
    """

    def __init__(self, path: Path):
        """Open `path`.

        Raises:
            BarberError: the file is not a valid GGUF file, or has an unsupported architecture or feature.
        """
        self.location = str(path)
        self._header, self._parts = read_parts(path)
        self._states = {part: FileState(part) for part in self._parts.values()}
        try:
            self.architecture = self._read_architecture()
            self.config = self._read_config()
            self._check_blocks()
            self._sources = dict(model_tensors(self.architecture, self.config))
            self._check_tensors()
        except BarberError as error:
            raise BarberError(f"{path}: {error}") from None
        self.config["torch_dtype"] = self.dtype("model.layers.0.self_attn.q_proj.weight").name
        self.files = split_files(
            {name: math.prod(self.shape(name)) * self.dtype(name).itemsize for name in self.names()}
        )

    def sources(self) -> list[Path]:
        return list(dict.fromkeys(self._parts.values()))

    def names(self) -> list[str]:
        """Hugging Face names of all tensors, in model order."""
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._sources[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor as `fetch` returns it, without reading it."""
        source = self._sources[name]
        tensor = None if source.added else self._header.tensors.get(source.stored)
        return np.dtype(np.float32) if tensor is None else UNQUANTISED.get(tensor.kind, np.dtype(np.float32))

    def fetch(self, name: str) -> np.ndarray:
        """Read and decode one tensor.

        Raises:
            BarberError: the file cannot be read, or has been truncated since it was opened.
        """
        source = self._sources[name]
        if source.stored not in self._header.tensors:
            return np.zeros(source.shape, np.float32)
        value = self._decode(source.stored)
        if source.added:
            # In float32: adding 1 and taking it away again loses next to nothing of weights that were bfloat16.
            return value.astype(np.float32) - np.float32(source.added)
        return unpermute(value, source.rotary_heads) if source.rotary_heads else value

    def tokenizer(self):
        """Build the tokenizer from the file's metadata.

        Raises:
            BarberError: the file has no tokenizer, or one of an unsupported kind.
        """
        try:
            return build_tokenizer(self._header.fields)
        except UnknownTokenizer as error:
            raise BarberError(f"{self.location}: {error}; give token ids (.npy) instead") from None
        except BarberError as error:
            raise BarberError(f"{self.location}: {error}") from None

    def save_tokenizer(self, folder: Path) -> str | None:
        """Write the tokenizer's files and generation_config.json to `folder`, if the file has a tokenizer.

        Returns:
            Why no tokenizer is written, if it is of an unsupported kind; else None.

        Raises:
            BarberError: the tokenizer's fields are missing or inconsistent.
        """
        if not has_tokenizer(self._header.fields):
            return None
        missing = None
        try:
            save_tokenizer(build_tokenizer(self._header.fields), folder)
        except UnknownTokenizer as error:
            missing = f"no tokenizer is written, copy the original model's into the result ({self.location}: {error})"
        except BarberError as error:
            raise BarberError(f"{self.location}: {error}") from None
        ids = {key: self.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        content = {key: value for key, value in ids.items() if value is not None}
        (Path(folder) / "generation_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return missing

    def _read_architecture(self) -> str:
        architecture = self._header.fields.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in LAYOUTS:
            known = ", ".join(LAYOUTS)
            raise BarberError(f"architecture {architecture!r} is not supported in a .gguf file (known: {known})")
        return architecture

    def _read_config(self) -> dict:
        header = self._header
        embedding = header.tensors.get("token_embd.weight")
        vocabulary = embedding.shape[0] if embedding else 0
        ids = special_ids(header.fields)
        if self.architecture == "llama":
            rope_freqs = self._decode(ROPE_FREQS) if ROPE_FREQS in header.tensors else None
            config = llama_config(header.fields, vocabulary, rope_freqs) | {"mlp_bias": _has_bias(header, MLP)}
        else:
            config = gemma_config(self.architecture, header.fields, vocabulary)
        return config | {
            "tie_word_embeddings": "output.weight" not in header.tensors,
            "attention_bias": _has_bias(header, ATTENTION),
            "bos_token_id": ids["bos"],
            "eos_token_id": ids["eos"],
            "pad_token_id": ids["pad"],
        }

    def _check_blocks(self) -> None:
        """Reject a block count above the tensor count: one damaged byte must not make us list billions of tensors."""
        blocks = self.config["num_hidden_layers"]
        if blocks > len(self._header.tensors):
            name = f"{self.architecture}.block_count"
            raise BarberError(f"{name} is {blocks}, more than there are tensors; the file is damaged")

    def _check_tensors(self) -> None:
        """Check that the file holds exactly the model's tensors, with the shapes that the metadata imply."""
        tensors = self._header.tensors
        for source in self._sources.values():
            if source.stored.endswith(OPTIONAL_BIAS) and source.stored not in tensors:
                continue
            if source.stored not in tensors:
                raise BarberError(f"tensor {source.stored} is missing; convert the model again")
            if tensors[source.stored].shape != source.shape:
                found = tensors[source.stored].shape
                raise BarberError(f"tensor {source.stored} has shape {found}, but the metadata imply {source.shape}")
        unexpected = tensors.keys() - {source.stored for source in self._sources.values()}
        unexpected -= {ROPE_FREQS} if self.architecture == "llama" else set()
        if unexpected:
            kind = self.architecture
            raise BarberError(
                f"tensor {min(unexpected)} is not part of a {kind} model; only plain {kind} models are supported"
            )

    def _decode(self, stored: str) -> np.ndarray:
        tensor = self._header.tensors[stored]
        raw = self._read_bytes(stored, tensor)
        if tensor.kind in UNQUANTISED:
            return raw.view(UNQUANTISED[tensor.kind]).reshape(tensor.shape)
        rows = raw.reshape(math.prod(tensor.shape[:-1]), -1)
        value = np.empty((len(rows), tensor.shape[-1]), np.float32)
        # In parts, as the package takes as much memory again as there are values.
        step = max(1, DECODED_AT_ONCE // tensor.shape[-1])
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            # Damaged scales overflow here; `read` rejects the result.
            with np.errstate(all="ignore"):
                value[part] = dequantize(rows[part], tensor.kind)
        return value.reshape(tensor.shape)

    def _read_bytes(self, stored: str, tensor: StoredTensor) -> np.ndarray:
        # A plain read, not a memory map: mapped pages would count as resident memory of the process.
        try:
            with open(self._parts[stored], "rb") as handle:
                handle.seek(tensor.offset)
                raw = np.fromfile(handle, np.uint8, tensor.size)
        except OSError as error:
            raise BarberError(f"{self._parts[stored]}: tensor {stored} cannot be read ({error.strerror})") from None
        if raw.size != tensor.size:
            raise BarberError(f"{self._parts[stored]}: the file is cut short in tensor {stored}; download it again")
        self._states[self._parts[stored]].check()
        return raw


def unpermute(value: np.ndarray, heads: int) -> np.ndarray:
    """Restore Hugging Face's row order in a query or key tensor.

    llama.cpp rotates adjacent rows of a head together, Hugging Face row i with row i + head_dim / 2.

    Args:
        value: weight [heads * head_dim, in] or bias [heads * head_dim].
        heads: number of query heads, or of key heads.
    """
    half = value.shape[0] // heads // 2
    return value.reshape(heads, half, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def _has_bias(header: Header, modules: dict[str, str]) -> bool:
    return any(f"blk.0.{module}.bias" in header.tensors for module in modules)
