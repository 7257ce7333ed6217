"""A Gemma 3 with a vision tower: its language model is pruned, everything else is copied."""

import json
import shutil

import numpy as np
import pytest
import transformers
from checkpoints import GEMMA, IDS, our_logits, torch
from cli import masks_of, prune_masks
from safetensors.numpy import load_file, save_file

from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.parameters import check_tensors
from barber_jax.models import build_model

VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
TOKENS = dict(mm_tokens_per_image=4, image_token_index=96, boi_token_index=95, eoi_token_index=94)
NEWER = {"language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower."}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a tiny random model as transformers saves it."""
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=dict(GEMMA), vision_config=VISION, **TOKENS)
    folder = tmp_path_factory.mktemp("gemma3")
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def text_logits(folder):
    model, loading = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not (set(loading["missing_keys"]) | set(loading["unexpected_keys"]) | set(loading["mismatched_keys"]))
    with torch.no_grad():
        # Tokens of images aside.
        return model.eval()(torch.as_tensor(IDS[0] % 94).long()).logits.numpy()


def renamed(folder, to, names):
    """A copy of a checkpoint whose tensors' names begin otherwise."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    for old, new in names.items():
        tensors = {name.replace(old, new, 1) if name.startswith(old) else name: t for name, t in tensors.items()}
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize("names", [{}, NEWER], ids=["as_saved", "as_in_memory"])
def test_pruned_with_every_other_tensor_as_it_was(saved, tmp_path, names):
    source = renamed(saved, tmp_path / "dense", names)
    np.testing.assert_allclose(our_logits(source, ids=IDS % 94), text_logits(saved), atol=1e-4, rtol=0)
    np.save(tmp_path / "ids.npy", IDS[0] % 94)
    out = tmp_path / "out"
    options = ["--samples", 3, "--length", 40, "--no-rebuild", "--method", "magnitude"]
    prune_masks(out, source, tmp_path / "ids.npy", *options)
    before, after, masks = load_file(saved / "model.safetensors"), load_file(out / "model.safetensors"), masks_of(out)
    assert before.keys() == after.keys()
    assert len(masks) == 14 and all(name.startswith("language_model.model.layers.") for name in masks)
    for name, tensor in before.items():
        kept = masks.get(name, np.True_)
        np.testing.assert_array_equal(after[name].view(np.uint32), np.where(kept, tensor, 0).view(np.uint32), name)
    config = [json.loads((folder / "config.json").read_text()) for folder in (source, out)]
    assert config[0] == config[1]
    np.testing.assert_allclose(our_logits(out, ids=IDS % 94), text_logits(out), atol=1e-4, rtol=0)
    # The modules have other names than the saved tensors.
    from barber_jax.convert.torch_masks import check_masks

    model = transformers.AutoModelForImageTextToText.from_pretrained(out)
    for each in (model, model.model):
        report = check_masks(each, out / "masks.safetensors")
        assert report.ok and len(report.matrices) == 14


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_config": None}, "text_config is missing"),
        ({"text_config": {"model_type": "gemma3n_text"}}, "gemma3n_text"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"architectures": ["Gemma3ForSequenceClassification"]}, "Gemma3ForSequenceClassification"),
    ],
)
def test_refused_by_name(saved, change, said):
    config = json.loads((saved / "config.json").read_text()) | change
    with pytest.raises(BarberError, match=said):
        build_model(config, np.float32)


def test_a_vision_tower_without_a_language_model(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "vision")
    tensors = load_file(folder / "model.safetensors")
    vision = {name: tensor for name, tensor in tensors.items() if not name.startswith("language_model.")}
    save_file(vision, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(BarberError, match=r"tensor language_model\.model\.embed_tokens\.weight is missing"):
        check_tensors(checkpoint, build_model(checkpoint.config, np.float32))
