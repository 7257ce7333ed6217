"""Bad input of a recovery: one line that names the culprit and the way out, before the long computation."""

import shutil

import numpy as np
import pytest
from checkpoints import write_model
from cli import prune_masks
from safetensors.numpy import load_file, save_file

from barber_jax.console.errors import BarberError
from barber_jax.console.progress import Progress
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.forward.self_calibration import boundary_of
from barber_jax.recovery import self_text
from barber_jax.recovery.inputs import prepare
from barber_jax.recovery.recover_config import RecoverConfig

SMALL = dict(length=16, batch=4, micro_batch=2, held_out=4, steps=2)


@pytest.fixture
def given(tiny, tiny_pruned, tiny_ids, tmp_path):
    """Options that are right."""
    return {"ckpt": str(tiny_pruned), "teacher": str(tiny()), "text": str(tiny_ids), "out": tmp_path / "out", **SMALL}


def refuse(given, says, **changes):
    options = {name: value for name, value in {**given, **changes}.items() if value is not None}
    with Progress(silent=True) as progress, pytest.raises(BarberError) as error:
        prepare(RecoverConfig(**options), progress)
    assert says in str(error.value), str(error.value)


def test_what_is_right_is_prepared(given):
    with Progress(silent=True) as progress:
        run = prepare(RecoverConfig(**given), progress)
    assert (run.config.steps, run.masks.pattern, run.masks.sparsity) == (2, "2:4", 0.5)
    assert run.text.held_out.shape == (4, 16)
    # Tokens are rounded up to whole steps; without a number it is one pass over the text.
    for changes, steps in (({"steps": None, "tokens": 65}, 2), ({"steps": None}, 28 // 4)):
        with Progress(silent=True) as progress:
            assert prepare(RecoverConfig(**{**given, **changes}), progress).config.steps == steps
    # What is computed again is filled in too, for a resume to compare.
    assert run.config.remat == run.identity["--remat"] == "light"


def test_text_that_the_teacher_writes(given, monkeypatch):
    given["text"] = "self"

    def prepared(**changes):
        with Progress(silent=True) as progress:
            return prepare(RecoverConfig(**{**given, **changes}), progress)

    run = prepared()
    # Two steps of 4 windows, and 4 held out; no window is there twice.
    every = np.concatenate([list(run.text.windows), run.text.held_out])
    assert every.shape == (12, 16) and (every[:, 0] == 1).all() and len(np.unique(every, axis=0)) == 12
    (file,) = given["out"].with_name("out.text").iterdir()
    wrote = self_text.write_samples
    monkeypatch.setattr(self_text, "write_samples", None)
    assert prepared().identity == run.identity
    # What a pruned model may have been calibrated with is no text to judge it by.
    monkeypatch.setattr(self_text, "write_samples", wrote)
    calibration = [open_checkpoint(given["teacher"]), run.model, run.devices]
    boundary = boundary_of(calibration[0], 97)
    with Progress(silent=True) as progress:
        drawn = wrote(*calibration, samples=12, length=16, seed=0, boundary=boundary, progress=progress)
    assert not (drawn[:, None] == every).all(axis=2).any()
    assert file.suffix == ".npy"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"tokens": 64}, "--tokens and --steps: give one of them"),
        ({"tokens": -1, "steps": None}, "--tokens -1"),
        ({"text": None}, "missing --text"),
        ({"text": ""}, "--text is empty"),
        ({"text": "c4", "steps": None}, "--text c4 has 156 billion tokens; give --tokens or --steps"),
        ({"text": "self", "steps": None}, "--text self is as long as it is asked to be; give --tokens or --steps"),
        ({"text": "self", "teacher": None}, "--text self is text that the teacher writes; give --teacher"),
        ({"ckpt": ""}, "--ckpt is empty"),
        ({"teacher": ""}, "--teacher is empty"),
        ({"teacher": None, "mix": 0.5}, "--mix 0.5 needs --teacher"),
        ({"mix": 1.5}, "--mix 1.5 must be between 0 and 1"),
        ({"rank": 4}, "--rank 4 needs --scope lora"),
        ({"rank": 4, "scope": "all"}, "--rank 4 needs --scope lora"),
        ({"micro_batch": 3}, "--micro-batch 3 does not divide --batch 4"),
        ({"rate": 0.0}, "--rate 0 must be a number above 0"),
        ({"rate": float("nan")}, "--rate nan must be a number above 0"),
        ({"clip": float("inf")}, "--clip inf must be a number above 0"),
        ({"held_out": 0}, "--held-out"),
        ({"length": 1}, "--length"),
        ({"speed": 1}, "--speed is not an option"),
    ],
    ids=str,
)
def test_options(changes, says, given):
    refuse(given, says, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mesh": "data=3"}, "--batch 4 is not a multiple of the 3 devices of the mesh"),
        ({"mesh": "data=2,model=2"}, "--micro-batch 2 is not a multiple of the 4 devices of the mesh"),
        ({"mesh": "data=2", "held_out": 3}, "--held-out 3 is not a multiple of the 2 devices of the mesh"),
        ({"mesh": "data=16", "batch": 16, "micro_batch": 16}, "needs 16 devices; there are 8"),
        ({"scope": "lora", "rank": 17}, "--rank 17 is above 16, the smaller side of model.layers.0.self_attn.k_proj"),
        (
            {"batch": 32, "micro_batch": 8},
            "the text has 448 tokens to train on, but --batch 32 x --length 16 needs 512",
        ),
        ({"held_out": 32}, "32 windows of --length 16 to hold out and one to train on need 528"),
        ({"length": 65}, "--length 65 is more than the model's 64 positions"),
        ({"text": "nowhere.txt"}, "nowhere.txt"),
        ({"teacher": "nowhere"}, "nowhere"),
        ({"masks": "nowhere"}, "nowhere"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_model_the_text_or_the_devices(changes, says, given):
    refuse(given, says, **changes)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("llama", {"vocab_size": 98}, "its vocabulary is 98, that of"),
        ("llama", {"hidden_size": 64, "head_dim": 16}, "its hidden is 64, that of"),
        ("llama", {"num_hidden_layers": 3}, "its layers is 3, that of"),
        ("llama", {"intermediate_size": 64}, "mlp."),
        ("llama", {"rope_theta": 5e5}, "its rope theta (config.json) is 500000.0, that of"),
        ("opt", {}, "its model type is opt, that of"),
    ],
    ids=str,
)
def test_a_teacher_of_another_model(family, changes, says, given, tiny):
    refuse(given, says, teacher=str(tiny(family, **changes)))


def test_a_damaged_teacher(given, tiny, tmp_path):
    broken = shutil.copytree(tiny(), tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuse(given, str(broken), teacher=str(broken))


def test_masks_of_another_model(given, tiny, tmp_path, tiny_ids):
    options = ["--samples", 4, "--length", 16, "--no-rebuild", "--method", "magnitude"]
    prune_masks(tmp_path / "deep", tiny(num_hidden_layers=3), tiny_ids, *options)
    refuse(given, "model.layers.2", masks=tmp_path / "deep")
    # Of the same model, but they prune other weights than the checkpoint's.
    prune_masks(tmp_path / "other", tiny(), tiny_ids, *options, "--sparsity", 0.3)
    refuse(given, "although that is pruned; give the masks of this checkpoint", masks=tmp_path / "other")


def test_a_dense_checkpoint_needs_masks(given, tiny, tiny_pruned, tmp_path):
    refuse(given, "is not pruned (0 of", ckpt=str(tiny()))
    refuse(given, "give a pruned checkpoint, or --masks", ckpt=str(tiny()))
    with Progress(silent=True) as progress:
        options = {**given, "ckpt": str(tiny()), "masks": tiny_pruned}
        assert prepare(RecoverConfig(**options), progress).masks.sparsity == 0.5
        # Zeros do for masks where there is no mask file.
        zeros = shutil.copytree(tiny_pruned, tmp_path / "zeros", ignore=shutil.ignore_patterns("masks.safetensors"))
        found = prepare(RecoverConfig(**{**given, "ckpt": str(zeros)}), progress).masks
    assert (found.sparsity, found.pattern, found.file) == (0.5, "unstructured", None)


def test_a_damaged_checkpoint(given, tiny_pruned, tmp_path):
    broken = shutil.copytree(tiny_pruned, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    refuse(given, "tensor model.layers.1.mlp.up_proj.weight holds NaN or Inf", ckpt=str(broken))


def test_token_ids_outside_the_vocabulary(given, tmp_path):
    np.save(tmp_path / "ids.npy", np.full((32, 16), 97))
    refuse(given, "97", text=str(tmp_path / "ids.npy"))


def test_a_teacher_may_have_another_head(given, tmp_path):
    """A tied model that was pruned after its head was untied, say."""
    write_model(tmp_path / "tied", tie_word_embeddings=True)
    refuse(given, "lm_head.weight", teacher=str(tmp_path / "tied"))
