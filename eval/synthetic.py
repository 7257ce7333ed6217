"""Write a random LLaMA checkpoint of any size, tensor by tensor: to measure memory and speed, not masks.

    python -m barber_jax.eval.synthetic FOLDER --blocks 32

writes LLaMA-7B's shape in bfloat16, 13 GB in shards.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
import tyro

from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.files import writing
from barber_jax.console.locks import output_lock
from barber_jax.console.outputs import new_folder
from barber_jax.convert.checkpoint import split_files
from barber_jax.convert.hf_folder import INDEX
from barber_jax.convert.safetensors_writer import SafetensorsWriter

DTYPE = np.dtype(ml_dtypes.bfloat16)
POOL = 1 << 20
"""Random numbers drawn for a tensor; a larger tensor repeats them, so that it is written at the disk's speed."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a LLaMA model.

    Attributes:
        blocks: decoder blocks.
        hidden: D.
        intermediate: F.
        heads: H.
        kv_heads: key-value heads; None: H.
        vocabulary: tokens.
    """

    blocks: int = 32
    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    kv_heads: int | None = None
    vocabulary: int = 32000

    def __post_init__(self):
        for name, size in vars(self).items():
            if size is not None and size < 1:
                raise BarberError(f"{name} {size} must be at least 1")
        if self.hidden % (2 * self.heads) or self.heads % (self.kv_heads or self.heads):
            raise BarberError("heads must divide hidden into even head sizes, and kv-heads must divide heads")

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face tensor name -> shape."""
        hidden, values = self.hidden, self.hidden // self.heads * (self.kv_heads or self.heads)
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, hidden)}
        for index in range(self.blocks):
            layer = f"model.layers.{index}."
            out |= {f"{layer}self_attn.{x}_proj.weight": (hidden, hidden) for x in "qo"}
            out |= {f"{layer}self_attn.{x}_proj.weight": (values, hidden) for x in "kv"}
            out |= {f"{layer}mlp.{x}_proj.weight": (self.intermediate, hidden) for x in ("gate", "up")}
            out[f"{layer}mlp.down_proj.weight"] = (hidden, self.intermediate)
            out |= {f"{layer}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        return out | {"model.norm.weight": (hidden,), "lm_head.weight": (self.vocabulary, hidden)}

    @property
    def config(self) -> dict:
        """Content of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads or self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 16384,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig(Shape):
    """Write a random LLaMA checkpoint in bfloat16."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder to create."""
    shard: int = 5 * 10**9
    """Bytes of one weight file at most."""

    def __post_init__(self):
        # Not for `folder`, which is no size.
        Shape.__post_init__(Shape(**{name: getattr(self, name) for name in Shape.__dataclass_fields__}))


def write(folder: Path, shape: Shape, shard: int = 5 * 10**9) -> None:
    """Write the checkpoint; weights are normal with a standard deviation of 0.02, norms 1.

    Args:
        folder: is created.
        shard: bytes of one weight file at most.

    Raises:
        BarberError: it exists, or cannot be written.
    """
    tensors = shape.tensors
    files = split_files({name: int(np.prod(size)) * DTYPE.itemsize for name, size in tensors.items()}, shard)
    rng = np.random.default_rng(0)
    if folder.exists():
        raise BarberError(f"{folder} exists; name another folder")
    with new_folder(folder) as folder, writing(folder):
        (folder / "config.json").write_text(json.dumps(shape.config, indent=1), encoding="utf-8")
        for file in sorted(set(files.values())):
            held = {name: (DTYPE, tensors[name]) for name in tensors if files[name] == file}
            with SafetensorsWriter(folder / file, held, {"format": "pt"}) as writer:
                for name, (_, size) in held.items():
                    writer.write(name, np.ones(size, DTYPE) if len(size) == 1 else _random(rng, size))
        if len(set(files.values())) > 1:
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")


def _random(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    return np.resize((rng.standard_normal(POOL, np.float32) * 0.02).astype(DTYPE), size)


def run(arguments: list[str] | None = None) -> None:
    """Command line: write the checkpoint."""
    config = parse(SyntheticConfig, "barber_jax.eval.synthetic", arguments)
    with output_lock(config.folder):
        write(config.folder, config, config.shard)


if __name__ == "__main__":
    exit_with_one_line(run)
