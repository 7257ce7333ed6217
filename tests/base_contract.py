"""What every criterion and every stage must pass, whatever it does: the common part of their base tests."""

import json

import numpy as np
import pytest
from checkpoints import FAMILIES
from cli import agreement, interrupted_after, masks_of, prune_masks

from barber_jax import prune

COMMON = ("--samples", 32, "--length", 8)
"""As many samples as hold out the same ones on every mesh here."""


def some(values, *quick):
    """Values for `parametrize`; those not named as quick are for `make slow-test`: each compiles everything anew."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


class Contract:
    """Base test of one criterion or stage.

    Attributes:
        options: command-line options that turn the criterion or stage on, and the default stages off.
        mesh_agreement: least fraction of weights on which masks of a mesh and of one device agree: rounding differs,
            and later blocks amplify the difference.
    """

    options: tuple = ()
    mesh_agreement = 0.9995

    @pytest.fixture
    def pruned(self, tiny, tiny_ids, tmp_path):
        """Prune a tiny model; returns (folder, masks)."""

        def run(name, *options, family="llama"):
            out = tmp_path / name
            line = [*COMMON, *self.options, "--save-start", *options]
            return out, prune_masks(out, tiny(family), tiny_ids, *line)

        return run

    def check(self, out, masks, start):
        """Assert what must hold for the masks, given the starting masks. All masks are HF name -> bool [out, in]."""
        raise NotImplementedError

    @pytest.mark.parametrize("family", some(FAMILIES, "llama", "opt"))
    def test_every_family(self, pruned, family):
        out, masks = pruned("out", family=family)
        self.check(out, masks, masks_of(out, "start_masks.safetensors"))

    def test_bfloat16(self, pruned):
        out, masks = pruned("out", "--compute-dtype", "bfloat16")
        self.check(out, masks, masks_of(out, "start_masks.safetensors"))

    @pytest.mark.parametrize("pattern", some(["2:4", "1:4"], "2:4"))
    def test_n_of_m_is_kept(self, pruned, pattern):
        _, masks = pruned("out", "--pattern", pattern)
        keep, of = map(int, pattern.split(":"))
        for name, mask in masks.items():
            assert (mask.reshape(-1, of).sum(axis=1) == keep).all(), name

    @pytest.mark.parametrize("mesh", some(["data=4", "data=2,model=2"], "data=2,model=2"))
    def test_a_mesh_gives_the_masks_of_one_device(self, pruned, mesh):
        _, one = pruned("one")
        out, many = pruned("many", "--mesh", mesh)
        assert agreement(one, many) >= self.mesh_agreement
        self.check(out, many, masks_of(out, "start_masks.safetensors"))
        assert sum(mask.sum() for mask in many.values()) == sum(mask.sum() for mask in one.values())

    def test_stopped_and_resumed_gives_the_same_bytes_as_run_twice(self, pruned, tiny, tiny_ids):
        whole, _ = pruned("whole")
        again, _ = pruned("again")
        assert contents(again) == contents(whole)
        with interrupted_after(1):
            pruned("resumed")
        line = ["--ckpt", tiny(), "--calibration", tiny_ids, "--out", whole.with_name("resumed"), *COMMON]
        prune.run([str(word) for word in [*line, *self.options, "--save-start", "--resume"]])
        assert contents(whole.with_name("resumed")) == contents(whole)


def contents(folder):
    """Bytes of every safetensors file, and every figure but the seconds of run.json."""
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
    blocks = json.loads((folder / "run.json").read_text())["blocks"]
    return files, [{key: value for key, value in block.items() if key != "seconds"} for block in blocks]


def counts(masks, axis):
    """Kept weights along an axis of each matrix."""
    return {name: mask.sum(axis=axis).tolist() for name, mask in masks.items()}


def same_counts(masks, start, axis):
    """Whether every output (axis 1), or every input (0), keeps as many weights as in the starting mask."""
    return counts(masks, axis) == counts(start, axis)


def zeros_are_the_masks(out, masks):
    """Whether the weights of a folder are zero where the masks prune, and nowhere else."""
    from safetensors.numpy import load_file

    tensors = load_file(out / "model.safetensors")
    return all(np.array_equal(tensors[name] != 0, mask) for name, mask in masks.items())
