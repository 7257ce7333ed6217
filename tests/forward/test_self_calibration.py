"""Calibration samples that a model writes: drawn from its own distribution, with a cache, on any devices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from checkpoints import our_logits

from barber_jax import BarberError
from barber_jax.console.progress import Progress
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.devices.mesh import Devices
from barber_jax.forward import self_calibration
from barber_jax.forward.generation import Sampling, _draw, choose
from barber_jax.forward.self_calibration import Boundary, batch_size, boundary_of, write_samples
from barber_jax.models import build_model

BEGIN = Boundary("begin", 1, (2,))
OFTEN = Boundary("begin", 1, tuple(range(20, 50)))
"""Many tokens end a document, so that many documents end."""


def written(folder, mesh=None, samples=4, length=14, seed=3, boundary=BEGIN):
    checkpoint = open_checkpoint(str(folder))
    model = build_model(checkpoint.config, jnp.dtype("float32"))
    sizes = {"samples": samples, "length": length, "seed": seed}
    with Progress(silent=True) as progress:
        return write_samples(checkpoint, model, Devices.of(mesh), **sizes, boundary=boundary, progress=progress)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Caches grow twice."""
    monkeypatch.setattr(self_calibration, "FIRST_CAPACITY", 4)


@pytest.mark.parametrize(
    ("family", "changes", "mesh"),
    [("llama", {}, None), ("llama", {}, (2, 2)), ("opt", {}, None), ("mistral", {"sliding_window": 5}, (1, 4))],
    ids=["llama", "llama 2x2", "opt", "window 1x4"],
)
def test_each_token_is_drawn_given_all_before_it(tiny, family, changes, mesh):
    """The same draws, from the logits of a forward pass through whole sequences."""
    folder = tiny(family, **changes)
    ids = written(folder, mesh, boundary=OFTEN)
    assert ids.dtype == np.int32 and ids.shape == (4, 14) and (ids[:, 0] == 1).all()
    logits = our_logits(folder, ids=ids[None])
    sampling = Sampling.of(1.0, 3, np.arange(4))
    ended = np.isin(ids, OFTEN.ends)
    assert ended[:, :-1].any() and not ended[:, :-1].all(axis=1).any()
    draw = jax.jit(choose)
    for position in range(1, 14):
        drawn = draw(logits[:, position - 1], np.full(4, position, np.int32), sampling)
        wanted = np.where(ended[:, position - 1], OFTEN.token, drawn)
        np.testing.assert_array_equal(ids[:, position], wanted)


def test_a_sample_depends_on_its_seed_and_number_alone(tiny, monkeypatch):
    ids = written(tiny())
    np.testing.assert_array_equal(written(tiny(), samples=3, length=9), ids[:3, :9])
    monkeypatch.setattr(self_calibration, "MAX_BATCH", 3)
    # Two batches, of which the second has a row too many.
    np.testing.assert_array_equal(written(tiny(), samples=5)[:4], ids)
    other = written(tiny(), seed=4)
    assert (other[:, 1:] != ids[:, 1:]).mean() > 0.8
    assert len(np.unique(ids, axis=0)) == 4


def test_tokens_are_drawn_from_the_models_distribution(tiny, monkeypatch):
    count = 4000
    monkeypatch.setattr(self_calibration, "MAX_BATCH", count)
    drawn = written(tiny(), samples=count, length=2)[:, 1]
    logits = our_logits(tiny(), ids=np.array([[[1]]], np.int32))[0, 0].astype(np.float64)
    expected = count * np.exp(logits) / np.exp(logits).sum()
    observed = np.bincount(drawn, minlength=len(expected))
    rare = expected < 5
    pooled = [np.append(each[~rare], each[rare].sum()) for each in (observed, expected)]
    pooled = [each if rare.any() else each[:-1] for each in pooled]
    assert scipy.stats.chisquare(*pooled).pvalue > 0.01


def test_a_model_without_begin_and_end_begins_anywhere(tiny, monkeypatch):
    monkeypatch.setattr(self_calibration, "MAX_BATCH", 2000)
    first = written(tiny(), samples=2000, length=2, boundary=Boundary("random", None, ()))[:, 0]
    assert scipy.stats.chisquare(np.bincount(first, minlength=97)).pvalue > 0.01


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-24], ids=str)
def test_no_entry_of_weight_0_is_drawn(uniform):
    weights = np.zeros((2, 300), np.float32)
    weights[0, [3, 7, 290]] = 1e-30, 0.1, 0.2
    weights[1, 5] = 1e10
    drawn = jax.jit(_draw)(weights, jnp.full(2, uniform, jnp.float32))
    assert drawn.tolist() == [{0.0: 3, 0.3: 7}.get(uniform, 290), 5]


class Named(SimpleNamespace):
    """A checkpoint with this config.json, and a tokenizer with these special tokens, if any."""

    def tokenizer(self):
        if not self.special:
            raise BarberError("no tokenizer there")
        return SimpleNamespace(bos_token_id=self.special[0], eos_token_id=self.special[1])


@pytest.mark.parametrize(
    ("config", "special", "wanted"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2}, (5, 6), Boundary("begin", 1, (2,))),
        ({"bos_token_id": 0, "eos_token_id": [3, 0, 4]}, None, Boundary("begin", 0, (3, 4))),
        ({"bos_token_id": 2, "eos_token_id": 2}, None, Boundary("begin", 2, ())),
        ({"bos_token_id": None, "eos_token_id": [7, 8]}, (5, 6), Boundary("end", 7, ())),
        ({}, (5, 6), Boundary("begin", 5, (6,))),
        ({}, (None, 6), Boundary("end", 6, ())),
        ({}, (97, None), Boundary("random", None, ())),
        ({}, None, Boundary("random", None, ())),
    ],
    ids=["both", "several ends", "one token", "end alone", "tokenizer", "its end", "beyond the model", "nothing"],
)
def test_where_documents_begin_and_end(config, special, wanted):
    assert boundary_of(Named(config=config, special=special), 97) == wanted


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("given", [97, -1, True, "<s>", [1, None]], ids=str)
def test_an_entry_that_is_no_token(key, given):
    with pytest.raises(BarberError, match=rf"config.json: {key} .* is no token of the model's 97.*set it to null"):
        boundary_of(Named(config={key: given}, special=None), 97)


def test_as_many_sequences_at_a_time_as_fit():
    assert batch_size(64, 512, 1, 1000) == 64
    assert batch_size(100, 512, 1, 1000) == 50
    assert batch_size(4, 512, 1, 1000) == 4
    assert batch_size(6, 512, 4, 1000) == 8
    # 16 GiB of keys and values a sequence; 1 GiB.
    assert batch_size(64, 2**14, 2, 2**20) == 2
    assert batch_size(64, 2**10, 2, 2**20) == 8


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"length": 65}, "--length 65 is more than the model's 64"),
        ({"samples": 10**12}, "10+ samples of 14 tokens.*lower"),
    ],
    ids=["length", "samples"],
)
def test_sizes_that_no_model_can_write(tiny, sizes, said):
    with pytest.raises(BarberError, match=said):
        written(tiny(), **sizes)
