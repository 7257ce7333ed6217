"""Tensors of two models that have the same shapes: of a second checkpoint, or of files that were replaced meanwhile."""

import os
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import test_gguf as gguf
import test_tied_head as layouts
from checkpoints import BASE, COMMON
from safetensors.numpy import save_file

from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.parameters import check_same_settings
from barber_jax.masks.mask_file import mask_metadata, pack, read_masks
from barber_jax.models import build_model

NORM = "model.norm.weight"


def check(family, first, second, **options):
    sizes = {**COMMON, "ffn_dim": 48} if family == "opt" else {**BASE, "max_window_layers": 2}
    configs = [{"model_type": family, **sizes, **changes} for changes in (first, second)]
    checkpoint = SimpleNamespace(config=configs[1], location="SECOND")
    check_same_settings(build_model(configs[0], jnp.float32), "FIRST", checkpoint, "give the same", **options)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
OTHERS = [
    ("llama", {"rms_norm_eps": 1e-3}, "its norm_epsilon .config.json. is 0.001, that of FIRST is 1e-06; give the same"),
    ("llama", {"hidden_act": "gelu"}, "its activation"),
    ("mistral", {"rope_scaling": YARN}, "its rope kind .config.json. is yarn, that of FIRST is default"),
    ("mistral", {"sliding_window": 8}, "its window"),
    ("qwen2", {"rope_theta": 1e6}, "its rope theta"),
    ("qwen3", {"num_attention_heads": 2, "num_key_value_heads": 1}, "its heads"),
    ("opt", {"do_layer_norm_before": False}, "its pre_norm"),
    ("llama", {"model_type": "gpt2"}, "SECOND: config.json: model_type 'gpt2'"),
    ("llama", {"model_type": "opt", "ffn_dim": 48}, "its family"),
]


@pytest.mark.parametrize(("family", "changes", "said"), OTHERS, ids=str)
def test_a_setting_that_differs_is_named(family, changes, said):
    with pytest.raises(BarberError, match=said):
        check(family, {}, changes)
    check(family, {}, {})


def test_what_may_differ():
    check("llama", {}, {"max_position_embeddings": 4096})
    check("llama", {}, {"vocab_size": 98}, but=["vocabulary"])
    # Tied in the second alone, its head is its embedding; tied in the first alone, its own head would be left out.
    check("llama", {"tie_word_embeddings": False}, {"tie_word_embeddings": True})
    with pytest.raises(BarberError, match=r"its tied .config.json. is False"):
        check("llama", {"tie_word_embeddings": True}, {"tie_word_embeddings": False})


@pytest.mark.parametrize("form", [*layouts.FORMATS, "gguf"])
def test_a_checkpoint_that_is_replaced_while_it_is_read(tmp_path, form):
    """As by another command that publishes its result there: half of each would be a model that nobody has made."""
    now, later = (made(tmp_path / name, form) for name in ("now", "later"))
    checkpoint = open_checkpoint(str(now))
    checkpoint.fetch(NORM)
    shutil.rmtree(now) if now.is_dir() else now.unlink()
    later.rename(now)
    with pytest.raises(BarberError, match="replaced or removed while it was read; run the command again"):
        checkpoint.fetch(NORM)


def made(path, form):
    if form == "gguf":
        return gguf.write(path.with_suffix(".gguf"), gguf.gguf_tensors(gguf.hf_tensors()))
    layouts.FORMATS[form](path, layouts.source(path, "llama", False, "different"))
    return path


def write_masks(path, seed):
    mask = np.random.default_rng(seed).random((2, 4)) < 0.5
    save_file({"w": pack(mask)}, path, mask_metadata("unstructured", 0.5, {"w": (2, 4)}))


def test_masks_that_are_replaced_while_they_are_used(tmp_path):
    path, copy = tmp_path / "masks.safetensors", tmp_path / "copy"
    write_masks(path, 0)
    masks = read_masks(path)
    masks.copy(copy)
    assert copy.read_bytes() == path.read_bytes()
    write_masks(path, 1)
    # Clocks of file systems may take some milliseconds a tick.
    os.utime(path, (0, 0))
    with pytest.raises(BarberError, match="replaced or removed while it was read"):
        masks.copy(copy)
