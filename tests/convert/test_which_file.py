"""Which of several weight files counts: the one that transformers loads."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from checkpoints import assert_same_logits, torch, write_model
from safetensors.numpy import load_file, save_file

from barber_jax.console.errors import BarberError
from barber_jax.convert import __main__ as converter
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.hf_folder import WEIGHTS

NORM = "model.norm.weight"
SECOND = "model.layers.1."
"""Tensors from here on are in the second shard."""


def write_bin(tensors, path):
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, path)


FORMATS = {
    "safetensors": ("model", ".safetensors", lambda tensors, path: save_file(tensors, path, {"format": "pt"})),
    "bin": ("pytorch_model", ".bin", write_bin),
}


class Folder:
    """A llama's folder to which files of weights are added; the model's norm says which of them counts."""

    def __init__(self, path: Path, form: str):
        self.path, (self.stem, self.ending, self._write) = path, FORMATS[form]
        write_model(path)
        self.tensors = load_file(path / WEIGHTS)
        (path / WEIGHTS).unlink()
        self.single = path / f"{self.stem}{self.ending}"
        self.index = path / f"{self.stem}{self.ending}.index.json"

    def write(self, file, value, names=None):
        """Write some of the tensors, all if None, with a norm full of `value`."""
        tensors = {name: self.tensors[name] for name in names or self.tensors}
        if NORM in tensors:
            tensors[NORM] = np.full_like(tensors[NORM], value)
        self._write(tensors, self.path / file)

    def shards(self, value, **changes):
        """Write two shards, the norm in the second, and their index, with `changes` to its weight_map."""
        names, files = sorted(self.tensors), [f"{self.stem}-{i}-of-2{self.ending}" for i in (1, 2)]
        table = {name: files[name >= SECOND] for name in names}
        assert set(table.values()) == set(files)
        for file in files:
            self.write(file, value, [name for name in names if table[name] == file])
        table = {name: file for name, file in (table | changes).items() if file}
        self.index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
        return files

    @property
    def norm(self):
        """The norm's value as we read it."""
        return float(open_checkpoint(str(self.path)).fetch(NORM)[0])


@pytest.fixture(params=FORMATS)
def folder(request, tmp_path):
    return Folder(tmp_path / "ckpt", request.param)


def loaded(path):
    float32 = torch.float32
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype=float32)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    return model.eval()


def assert_as_transformers(path, norm):
    assert_same_logits(path, reference := loaded(path))
    assert float(reference.state_dict()[NORM][0]) == norm


def test_the_single_file_wins_over_an_index_and_its_shards(folder, tmp_path):
    folder.shards(1.0)
    folder.write(folder.single, 2.0)
    assert_as_transformers(folder.path, 2.0)
    assert folder.index not in open_checkpoint(str(folder.path)).sources()
    converter.run(["--ckpt", str(folder.path), "--out", str(tmp_path / "out")])
    assert_as_transformers(tmp_path / "out", 2.0)


def test_a_stale_index_without_its_shards(folder):
    for shard in folder.shards(1.0):
        (folder.path / shard).unlink()
    with pytest.raises(
        BarberError, match=rf"fetch the missing shard, or delete {folder.index.name} if it is a leftover"
    ):
        open_checkpoint(str(folder.path))
    folder.write(folder.single, 2.0)
    assert_as_transformers(folder.path, 2.0)


def test_shards_without_the_single_file(folder):
    first, last = folder.shards(1.0)
    assert_as_transformers(folder.path, 1.0)
    assert [path.name for path in open_checkpoint(str(folder.path)).sources()] == [
        "config.json",
        folder.index.name,
        first,
        last,
    ]


def test_the_last_of_two_shards_that_hold_one_tensor(folder):
    first, last = folder.shards(1.0)
    earlier = [name for name in folder.tensors if name < SECOND or name == NORM]
    # Whatever the index says.
    for file in (first, last):
        folder.shards(1.0, **{NORM: file})
        # A leftover beside the true one.
        folder.write(first, 5.0, earlier)
        assert_as_transformers(folder.path, 1.0)


def test_a_tensor_that_the_index_does_not_name(folder):
    folder.shards(3.0, **{NORM: None})
    assert_as_transformers(folder.path, 3.0)


def test_safetensors_shards_win_over_a_single_bin(tmp_path):
    folder = Folder(tmp_path / "ckpt", "safetensors")
    folder.shards(1.0)
    write_bin(folder.tensors | {NORM: folder.tensors[NORM] * 0 + 2}, folder.path / "pytorch_model.bin")
    assert_as_transformers(folder.path, 1.0)


def test_no_exported_shard_is_taken_for_the_whole_model(tmp_path):
    folder = Folder(tmp_path / "ckpt", "bin")
    table = {name: "rest.bin" if name == NORM else "model.bin" for name in folder.tensors}
    for file in set(table.values()):
        folder.write(file, 4.0, [name for name in table if table[name] == file])
    folder.index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    converter.run(["--ckpt", str(folder.path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out" / WEIGHTS).exists()
    assert_as_transformers(tmp_path / "out", 4.0)


def test_a_file_named_in_the_configuration_is_refused(folder):
    folder.write(folder.single, 1.0)
    assert folder.norm == 1.0
    path = folder.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(
        BarberError, match=r"transformers_weights 'other\.safetensors' is not supported; give that file"
    ):
        open_checkpoint(str(folder.path))
