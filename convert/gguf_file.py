"""Reads a GGUF file of the llama architecture as a checkpoint with Hugging Face names, layout and configuration."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from barber_jax.console.errors import BarberError
from barber_jax.console.files import FileState
from barber_jax.convert.checkpoint import Checkpoint, split_files
from barber_jax.convert.gguf_config import llama_config
from barber_jax.convert.gguf_header import Header, StoredTensor
from barber_jax.convert.gguf_split import read_parts
from barber_jax.convert.gguf_tokenizer import UnknownTokenizer, build_tokenizer, has_tokenizer, special_ids
from barber_jax.convert.tokenizer_files import save_tokenizer

# Hugging Face's llama has biases on all four attention projections or on none. llama.cpp also allows them on the first
# three only; this bias is then zero.
OPTIONAL_BIAS = "attn_output.bias"
ROPE_FREQS = "rope_freqs.weight"
UNQUANTISED = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


class _Source(NamedTuple):
    """Where a Hugging Face tensor comes from: its GGUF name, its shape, and its number of rotary heads (0 if none)."""

    stored: str
    shape: tuple[int, ...]
    rotary_heads: int = 0


class GGUFCheckpoint(Checkpoint):
    """A .gguf file, or all parts of a split one, opened for reading; each tensor is decoded when it is fetched.

    F32, F16 and BF16 tensors keep their dtype; all other types are dequantised to float32.
    """

    def __init__(self, path: Path):
        """Open `path`.

        Raises:
            BarberError: the file is not a valid GGUF file of the llama architecture, or uses an unsupported feature.
        """
        self.location = str(path)
        self._header, self._parts = read_parts(path)
        self._states = {part: FileState(part) for part in self._parts.values()}
        try:
            self.config = self._read_config()
            self._check_blocks()
            self._sources = dict(_llama_tensors(self.config))
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
        tensor = self._header.tensors.get(self._sources[name].stored)
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

    def _read_config(self) -> dict:
        header = self._header
        embedding = header.tensors.get("token_embd.weight")
        rope_freqs = self._decode(ROPE_FREQS) if ROPE_FREQS in header.tensors else None
        ids = special_ids(header.fields)
        return llama_config(header.fields, embedding.shape[0] if embedding else 0, rope_freqs) | {
            "tie_word_embeddings": "output.weight" not in header.tensors,
            "attention_bias": _has_bias(header, ATTENTION),
            "mlp_bias": _has_bias(header, MLP),
            "bos_token_id": ids["bos"],
            "eos_token_id": ids["eos"],
            "pad_token_id": ids["pad"],
        }

    def _check_blocks(self) -> None:
        """Reject a block count above the tensor count: one damaged byte must not make us list billions of tensors."""
        blocks = self.config["num_hidden_layers"]
        if blocks > len(self._header.tensors):
            raise BarberError(f"llama.block_count is {blocks}, more than there are tensors; the file is damaged")

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
        unexpected = tensors.keys() - {source.stored for source in self._sources.values()} - {ROPE_FREQS}
        if unexpected:
            raise BarberError(
                f"tensor {min(unexpected)} is not part of a llama model; only plain llama models are supported"
            )

    def _decode(self, stored: str) -> np.ndarray:
        tensor = self._header.tensors[stored]
        raw = self._read_bytes(stored, tensor)
        if tensor.kind in UNQUANTISED:
            return raw.view(UNQUANTISED[tensor.kind]).reshape(tensor.shape)
        # Damaged scales overflow here; `read` rejects the result.
        with np.errstate(all="ignore"):
            return dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.kind)

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


def _llama_tensors(config: dict) -> Iterator[tuple[str, _Source]]:
    """Hugging Face name and GGUF source of every tensor of a model with this configuration."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", _Source("token_embd.weight", (vocab, hidden))
    for layer in range(config["num_hidden_layers"]):
        for name, source in _layer_tensors(config):
            yield f"model.layers.{layer}.{name}", source._replace(stored=f"blk.{layer}.{source.stored}")
    yield "model.norm.weight", _Source("output_norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", _Source("output.weight", (vocab, hidden))


def _layer_tensors(config: dict) -> Iterator[tuple[str, _Source]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, key_value_heads = config["num_attention_heads"], config["num_key_value_heads"]
    query, key = heads * config["head_dim"], key_value_heads * config["head_dim"]
    yield "input_layernorm.weight", _Source("attn_norm.weight", (hidden,))
    yield "post_attention_layernorm.weight", _Source("ffn_norm.weight", (hidden,))
    shapes = {
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (key, hidden),
        "attn_output": (hidden, query),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    rotary = {"attn_q": heads, "attn_k": key_value_heads}
    for module, name in (ATTENTION | MLP).items():
        yield f"{name}.weight", _Source(f"{module}.weight", shapes[module], rotary.get(module, 0))
        if config["attention_bias" if module in ATTENTION else "mlp_bias"]:
            yield f"{name}.bias", _Source(f"{module}.bias", shapes[module][:1], rotary.get(module, 0))
