"""What a recovery writes of the trained parameters."""

import numpy as np
from checkpoints import write_model
from safetensors.numpy import load_file, save_file

from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.export import FolderWriter
from barber_jax.devices.mesh import Devices
from barber_jax.models import build_model
from barber_jax.recovery.program import load
from barber_jax.recovery.result import write_result
from barber_jax.recovery.source import MaskSource

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_a_stored_copy_of_a_trained_embedding_stays_its_copy(tmp_path, capsys):
    """Else the two would differ, and the model have another head than the one that was trained."""
    write_model(tmp_path / "tied", tie_word_embeddings=True)
    weights = tmp_path / "tied" / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {HEAD: tensors[EMBEDDING].copy()}, weights, {"format": "pt"})
    checkpoint = open_checkpoint(str(tmp_path / "tied"))
    model, devices = build_model(checkpoint.config, np.dtype("float32")), Devices()
    values = load(checkpoint, model, devices)
    values["embed.embed_tokens.embedding"] += 1
    masks = MaskSource(lambda name: np.ones(checkpoint.shape(name), bool), "unstructured", 0.0)
    with FolderWriter(tmp_path / "out", checkpoint, model.pruned_names()) as writer:
        write_result(checkpoint, model, masks, devices, writer, values)
        writer.publish()
    written = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(written[EMBEDDING], tensors[EMBEDDING] + 1)
    np.testing.assert_array_equal(written[HEAD], written[EMBEDDING])
    open_checkpoint(str(tmp_path / "out"))
    assert capsys.readouterr().err == ""
