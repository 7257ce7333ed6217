"""masks.safetensors: packing, and every way a file can be wrong."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import save_file

from barber_jax.console.errors import BarberError
from barber_jax.convert.safetensors_writer import SafetensorsWriter
from barber_jax.masks.mask_file import Masks, mask_metadata, pack, packed_length, read_masks, unpack

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
SHAPES = {UP: (6, 3), DOWN: (3, 6)}


@pytest.fixture
def masks():
    rng = np.random.default_rng(0)
    return {name: rng.random(shape) < 0.5 for name, shape in SHAPES.items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "masks.safetensors"


def save(path, masks, **changes):
    """A mask file with some metadata replaced, or removed where the replacement is None."""
    metadata = {**mask_metadata("2:4", 0.5, SHAPES), **changes}
    tensors = {name: pack(mask) if mask.ndim == 2 else mask for name, mask in masks.items()}
    save_file(tensors, path, {key: value for key, value in metadata.items() if value is not None})


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=20)))
def test_unpack_inverts_pack(mask):
    packed = pack(mask)
    assert packed.dtype == np.uint8
    assert packed.shape == (packed_length(mask.shape),)
    assert np.array_equal(unpack(packed, mask.shape), mask)
    assert unpack(packed, mask.shape).dtype == np.bool_


@given(arrays(np.bool_, (5, 7)))
def test_pack_follows_c_order_whatever_the_memory_order(mask):
    assert np.array_equal(pack(np.asfortranarray(mask)), pack(mask))
    assert np.array_equal(pack(mask.T), pack(mask.T.copy()))


def test_first_weight_is_the_first_bytes_highest_bit():
    mask = np.zeros((2, 5), bool)
    mask[0, 0] = mask[1, 4] = True
    assert pack(mask).tolist() == [0b10000000, 0b01000000]


@pytest.mark.parametrize("mask", [np.zeros((2, 2)), np.zeros(4, bool), np.zeros((1, 2, 2), bool)])
def test_pack_refuses_what_is_no_mask(mask):
    with pytest.raises(ValueError):
        pack(mask)


@pytest.mark.parametrize("packed", [np.zeros(2, np.uint8), np.zeros(1, np.int8), np.zeros((1, 1), np.uint8)])
def test_unpack_refuses_what_does_not_fit(packed):
    with pytest.raises(ValueError):
        unpack(packed, (2, 4))


@given(st.floats(0, 1))
def test_sparsity_survives_the_metadata(sparsity):
    assert float(mask_metadata("unstructured", sparsity, {})["sparsity"]) == sparsity


def test_round_trip_through_the_streaming_writer(path, masks):
    tensors = {name: (np.dtype(np.uint8), (packed_length(shape),)) for name, shape in SHAPES.items()}
    with SafetensorsWriter(path, tensors, mask_metadata("unstructured", np.float32(0.5), SHAPES)) as writer:
        for name, mask in masks.items():
            writer.write(name, pack(mask))
    opened = read_masks(path)
    assert isinstance(opened, Masks)
    assert (opened.pattern, opened.sparsity, opened.shapes) == ("unstructured", 0.5, SHAPES)
    assert opened.names() == [UP, DOWN]
    for name, mask in masks.items():
        assert np.array_equal(opened.read(name), mask)


def test_padding_bits_that_are_set_change_nothing(path, masks):
    """A mask of 6 x 3 leaves 6 bits of its last byte, which another writer may not clear."""
    packed = {name: pack(mask) for name, mask in masks.items()}
    for array in packed.values():
        assert array[-1] & 0b111111 == 0
        array[-1] |= 0b101101
    save_file(packed, path, mask_metadata("unstructured", 0.5, SHAPES))
    opened = read_masks(path)
    for name, mask in masks.items():
        assert np.array_equal(opened.read(name), mask)
        # Studies count on the packed bits.
        assert np.array_equal(opened.packed(name), pack(mask))


def test_padding_bits_that_are_set_change_nothing_in_pytorch(path, masks):
    torch = pytest.importorskip("torch")
    from barber_jax.convert.torch_masks import apply_masks, load_masks

    packed = {name: pack(mask) | np.array([0, 0, 0b111111], np.uint8) for name, mask in masks.items()}
    save_file(packed, path, mask_metadata("unstructured", 0.5, SHAPES))
    for name, mask in load_masks(path).items():
        assert np.array_equal(mask.numpy(), masks[name])
    layers = {name.removesuffix(".weight"): torch.nn.Linear(*shape[::-1]) for name, shape in SHAPES.items()}
    model = torch.nn.Module()
    model.named_modules = lambda: layers.items()
    apply_masks(model, path, method="in_place")
    for name, layer in layers.items():
        assert np.array_equal(layer.weight.detach().numpy() != 0, masks[f"{name}.weight"])


def test_path_may_be_a_string(path, masks):
    save(path, masks)
    assert np.array_equal(read_masks(str(path)).read(UP), masks[UP])


def test_a_name_without_a_mask(path, masks):
    save(path, masks)
    with pytest.raises(BarberError, match=r"no mask for lm_head\.weight"):
        read_masks(path).read("lm_head.weight")


def refused(path, words):
    with pytest.raises(BarberError, match=words) as caught:
        read_masks(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(path):
    refused(path, "no such file")
    refused(path.parent, r"masks\.safetensors: no such file")


def test_folder_stands_for_the_mask_file_in_it(tmp_path, masks):
    save(tmp_path / "masks.safetensors", masks)
    assert read_masks(tmp_path).path == tmp_path / "masks.safetensors"


def test_files_that_are_not_safetensors(path, masks):
    for content in (b"", b"no", b"{}", b"\xff" * 200):
        path.write_bytes(content)
        refused(path, "not a safetensors file, or cut short")
    save(path, masks)
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "not a safetensors file, or cut short")


def test_safetensors_files_of_another_kind(path, masks):
    save_file({"a": np.zeros(3, np.uint8)}, path)
    refused(path, "not a mask file: its metadata give format None")
    save(path, masks, format="pt")
    refused(path, "not a mask file: its metadata give format 'pt'")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "2"}, "version 2 is newer than 1.*update barber_jax"),
        ({"version": "one"}, "version 'one' is not a number"),
        ({"version": "9" * 5000}, "is not a number"),
        ({"version": None}, "version '' is not a number"),
        ({"pattern": None}, "lack 'pattern'"),
        *(({"pattern": odd}, f"pattern '{odd}' is neither") for odd in ("x:y", "0:4", "5:4", "2:4 ")),
        ({"sparsity": None}, "lack 'sparsity'"),
        ({"sparsity": "half"}, "sparsity 'half'"),
        ({"sparsity": "nan"}, "sparsity 'nan'"),
        ({"sparsity": "1.5"}, "sparsity '1.5'"),
        ({"shapes": None}, "lack 'shapes'"),
        ({"shapes": "{"}, "not JSON"),
        ({"shapes": "[" * 100000}, "not JSON"),
        ({"shapes": "[1]"}, "not a JSON object"),
        ({"shapes": json.dumps({UP: [6], DOWN: [3, 6]})}, f"shape of {UP} is \\[6\\]"),
        ({"shapes": json.dumps({UP: [6, True], DOWN: [3, 6]})}, f"shape of {UP}"),
        ({"shapes": json.dumps({UP: [-6, -3], DOWN: [3, 6]})}, f"shape of {UP}"),
        ({"shapes": json.dumps({UP: "6x3", DOWN: [3, 6]})}, f"shape of {UP}"),
        ({"shapes": json.dumps({UP: [6, 3]})}, f"{DOWN} has a mask but no shape"),
        ({"shapes": json.dumps({UP: [6, 3], DOWN: [3, 6], "x": [1, 1]})}, "x has a shape but no mask"),
        ({"shapes": json.dumps({UP: [6, 5], DOWN: [3, 6]})}, f"{UP} has shape \\[3\\]; \\[6, 5\\] weights"),
    ],
)
def test_bad_metadata(path, masks, changes, words):
    save(path, masks, **changes)
    refused(path, words)


def test_tensors_that_are_no_packed_masks(path, masks):
    save(path, {**masks, UP: np.zeros(4, np.uint8)})
    refused(path, f"{UP} has shape \\[4\\]")
    save(path, {**masks, UP: np.zeros((3, 1, 1), np.uint8)})
    refused(path, f"{UP} has shape")
    save(path, {**masks, UP: np.zeros(3, np.int8)})
    refused(path, f"{UP} has dtype I8, not U8")
