"""The writer of result folders: an index for every layout, and nothing published that does not fit its dtype."""

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoints import assert_same_logits, write_model, write_reference
from safetensors import safe_open

from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.export import MASKS, START_MASKS, FolderWriter
from barber_jax.convert.finite import require_finite
from barber_jax.convert.hf_folder import INDEX

UP = "model.layers.1.mlp.up_proj.weight"


def export(out, source, pruned=(UP,), save_start=True):
    """Write a checkpoint as a run does that prunes nothing of `pruned`."""
    checkpoint = open_checkpoint(str(source))
    with FolderWriter(out, checkpoint, pruned, save_start=save_start) as writer:
        for name in pruned:
            weight = checkpoint.read(name)
            writer.write_pruned(name, weight, np.ones(weight.shape, bool))
            if save_start:
                writer.write_start_mask(name, np.ones(weight.shape, bool))
        writer.finish(set(pruned))
        writer.publish()
    return out


@pytest.mark.parametrize("shard_size", [10**9, 20_000], ids=["one file", "shards"])
def test_the_index_names_every_weight_and_no_mask(tmp_path, shard_size):
    write_model(tmp_path / "dense", shard_size=shard_size)
    out = export(tmp_path / "out", tmp_path / "dense")
    content = json.loads((out / INDEX).read_text())
    table, held = content["weight_map"], {}
    for file in set(table.values()):
        with safe_open(out / file, "np") as handle:
            held |= {name: (file, handle.get_tensor(name)) for name in handle.keys()}  # noqa: SIM118
    assert table == {name: file for name, (file, _) in held.items()}
    assert content["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in held.values())
    # What a loader that goes by the index leaves out.
    others = {path.name for path in out.glob("*.safetensors")} - set(table.values())
    assert others == {MASKS, START_MASKS}


def test_transformers_and_our_reader_load_a_single_file_with_its_index(tmp_path):
    transformers = pytest.importorskip("transformers")
    reference = write_reference(tmp_path / "dense")
    out = export(tmp_path / "out", tmp_path / "dense")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in reference.state_dict().items():
        assert (loaded.state_dict()[name] == tensor).all(), name
    assert_same_logits(out, reference)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_never_published(tmp_path, dtype, value):
    write_model(tmp_path / "dense", dtype=np.dtype(dtype).name)
    checkpoint = open_checkpoint(str(tmp_path / "dense"))
    weight = checkpoint.read(UP).copy()
    weight[3, 5] = value
    mask = np.ones(weight.shape, bool)
    said = rf"tensor {UP} gets values that do not fit {np.dtype(dtype).name}"
    with pytest.raises(BarberError, match=said), FolderWriter(tmp_path / "out", checkpoint, [UP]) as writer:
        writer.write_pruned(UP, weight, mask)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}
    # Where the mask prunes it, it is written as zero.
    mask[3, 5] = False
    with FolderWriter(tmp_path / "out", checkpoint, [UP]) as writer:
        writer.write_pruned(UP, weight, mask)
        writer.finish({UP})
        writer.publish()
    assert open_checkpoint(str(tmp_path / "out")).read(UP)[3, 5] == 0


def test_the_largest_finite_values_and_integers_fit():
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        require_finite("w", np.array([ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min], dtype))
    require_finite("w", np.array([255], np.uint8))
    require_finite("w", np.zeros((0, 4), np.float16))
    with pytest.raises(BarberError, match=r"tensor w .* float16, .*\(largest 65504\).*bfloat16 or float32"):
        require_finite("w", np.array([np.inf], np.float16))
