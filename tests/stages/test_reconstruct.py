"""Reconstruction as a stage, and the samples of its steps."""

import jax.numpy as jnp
import numpy as np
import pytest
from stage_contract import StageContract

from barber_jax.forward.streams import Stream
from barber_jax.stages import training


class TestReconstruct(StageContract):
    stage = "reconstruct"
    options = ("--no-rebuild", "--reconstruct", 6, "--reconstruct-batch", 4, "--reconstruct-scope", "all")
    swaps = False


@pytest.mark.slow
class TestEverythingInRounds(StageContract):
    stage = "reconstruct"
    options = ("--alpha", 0.2, "--refine", 3, "--reconstruct", 4, "--reconstruct-batch", 4, "--rounds", 2)
    mesh_agreement = 0.99


@pytest.mark.parametrize("size", [1, 2, 4])
def test_steps_take_the_same_samples_from_host_memory(size):
    states = np.random.default_rng(0).standard_normal((8 // size, size, 3, 2)).astype(np.float32)
    chosen = training.schedule(8, 3, 4, seed=5)

    def samples(offload):
        chunks = list(states[:, None]) if offload else [states]
        stream, target = (Stream([jnp.asarray(sign * chunk) for chunk in chunks], offload) for sign in (1, -1))
        for hidden, wanted, order in training.batches(stream, target, chosen, 1):
            np.testing.assert_array_equal(hidden, -wanted)
            for step in order:
                places = step.reshape(-1, 2)
                yield np.asarray(hidden)[places[:, 0], places[:, 1]]

    on_device, on_host = list(samples(False)), list(samples(True))
    assert len(on_device) == len(on_host) == 3
    np.testing.assert_array_equal(on_device, on_host)
    np.testing.assert_array_equal(on_device, states.reshape(8, 3, 2)[chosen])
