"""A folder as `barber_jax.recover` leaves it, without its weights, and the run.json of the checkpoint before."""

import json
from types import SimpleNamespace

import jax
import numpy as np
from safetensors.numpy import save_file

from barber_jax.masks.mask_file import mask_metadata, pack
from barber_jax.reports.recover_record import recover_record

MATRICES = ("self_attn.q_proj", "mlp.up_proj")
MODEL = SimpleNamespace(model_type="llama", layers=2, hidden=8)
TEXT = "texts/held_out.txt"


def run_json(**options):
    """Content of run.json of a pruned checkpoint of two blocks."""
    given = {"ckpt": "someone/model", "out": "pruned", "method": "wanda", "masks": None, "sparse_ckpt": None}
    given |= {"sparsity": 0.5, "pattern": "2:4", "rebuild": False, "seed": 0, "samples": 4, "length": 16}
    given |= {"compute_dtype": "float32", "granularity": "output1", "alpha": 0.01, "metric": "wd", **options}
    blocks = []
    for index in range(2):
        subs = [
            {"name": name.partition(".")[0], "sparsity": 0.5, "matrices": {name: {"size": 64, "pruned": 32}}}
            for name in (f"model.layers.{index}.{matrix}.weight" for matrix in MATRICES)
        ]
        blocks.append({"block": index, "sub_blocks": subs, "seconds": {"start": 1.0}})
    return {
        "format": "barber_jax.run",
        "version": 2,
        "options": given,
        "versions": {"barber_jax": "0.2"},
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "model": {"model_type": "llama", "blocks": 2, "hidden": 8},
        "blocks": blocks,
        "totals": {
            **{"weights": 256, "pruned": 128, "sparsity": 0.5, "seconds": 60.0},
            "seconds_per_stage": {"start": 2.0},
        },
        "peak_memory": {"host_bytes": 2**30},
        "perplexity": measured(34.9),
    }


def measured(perplexity):
    return {"source": TEXT, "perplexity": perplexity, "windows": 7, "length": 64}


def recover_json(steps=40, distilled=True, **changes):
    """Content of recover.json, as barber_jax.recover composes it; `changes` of arguments of `recover_record`."""
    options = {"ckpt": "pruned", "out": "recovered", "teacher": "someone/model" if distilled else None}
    options |= {"text": "prose.txt", "mix": 0.25, "scope": "weights", "rate": 0.002, "seed": 0, "length": 64}
    losses = lambda step: {"loss": 2 / step, "kl": 1 / step if distilled else None, "cross_entropy": 5.0}  # noqa: E731
    training = [{"step": n, **losses(n), "gradient_norm": 0.5, "rate": 0.002 / n} for n in range(1, steps + 1)]
    evaluations = [{"step": n, **losses(n + 1), "seconds": 1.5} for n in range(0, steps + 1, 10)]
    arguments = {
        "commands": {"recover": ["--ckpt", "pruned", "--text", "my prose.txt"], "prune": ["--ckpt", "someone/model"]},
        "source": {"checkpoint": "pruned", "run": run_json()},
        **{"sparsity": 0.5, "pattern": "2:4", "steps": steps, "tokens_per_step": 1000},
        **{"training": training, "evaluations": evaluations, "best_step": steps // 10 * 10, "written": "best"},
        "movement": [
            {"block": n, "weights": {name: 0.01 * (n + i + 1) for i, name in enumerate(MATRICES)}} for n in range(2)
        ],
        **{"seconds": 100.0, "seconds_training": 80.0, "operations_per_token": 1e6, "matmul_flops": 1e9},
        **{"dense_perplexity": measured(17.5), "start_perplexity": measured(34.9), "perplexity": measured(28.25)},
        **changes,
    }
    return recover_record(options, MODEL, jax.devices()[:1], **arguments)


def write_masks(folder, seed=0):
    """Write masks.safetensors of such a checkpoint."""
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{index}.{matrix}.weight" for index in range(2) for matrix in MATRICES]
    packed = {name: pack(rng.permuted([[True] * 4 + [False] * 4] * 8, axis=1)) for name in names}
    save_file(packed, folder / "masks.safetensors", mask_metadata("2:4", 0.5, dict.fromkeys(names, (8, 8))))


def write_recovered(folder, content=None):
    """Write recover.json and masks.safetensors; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recover.json").write_text(json.dumps(content or recover_json()))
    write_masks(folder)
    return folder
