"""Reading .gguf files: decoding, names, layout, configuration, and refusal of what is damaged or not supported."""

import json
import random
import struct
import time

import gguf
import ml_dtypes
import numpy as np
import pytest
from checkpoints import random_tensors, torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from barber_jax.console.errors import BarberError
from barber_jax.convert import gguf_file, gguf_header
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.gguf_file import GGUFCheckpoint, split_files, unpermute
from barber_jax.convert.gguf_header import read_header

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, LAYERS, VOCAB = 4, 2, 16, 64, 96, 2, 40
FIELDS = {
    "llama.block_count": LAYERS,
    "llama.context_length": 512,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 50000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
HF_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def permute(weight, heads):
    """What llama.cpp's converter does to a query or key."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def hf_tensors(bias=False, tied=True):
    """A small model's tensors under Hugging Face's names, float32."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        attention_bias=bias,
        tie_word_embeddings=tied,
    )
    return random_tensors(config.to_dict())


def gguf_tensors(hf):
    """The same tensors as llama.cpp's converter names and permutes them."""
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    top["output.weight"] = "lm_head.weight"
    stored = {name: hf[source] for name, source in top.items() if source in hf}
    for layer in range(LAYERS):
        for name, source in HF_NAMES.items():
            for part in ("weight", "bias"):
                value = hf.get(f"model.layers.{layer}.{source}.{part}")
                if value is not None:
                    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name)
                    stored[f"blk.{layer}.{name}.{part}"] = permute(value, heads) if heads else value
    return stored


def write(path, tensors, fields=None, kind=Kind.F32, architecture="llama"):
    """Write a .gguf; matrices are stored as `kind`, a field of value None is left out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (FIELDS | (fields or {})).items():
        if value is not None:
            add_field(writer, key, value)
    for name, value in tensors.items():
        stored = kind if value.ndim == 2 else Kind.F32
        data = value if stored == Kind.F32 else gguf.quants.quantize(value, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    return finish(writer, path)


def finish(writer, path):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_field(writer, key, value):
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)


@pytest.fixture
def model(tmp_path):
    return write(tmp_path / "model.gguf", gguf_tensors(hf_tensors()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_float32_file_gives_back_the_hugging_face_model(tmp_path, bias, tied):
    hf = hf_tensors(bias, tied)
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", gguf_tensors(hf)))
    assert set(checkpoint.names()) == set(hf)
    for name, value in hf.items():
        assert checkpoint.shape(name) == value.shape
        assert checkpoint.dtype(name) == np.float32
        np.testing.assert_array_equal(checkpoint.read(name), value)
    assert checkpoint.config["attention_bias"] is bias
    assert checkpoint.config["tie_word_embeddings"] is tied
    assert set(checkpoint.files.values()) == {"model.safetensors"}


def test_config_is_a_full_llama_config(model):
    config = open_checkpoint(str(model)).config
    assert config == json.loads(json.dumps(config))
    built = LlamaConfig(**config)
    assert (built.num_hidden_layers, built.hidden_size, built.intermediate_size) == (LAYERS, HIDDEN, INNER)
    assert (built.num_attention_heads, built.num_key_value_heads, built.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (built.vocab_size, built.max_position_embeddings, built.rms_norm_eps) == (VOCAB, 512, 1e-5)
    assert built.rope_parameters == {"rope_theta": 50000.0, "rope_type": "default"}
    assert (built.bos_token_id, built.eos_token_id, built.pad_token_id) == (1, 2, None)
    assert (built.hidden_act, built.mlp_bias, built.architectures) == ("silu", False, ["LlamaForCausalLM"])
    assert config["torch_dtype"] == "float32"


def test_fields_that_old_files_leave_out_have_llamas_defaults(tmp_path):
    optional = dict.fromkeys(["llama.rope.freq_base", "llama.rope.dimension_count", "tokenizer.ggml.bos_token_id"])
    config = GGUFCheckpoint(write(tmp_path / "m.gguf", gguf_tensors(hf_tensors()), optional)).config
    assert (config["rope_theta"], config["head_dim"], config["bos_token_id"]) == (10000.0, HEAD_DIM, None)


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, np.float16), (Kind.BF16, ml_dtypes.bfloat16)])
def test_half_precision_keeps_its_dtype(tmp_path, kind, dtype):
    hf = hf_tensors()
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", gguf_tensors(hf), kind=kind))
    name = "model.layers.1.self_attn.k_proj.weight"
    assert checkpoint.dtype(name) == checkpoint.fetch(name).dtype == dtype
    np.testing.assert_array_equal(checkpoint.read(name), hf[name].astype(dtype))
    assert checkpoint.dtype("model.norm.weight") == np.float32
    assert checkpoint.config["torch_dtype"] == np.dtype(dtype).name


@pytest.mark.parametrize(("kind", "levels"), [(Kind.Q8_0, 254), (Kind.Q4_1, 15), (Kind.Q4_0, 15), (Kind.Q5_1, 31)])
def test_quantised_weights_are_within_a_step_of_the_originals(tmp_path, kind, levels):
    hf = hf_tensors()
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", gguf_tensors(hf), kind=kind))
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        value = checkpoint.read(name)
        blocks, original = value.reshape(-1, 32), hf[name].reshape(-1, 32)
        step = 2 * np.abs(original).max(axis=1, keepdims=True) / levels
        assert value.dtype == checkpoint.dtype(name) == np.float32
        assert value.shape == hf[name].shape
        # One step, and not half: Q4_0 has one level fewer on one side of zero. 1% is the scale's own float16 rounding.
        assert (np.abs(blocks - original) <= 1.01 * step).all()


@pytest.mark.parametrize("at_once", [1, 3 * HIDDEN, 10**9])
def test_decoding_in_parts_changes_nothing(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(gguf_file, "DECODED_AT_ONCE", at_once)
    hf = hf_tensors()
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", gguf_tensors(hf), kind=Kind.Q8_0))
    name = "model.embed_tokens.weight"
    stored = gguf.quants.quantize(hf[name], Kind.Q8_0)
    np.testing.assert_array_equal(checkpoint.fetch(name), gguf.quants.dequantize(stored, Kind.Q8_0))


def test_every_type_the_package_decodes_is_read(tmp_path):
    """Blocks of random bytes (none a float16 NaN or Inf), as the gguf package itself reads and decodes them."""
    rng = np.random.default_rng(0)
    tensors = gguf_tensors(hf_tensors())
    for kind in (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_XS, Kind.IQ2_S, Kind.TQ2_0):
        path = tmp_path / f"{kind.name}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in (FIELDS | {"llama.feed_forward_length": 256}).items():
            add_field(writer, key, value)
        for name, value in tensors.items():
            if "ffn_down" in name:
                row_bytes = gguf.GGML_QUANT_SIZES[kind][1]
                writer.add_tensor(name, rng.integers(0, 0x7C, (HIDDEN, row_bytes), np.uint8), raw_dtype=kind)
            else:
                writer.add_tensor(
                    name, np.ones((256, HIDDEN), np.float32) if "ffn_" in name and value.ndim == 2 else value
                )
        finish(writer, path)
        stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight")
        fetched = GGUFCheckpoint(path).fetch("model.layers.1.mlp.down_proj.weight")
        assert (fetched.shape, fetched.dtype) == ((HIDDEN, 256), np.float32)
        np.testing.assert_array_equal(fetched, gguf.quants.dequantize(stored.data, kind))


def test_unpermute_turns_llama_cpps_rotary_into_hugging_faces():
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(HEADS * HEAD_DIM, 3))
    angle = rng.normal(size=HEAD_DIM // 2)
    vector = rng.normal(size=3)

    neighbours = (stored @ vector).reshape(HEADS, HEAD_DIM // 2, 2)
    a, b = neighbours[..., 0], neighbours[..., 1]
    expected = np.stack([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-2)

    halves = (unpermute(stored, HEADS) @ vector).reshape(HEADS, 2, HEAD_DIM // 2)
    turned = np.stack([-halves[:, 1], halves[:, 0]], axis=1)
    np.testing.assert_allclose(halves * np.cos(angle) + turned * np.sin(angle), expected, rtol=1e-12)


def test_output_bias_that_llama_cpp_leaves_out_is_zeros(tmp_path):
    hf = hf_tensors(bias=True)
    stored = {name: value for name, value in gguf_tensors(hf).items() if not name.endswith("attn_output.bias")}
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", stored))
    name = "model.layers.0.self_attn.o_proj.bias"
    assert checkpoint.shape(name) == (HIDDEN,)
    np.testing.assert_array_equal(checkpoint.read(name), np.zeros(HIDDEN, checkpoint.dtype(name)))


def test_header_says_what_the_gguf_package_reads(model):
    header, reader = read_header(model), gguf.GGUFReader(model)
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in header.fields.items()}
    assert plain == {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    expected = {
        t.name: (t.tensor_type, tuple(t.shape.tolist()[::-1]), t.data_offset, t.n_bytes) for t in reader.tensors
    }
    assert {name: tuple(tensor) for name, tensor in header.tensors.items()} == expected


# --- rotary scaling


def rope_config(tmp_path, fields, rope_freqs=None):
    tensors = gguf_tensors(hf_tensors())
    if rope_freqs is not None:
        tensors["rope_freqs.weight"] = np.asarray(rope_freqs, np.float32)
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", tensors, fields))
    assert not any("rope" in name for name in checkpoint.names())
    return checkpoint.config


def llama3_frequencies(scaling):
    """The factors llama.cpp's converter would store, from transformers' own frequencies."""
    config = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, rope_parameters=scaling)
    pytest.importorskip("torch")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / (scaling["rope_theta"] ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM))
    return (plain / scaled).numpy()


def llama3_scaling(**changes):
    usual = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return usual | {"rope_type": "llama3", "rope_theta": 500000.0} | changes


def test_linear_scaling(tmp_path):
    fields = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert rope_config(tmp_path, fields)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_scaling_type_none(tmp_path):
    assert rope_config(tmp_path, {"llama.rope.scaling.type": "none"})["rope_scaling"] is None


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_from_its_factors(tmp_path, factor):
    wanted = llama3_scaling(factor=factor)
    config = rope_config(tmp_path, {"llama.rope.freq_base": 500000.0}, llama3_frequencies(wanted))
    assert LlamaConfig(**config).rope_parameters == wanted


@pytest.mark.parametrize(
    "changes", [{"high_freq_factor": 5.0}, {"low_freq_factor": 2.0}, {"original_max_position_embeddings": 4096}]
)
def test_other_rope_factors_are_refused(tmp_path, changes):
    with pytest.raises(BarberError, match=r"m\.gguf.*rope_freqs\.weight"):
        rope_config(tmp_path, {"llama.rope.freq_base": 500000.0}, llama3_frequencies(llama3_scaling(**changes)))


@pytest.mark.parametrize("factors", [np.ones(3), *(np.full(HEAD_DIM // 2, value) for value in (np.nan, np.inf, 0))])
def test_impossible_rope_factors_are_refused(tmp_path, factors):
    with pytest.raises(BarberError, match=r"rope_freqs\.weight"):
        rope_config(tmp_path, {}, factors)


# --- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.embedding_length": None}, "llama.embedding_length is missing"),
        ({"llama.feed_forward_length": None}, "llama.feed_forward_length is missing"),
        ({"llama.attention.head_count": None}, "llama.attention.head_count is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.context_length": None}, "llama.context_length is missing"),
        ({"llama.attention.head_count": [4, 4]}, "head_count must be one whole number"),
        ({"llama.attention.head_count": 0}, "head_count must be one whole number"),
        ({"llama.attention.head_count": 3}, "not a multiple of head_count"),
        ({"llama.attention.head_count_kv": 3}, "not a multiple of head_count_kv"),
        ({"llama.rope.freq_base": float("nan")}, "freq_base must be one finite number"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count = 8"),
        ({"llama.attention.value_length": 8}, "value_length = 8"),
        ({"llama.attention.key_length": 15}, "odd"),
        ({"llama.expert_count": 8}, "expert_count = 8"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window = 4096"),
        ({"llama.attention.causal": False}, "attention.causal = False"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "rope.scaling.attn_factor = 2.0"),
        ({"llama.attention.clamp_kqv": 3.0}, "attention.clamp_kqv = 3.0"),
        ({"llama.attention.max_alibi_bias": 8.0}, "attention.max_alibi_bias = 8.0"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "'yarn'"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope'"),
        ({"llama.block_count": 3}, r"blk\.2\.\w+\.weight is missing"),
        ({"llama.block_count": 1}, r"blk\.1\.\w+\.weight is not part"),
        ({"llama.block_count": 2**31}, "more than there are tensors"),
        ({"llama.feed_forward_length": 128}, r"ffn_gate\.weight has shape \(96, 64\)"),
        ({"tokenizer.ggml.bos_token_id": "one"}, "bos_token_id is not of type int"),
    ],
)
def test_metadata_that_cannot_be_honoured_is_refused(tmp_path, fields, message):
    path = write(tmp_path / "model.gguf", gguf_tensors(hf_tensors()), fields)
    with pytest.raises(BarberError, match=rf"model\.gguf: .*{message}"):
        GGUFCheckpoint(path)


def test_another_architecture_is_named(tmp_path):
    path = write(tmp_path / "m.gguf", gguf_tensors(hf_tensors()), architecture="qwen2")
    with pytest.raises(BarberError, match="'qwen2'"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize("missing", ["token_embd.weight", "output_norm.weight", "blk.1.attn_k.weight"])
def test_missing_tensor_is_named(tmp_path, missing):
    tensors = gguf_tensors(hf_tensors())
    del tensors[missing]
    with pytest.raises(BarberError, match=f"{missing} is missing"):
        GGUFCheckpoint(write(tmp_path / "m.gguf", tensors))


def test_unexpected_tensor_is_named(tmp_path):
    tensors = gguf_tensors(hf_tensors()) | {"blk.0.attn_q_norm.weight": np.ones(HEAD_DIM, np.float32)}
    with pytest.raises(BarberError, match=r"blk\.0\.attn_q_norm\.weight"):
        GGUFCheckpoint(write(tmp_path / "m.gguf", tensors))


def test_type_the_package_cannot_decode_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    tensors = gguf_tensors(hf_tensors())
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in FIELDS.items():
        add_field(writer, key, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value.astype(np.float64) if name == "blk.0.ffn_up.weight" else value)
    finish(writer, path)
    with pytest.raises(BarberError, match=r"m\.gguf: tensor blk\.0\.ffn_up\.weight has type F64"):
        GGUFCheckpoint(path)


def test_nan_is_refused_when_read(tmp_path):
    tensors = gguf_tensors(hf_tensors())
    tensors["output_norm.weight"][3] = np.nan
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", tensors))
    with pytest.raises(BarberError, match=r"model\.norm\.weight holds NaN"):
        checkpoint.read("model.norm.weight")


# --- damage


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"PK\x03\x04" + bytes(100), b"GGUF" + struct.pack(">I", 3)])
def test_files_that_are_not_gguf(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(BarberError, match=r"model\.gguf: "):
        GGUFCheckpoint(path)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(BarberError, match="cannot be read"):
            GGUFCheckpoint(path)


def test_truncation_anywhere_is_refused(model):
    whole = model.read_bytes()
    data_start = min(tensor.offset for tensor in read_header(model).tensors.values())
    cuts = [*range(0, data_start, 41), *range(data_start, len(whole), 20011), len(whole) - 1]
    for cut in cuts:
        model.write_bytes(whole[:cut])
        with pytest.raises(BarberError, match=r"model\.gguf: ") as caught:
            GGUFCheckpoint(model)
        assert "\n" not in str(caught.value)


def test_file_cut_short_after_opening(model):
    checkpoint = GGUFCheckpoint(model)
    model.write_bytes(model.read_bytes()[:-5000])
    with pytest.raises(BarberError, match=r"model\.gguf: changed, replaced or removed while it was read"):
        for name in checkpoint.names():
            checkpoint.read(name)


def test_any_damaged_byte_of_the_header_is_refused_or_harmless(tmp_path):
    vocabulary = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *"abcdefghij", "ab", "cd", "abcd"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, *[-9.0] * 10, -1.0, -2.0, -3.0],
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * 13],
    }
    path = write(tmp_path / "model.gguf", gguf_tensors(hf_tensors()), vocabulary)
    whole = path.read_bytes()
    data_start = min(tensor.offset for tensor in read_header(path).tensors.values())
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.randrange(data_start)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            checkpoint = GGUFCheckpoint(path)
            checkpoint.tokenizer()
            for name in checkpoint.names():
                checkpoint.fetch(name)
        except BarberError as error:
            assert str(error).startswith(str(path))
            refused += 1
    assert refused > 200


def test_absurd_array_length_is_refused_at_once(tmp_path):
    path = tmp_path / "model.gguf"
    key = b"tokenizer.ggml.token_type"
    field = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 5, 1 << 40)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field + bytes(64))
    with pytest.raises(BarberError, match="damaged or the file is cut short"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize("kind", ["strings", "fields"])
def test_a_header_without_end_is_not_read_to_its_end(tmp_path, monkeypatch, kind):
    """A file of zeros holds any number of empty strings, and takes no place on a disk that leaves holes."""
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 10_000)
    path, count = tmp_path / "model.gguf", 1 << 40
    if kind == "strings":
        content = struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, count)
    else:
        fields = (struct.pack("<Q", 4) + b"%04d" % index + struct.pack("<IB", 0, 0) for index in range(2000))
        content = struct.pack("<IQQ", 3, 0, count) + b"".join(fields)
    path.write_bytes(b"GGUF" + content)
    with path.open("r+b") as file:
        file.truncate(1 << 34)
    began = time.process_time()
    with pytest.raises(BarberError, match="damaged or the file is cut short"):
        GGUFCheckpoint(path)
    assert time.process_time() - began < 5


def test_tensor_that_would_read_anothers_bytes_is_refused(model):
    whole = bytearray(model.read_bytes())
    entry = whole.index(b"blk.0.attn_norm.weight") + len("blk.0.attn_norm.weight") + 4 + 8 + 4
    struct.pack_into("<Q", whole, entry, 0)
    model.write_bytes(whole)
    with pytest.raises(BarberError, match=r"tensor blk\.0\.attn_norm\.weight is not where"):
        GGUFCheckpoint(model)


def test_the_tokenizer_is_written_for_every_version_of_transformers(tmp_path):
    tokens = [f"w{i}" for i in range(VOCAB)]
    fields = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": ["w 1"], "token_type": [1] * VOCAB}
    tokens[:3] = "w", "1", "w1"
    fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    path = write(tmp_path / "model.gguf", gguf_tensors(hf_tensors()), fields)
    GGUFCheckpoint(path).save_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(tmp_path)("w1w")["input_ids"] == [2, 0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.layer_norm_rms_epsilon", 1e300),
        ("llama.attention.layer_norm_rms_epsilon", 1e-320),
        ("llama.rope.freq_base", 1e308),
        ("llama.rope.scaling.factor", 1e300),
    ],
)
# What earlier tests left open, and the garbage collector happens to close within this one, is not its own.
@pytest.mark.filterwarnings("error", "default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning")
def test_numbers_that_float32_cannot_hold_are_refused(tmp_path, key, value):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, given in FIELDS.items():
        if name != key:
            add_field(writer, name, given)
    writer.add_float64(key, value)
    for name, tensor in gguf_tensors(hf_tensors()).items():
        writer.add_tensor(name, tensor)
    finish(writer, tmp_path / "m.gguf")
    with pytest.raises(BarberError, match=f"{key} must be one finite number"):
        GGUFCheckpoint(tmp_path / "m.gguf")


def test_split_into_files_of_bounded_size():
    assert split_files({"a": 3, "b": 4}, 7) == dict.fromkeys("ab", "model.safetensors")
    first, second, third = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    assert split_files({"a": 3, "b": 4, "c": 9, "d": 1}, 7) == {"a": first, "b": first, "c": second, "d": third}
