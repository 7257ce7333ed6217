"""Write a random LLaMA checkpoint of any size, tensor by tensor: to measure memory and speed, not to test masks.

    python tests/synthetic.py FOLDER --blocks 32 --hidden 4096 --intermediate 11008 --heads 32

writes LLaMA-7B's shape in bfloat16, 13 GB in shards.
"""

import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np

from barber_jax.convert.checkpoint import split_files
from barber_jax.convert.hf_folder import INDEX
from barber_jax.convert.safetensors_writer import SafetensorsWriter

DTYPE = np.dtype(ml_dtypes.bfloat16)


def shapes(blocks: int, hidden: int, intermediate: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor name -> shape."""
    out = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(blocks):
        layer = f"model.layers.{i}."
        out |= {f"{layer}self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        out |= {f"{layer}mlp.{x}_proj.weight": (intermediate, hidden) for x in ("gate", "up")}
        out[f"{layer}mlp.down_proj.weight"] = (hidden, intermediate)
        out |= {f"{layer}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    return out | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def write(folder: Path, blocks: int, hidden: int, intermediate: int, heads: int, vocabulary: int, shard: int) -> None:
    """Write the folder; weights are normal with a standard deviation of 0.02, norms 1."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tensors = shapes(blocks, hidden, intermediate, vocabulary)
    files = split_files({name: int(np.prod(shape)) * DTYPE.itemsize for name, shape in tensors.items()}, shard)
    rng = np.random.default_rng(0)
    for file in sorted(set(files.values())):
        held = {name: (DTYPE, tensors[name]) for name in tensors if files[name] == file}
        with SafetensorsWriter(folder / file, held, {"format": "pt"}) as writer:
            for name, (_, shape) in held.items():
                # Shifted pieces of one random pool: distinct enough, and written at the disk's speed.
                if len(shape) == 1:
                    writer.write(name, np.ones(shape, DTYPE))
                    continue
                pool = (rng.standard_normal(1 << 20, np.float32) * 0.02).astype(DTYPE)
                writer.write(name, np.resize(pool, shape))
    if len(set(files.values())) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for option, default in (
        ("blocks", 32),
        ("hidden", 4096),
        ("intermediate", 11008),
        ("heads", 32),
        ("vocabulary", 32000),
        ("shard", 5 * 10**9),
    ):
        parser.add_argument(f"--{option}", type=int, default=default)
    write(**vars(parser.parse_args()))
