"""Generation with a key-value cache: a Flax module's and a resident model's, greedy and sampled."""

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from checkpoints import COMMON, FAMILIES, IDS, torch

import barber_jax
from barber_jax import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.devices.mesh import Devices
from barber_jax.forward import resident as resident_module
from barber_jax.forward.generation import Sampling, choose, run
from barber_jax.forward.resident import ResidentModel
from barber_jax.models import build_model

PROMPTS, LENGTHS, TOKENS = IDS[0][:, :9], [9, 4, 7], 12


@pytest.fixture(scope="module")
def llama(tiny):
    return barber_jax.load(tiny())[0]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 5}),
    ],
    ids=[*FAMILIES, "tied", "window"],
)
def test_greedy_is_transformers_greedy(tiny, family, changes):
    folder = tiny(family, **changes)
    float32 = torch.float32
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=float32).eval()
    reference.generation_config.eos_token_id = None
    given = barber_jax.generate(barber_jax.load(folder)[0], PROMPTS, LENGTHS, tokens=TOKENS)
    for row, length, prompt in zip(given, LENGTHS, PROMPTS, strict=True):
        ids = torch.as_tensor(prompt[None, :length]).long()
        mask = torch.ones_like(ids)
        wanted = reference.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
        np.testing.assert_array_equal(row, wanted[0, length:].numpy())


def test_padding_does_not_matter(llama):
    other = PROMPTS.copy()
    for row, length in zip(other, LENGTHS, strict=True):
        row[length:] = 5
    np.testing.assert_array_equal(
        barber_jax.generate(llama, PROMPTS, LENGTHS, tokens=TOKENS),
        barber_jax.generate(llama, np.pad(other, ((0, 0), (0, 90))), LENGTHS, tokens=TOKENS),
    )


def test_after_the_end_there_is_only_the_end(llama):
    free = barber_jax.generate(llama, PROMPTS, LENGTHS, tokens=50)
    end = free[0, 3]
    given = barber_jax.generate(llama, PROMPTS, LENGTHS, tokens=50, end=int(end))
    for row, without in zip(given, free, strict=True):
        at = int(np.argmax(without == end)) if end in without else 50
        np.testing.assert_array_equal(row[:at], without[:at])
        assert (row[at:] == end).all()


def test_a_draw_depends_on_its_seed_and_number_alone(llama):
    first = barber_jax.generate(llama, PROMPTS, LENGTHS, tokens=TOKENS, temperature=1.0, seed=3)
    alone = barber_jax.generate(llama, PROMPTS[:2], LENGTHS[:2], tokens=5, temperature=1.0, seed=3)
    np.testing.assert_array_equal(alone, first[:2, :5])
    other = barber_jax.generate(llama, PROMPTS, LENGTHS, tokens=TOKENS, temperature=1.0, seed=4)
    assert (first != other).mean() > 0.5
    same = barber_jax.generate(llama, np.repeat(PROMPTS[:1], 3, axis=0), tokens=TOKENS, temperature=1.0)
    assert (same[0] != same[1]).any() and (same[1] != same[2]).any()
    # A position has draws of its own.
    assert len(set(same[0])) > 3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_models_distribution(llama, temperature):
    """The first two tokens of 4000 draws: frequencies against probabilities, given the first for the second."""
    count = 4000
    drawn = barber_jax.generate(llama, np.repeat(PROMPTS[:1], count, axis=0), tokens=2, temperature=temperature, seed=1)

    def distance(tokens, ids):
        logits = np.asarray(llama(ids)[0, -1], np.float64) / temperature
        probability = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        return np.abs(np.bincount(tokens, minlength=COMMON["vocab_size"]) / len(tokens) - probability).sum() / 2

    # Expected about sqrt(2 V / (pi n)) / 2 at most: 0.06 for 97 tokens and 4000 draws.
    assert distance(drawn[:, 0], PROMPTS[:1]) < 0.08
    common = np.bincount(drawn[:, 0]).argmax()
    following = drawn[drawn[:, 0] == common, 1]
    assert len(following) > 100
    assert distance(following, np.append(PROMPTS[:1], [[common]], axis=1)) < 0.8 * np.sqrt(97 / len(following))


def test_temperature_near_0_is_greedy(llama):
    np.testing.assert_array_equal(
        barber_jax.generate(llama, PROMPTS, LENGTHS, tokens=TOKENS, temperature=1e-4),
        barber_jax.generate(llama, PROMPTS, LENGTHS, tokens=TOKENS),
    )


@pytest.mark.parametrize("mesh", [None, (3, 2)], ids=["one device", "3x2"])
def test_a_resident_model_draws_the_same(tiny, llama, mesh):
    checkpoint = open_checkpoint(str(tiny()))
    resident = ResidentModel(checkpoint, build_model(checkpoint.config, np.dtype("float32")), Devices.of(mesh))
    for temperature in (0.0, 1.0):
        sampling = Sampling.of(temperature, 3, np.arange(3))
        given = resident.generate(PROMPTS, np.asarray(LENGTHS), TOKENS, 4, lambda made: False, sampling)
        wanted = barber_jax.generate(llama, PROMPTS, LENGTHS, tokens=TOKENS, temperature=temperature, seed=3)
        np.testing.assert_array_equal(given, wanted)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ids": PROMPTS[0]}, r"token ids \[S, L\], not int32 of shape \[9\]"),
        ({"ids": PROMPTS.astype(np.float32)}, r"token ids \[S, L\], not float32"),
        ({"ids": PROMPTS - 50}, "the model has 97 tokens"),
        ({"lengths": [9, 0, 7]}, "lengths must be 3 numbers from 1 to 9"),
        ({"lengths": [9, 7]}, "lengths must be 3 numbers"),
        ({"tokens": 56}, "56 tokens after prompts of up to 9: the model has 64 positions"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        # In float32 both are something else: 0 and infinity.
        ({"temperature": 1e-46}, "temperature 1e-46 is not 0"),
        ({"temperature": 1e39}, "temperature 1e"),
        ({"ids": PROMPTS.astype("m8[s]")}, r"token ids \[S, L\], not timedelta64"),
        ({"lengths": [9.5, 1.0, 7.0]}, "lengths must be 3 numbers"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 1.5}, "seed 1.5"),
        ({"ids": PROMPTS.astype("timedelta64[s]")}, "token ids .* not timedelta64"),
        ({"ids": [[1, 2], [3]]}, "token ids .* not object"),
        ({"lengths": [9.0, 7.0, 7.0]}, "lengths must be 3 numbers"),
        ({"tokens": 2.5}, "tokens 2.5 is not a number of tokens"),
        ({"end": 97}, "end 97 is not one of the model's 97 tokens"),
        ({"end": 1.5}, "end 1.5"),
        # In float32 the one is 0 and the other infinite.
        ({"temperature": 1e-46}, "temperature 1e-46"),
        ({"temperature": 1e39}, r"temperature 1e\+39"),
        ({"temperature": "warm"}, "temperature warm"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_does_not_fit_the_model(llama, changes, said):
    with pytest.raises(BarberError, match=said):
        barber_jax.generate(llama, **{"ids": PROMPTS, "lengths": LENGTHS, "tokens": 4, **changes})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_give_no_token(temperature):
    drawing, position = Sampling.of(temperature, 0, np.arange(3)), np.zeros(3, np.int32)
    token = choose(jnp.array([[0.0, 1.0], [0.0, jnp.nan], [jnp.inf, 0.0]]), position, drawing)
    assert token[0] in (0, 1) and token[1:].tolist() == [-1, -1]
    with pytest.raises(BarberError, match=r"logits are NaN or Inf.*use float32 or bfloat16"):
        steps = (lambda *_, **__: (token, None)), (lambda *_, **__: (token[:, None], token, None))
        run(*steps, np.zeros((3, 2), int), np.full(3, 2), 1, 1, lambda made: False, drawing)


def test_figures_of_logits_that_are_not_finite_are_refused(tiny, monkeypatch):
    """Of answers that are all NaN, the first would count as chosen."""
    checkpoint = open_checkpoint(str(tiny()))
    resident = ResidentModel(checkpoint, build_model(checkpoint.config, jnp.float32), Devices())
    monkeypatch.setattr(resident_module, "_hidden_states", lambda *_: None)
    monkeypatch.setattr(resident_module, "_log_likelihoods", lambda *_: (np.array([-1.0, np.nan]), np.zeros(2, bool)))
    with pytest.raises(BarberError, match="logits are NaN or Inf"):
        resident.log_likelihoods(np.zeros((1, 2), np.int32), *[np.zeros(2, np.int32)] * 3)
