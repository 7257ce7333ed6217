"""Hashes of what a run reads: of every byte, and of every file that matters."""

import json

import numpy as np
from checkpoints import write_model

from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.folder import ORBAX
from barber_jax.convert.hf_folder import INDEX, HFFolder
from barber_jax.convert.orbax_folder import write_orbax
from barber_jax.run.fingerprint import PIECE, array_fingerprint, fingerprint


def test_fingerprint_is_of_all_bytes(tmp_path):
    content = bytearray(np.random.default_rng(0).bytes(PIECE + 1000))
    seen = set()
    for at in (None, 0, PIECE - 1, PIECE, PIECE + 999):
        changed = bytearray(content)
        if at is not None:
            changed[at] ^= 1
        (tmp_path / "file").write_bytes(changed)
        seen.add(fingerprint(tmp_path / "file"))
    (tmp_path / "file").write_bytes(content[:-1])
    seen.add(fingerprint(tmp_path / "file"))
    assert len(seen) == 6
    (tmp_path / "copy").write_bytes(content[:-1])
    assert fingerprint(tmp_path / "copy") in seen


def test_array_fingerprint_is_of_dtype_shape_and_content():
    base = np.arange(6, dtype=np.int32).reshape(2, 3)
    others = [base.T, base.reshape(6), base.view(np.float32), base + 1, base[:0], base[:, :0], np.int32(0)]
    assert len({array_fingerprint(np.asarray(array)) for array in [base, *others]}) == len(others) + 1
    assert array_fingerprint(np.asfortranarray(base)) == array_fingerprint(base)


def test_sources_are_the_files_that_decide_what_a_checkpoint_holds(tmp_path):
    write_model(tmp_path / "whole")
    write_model(tmp_path / "sharded", shard_size=20_000)
    for folder in (tmp_path / "whole", tmp_path / "sharded"):
        (folder / "tokenizer.json").write_text("{}")
        (folder / "generation_config.json").write_text("{}")
    shards = sorted(set(json.loads((tmp_path / "sharded" / INDEX).read_text())["weight_map"].values()))
    assert len(shards) > 1
    for folder, files in [("whole", ["model.safetensors"]), ("sharded", [INDEX, *shards])]:
        wanted = [tmp_path / folder / file for file in ["config.json", *files]]
        assert open_checkpoint(str(tmp_path / folder)).sources() == wanted
    write_orbax(tmp_path / "whole", HFFolder(tmp_path / "whole"), None)
    (tmp_path / "whole" / "model.safetensors").unlink()
    sources = open_checkpoint(str(tmp_path / "whole")).sources()
    stored = {path.resolve() for path in (tmp_path / "whole" / ORBAX).rglob("*") if path.is_file()}
    assert {path.resolve() for path in sources} == stored | {(tmp_path / "whole" / "config.json").resolve()}
