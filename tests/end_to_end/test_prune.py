"""Whole runs through the command line: files, contracts, exactness, determinism of what is compiled and held."""

import json
import logging

import jax
import numpy as np
import pytest
import tokenizers
from checkpoints import BASE, logits, write_model
from cli import ORACLES, command, prune_masks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.eval.perplexity import PerplexityConfig, evaluate
from barber_jax.forward import dense as forward
from barber_jax.models import build_model

SMALL = ["--samples", 4, "--length", 16]


@pytest.fixture
def ids(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(1).integers(0, BASE["vocab_size"], (8, 32)))
    return path


@pytest.fixture
def ckpt(tmp_path):
    write_model(tmp_path / "dense")
    return tmp_path / "dense"


def test_command_line_end_to_end(tmp_path):
    folder, out = ORACLES / "llama", tmp_path / "deep" / "out"
    said = command(
        *["prune", "--ckpt", folder, "--out", out, "--calibration", folder / "calibration_ids.npy"],
        *["--samples", 8, "--length", 64, "--sparsity", 0.5, "--alpha", 0.1, "-v"],
    )
    assert said.returncode == 0, said.stderr
    first = said.stderr.splitlines()[0]
    assert all(word in first for word in ("cpu", "float32", "0.2 M parameters", "8 samples of 64 tokens"))
    assert "\x1b" not in said.stderr and said.stdout == ""
    assert "block 2 mlp: sparsity 0.5000, loss" in said.stderr
    got = command("eval.perplexity", "--ckpt", out, "--tokens", folder / "eval_ids.npy", "--length", 64,
                  "--json", tmp_path / "ppl.json")  # fmt: skip
    assert got.returncode == 0, got.stderr
    result = json.loads((tmp_path / "ppl.json").read_text())
    assert result["windows"] == 2 and result["length"] == 64 and result["tokens"] == 126
    assert f"{result['perplexity']:.4f}" in got.stdout


@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(d, marks=pytest.mark.slow) for d in ("float32", "float16"))]
)
def test_export_keeps_dtype_and_shards_and_loads_in_torch(dtype, tmp_path, ids):
    write_model(tmp_path / "dense", dtype=dtype, shard_size=20_000, attention_bias=True)
    out = tmp_path / "out"
    masks = prune_masks(out, tmp_path / "dense", ids, *SMALL, "--alpha", 0.5)
    source = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    written = json.loads((out / "model.safetensors.index.json").read_text())
    assert source["weight_map"] == written["weight_map"] and len(set(source["weight_map"].values())) > 1
    for file in set(source["weight_map"].values()):
        before, after = load_file(tmp_path / "dense" / file), load_file(out / file)
        with safe_open(out / file, "np") as handle:
            assert handle.metadata() == {"format": "pt"}
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype
            kept = masks.get(name, np.ones(tensor.shape, bool))
            # Kept weights to the bit, pruned ones zero, and not minus zero.
            np.testing.assert_array_equal(
                after[name].view(np.uint8), np.where(kept, tensor, 0).astype(tensor.dtype).view(np.uint8)
            )
    torch = pytest.importorskip("torch")
    from barber_jax.convert.torch_masks import check_masks

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert check_masks(model, out / "masks.safetensors").ok
    tokens = np.load(ids)[None, :2, :16].astype(np.int32)
    checkpoint = open_checkpoint(str(out))
    ours = np.asarray(
        next(forward.logits(checkpoint, build_model(checkpoint.config, jax.numpy.dtype("float32")), tokens))
    )
    theirs = logits(model.eval(), tokens[0])
    assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max()


def test_zeros_of_the_result_are_the_masks_zeros(tmp_path, ids, ckpt):
    masks = prune_masks(tmp_path / "out", ckpt, ids, *SMALL)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, mask in masks.items():
        np.testing.assert_array_equal(tensors[name] != 0, mask)
    assert len(masks) == BASE["num_hidden_layers"] * 7


def test_run_json_tells_the_run(tmp_path, ids, ckpt):
    out = tmp_path / "out"
    prune_masks(out, ckpt, ids, *SMALL, "--alpha", 0.5, "--granularity", "block")
    record = json.loads((out / "run.json").read_text())
    assert record["options"]["alpha"] == 0.5 and record["options"]["sparsity"] == 0.5
    assert record["options"]["method"] == "wanda" and record["options"]["seed"] == 0
    assert record["versions"]["jax"] == jax.__version__ and record["device"]["platform"] == "cpu"
    assert [block["block"] for block in record["blocks"]] == [0, 1]
    for block in record["blocks"]:
        assert [sub["name"] for sub in block["sub_blocks"]] == ["self_attn", "mlp"]
        assert min(block["seconds"].values()) >= 0 and {"mlp swap", "commit"} <= set(block["seconds"])
        for sub in block["sub_blocks"]:
            assert sub["loss_before"] > 0 and sub["loss_after"] > 0 and sub["sparsity"] == 0.5
            assert sub["swaps"] == sum(matrix["regrown"] for matrix in sub["matrices"].values()) > 0
    totals = record["totals"]
    assert (
        totals["pruned"] * 2
        == totals["weights"]
        == sum(
            matrix["size"]
            for block in record["blocks"]
            for sub in block["sub_blocks"]
            for matrix in sub["matrices"].values()
        )
    )
    assert record["peak_memory"]["host_bytes"] > 1e7


def test_evaluation_inside_prune_equals_the_evaluator(tmp_path, capsys):
    folder = ORACLES / "llama"
    source = tmp_path / "dense"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((folder / name).read_bytes())
    words = {f"w{i}": i for i in range(320)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in np.random.default_rng(0).integers(0, 320, 500)))
    options = ["--samples", 8, "--length", 32, "--eval-text", text, "--eval-windows", 10]
    prune_masks(tmp_path / "out", source, text, *options)
    said = capsys.readouterr().err.splitlines()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    for key, folder in (("perplexity", tmp_path / "out"), ("dense_perplexity", source)):
        outside = evaluate(PerplexityConfig(str(folder), length=32, text=(text,), windows=10))[0]
        assert record[key]["perplexity"] == pytest.approx(outside["perplexity"], rel=1e-6)
        assert record[key]["windows"] == 10 and record[key]["source"] == str(text)
    # Side by side in the last line, in the report's headline and on the model card.
    dense, pruned = (record[key]["perplexity"] for key in ("dense_perplexity", "perplexity"))
    assert f"perplexity dense {dense:.4f}, pruned {pruned:.4f}" in said[-1]
    assert any("dense model" in line for line in said[:-1])
    assert f"<b>{dense:.2f} → {pruned:.2f}</b>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"| {dense:.2f} | {pruned:.2f} |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sparsity=st.sampled_from([0.0, 0.13, 0.5, 0.7, 0.999]),
    method=st.sampled_from(["wanda", "magnitude"]),
    granularity=st.sampled_from(["output1", "input1", "layer", "block"]),
    metric=st.sampled_from(["wd", "w", "d"]),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_sparsity_is_exact(tmp_path_factory, ckpt, ids, sparsity, method, granularity, metric, alpha):
    out = tmp_path_factory.mktemp("run") / "out"
    options = ["--method", method, "--sparsity", sparsity, "--granularity", granularity, "--metric", metric]
    masks = prune_masks(out, ckpt, ids, *SMALL, *options, "--alpha", alpha)
    sub = lambda name: name.rpartition(".")[0].rpartition(".")[0]  # noqa: E731 - all matrices of a sub-block
    pruned, wanted = {}, {}
    for name, mask in masks.items():
        pruned[sub(name)] = pruned.get(sub(name), 0) + int((~mask).sum())
        own = mask.shape[0] * int(mask.shape[1] * sparsity) if method == "wanda" else int(mask.size * sparsity)
        wanted[sub(name)] = wanted.get(sub(name), 0) + own
        if granularity != "block":
            assert (~mask).sum() == own, name
        if granularity == "output1" and method == "wanda":
            assert ((~mask).sum(1) == int(mask.shape[1] * sparsity)).all(), name
    assert pruned == wanted


@pytest.mark.parametrize("pattern", ["2:16", *(pytest.param(p, marks=pytest.mark.slow) for p in ("3:4", "4:8", "4:4"))])
def test_n_of_m_is_exact(pattern, tmp_path, ckpt, ids):
    keep, of = map(int, pattern.split(":"))
    for method in ("magnitude", "wanda"):
        masks = prune_masks(
            tmp_path / method, ckpt, ids, *SMALL, "--method", method, "--pattern", pattern, "--alpha", 1
        )
        for mask in masks.values():
            assert (mask.reshape(mask.shape[0], -1, of).sum(-1) == keep).all()


@pytest.mark.slow
def test_micro_batch_size_changes_no_mask(tmp_path, ckpt, ids):
    runs = [
        prune_masks(tmp_path / str(batch), ckpt, ids, "--samples", 6, "--length", 16, "--batch", batch, "--alpha", 0.5)
        for batch in (1, 4, 100)
    ]
    for other in runs[1:]:
        for name, mask in runs[0].items():
            assert np.mean(mask == other[name]) >= 0.999


def test_compilations_do_not_grow_with_depth(tmp_path, ids):
    def compilations(depth):
        write_model(tmp_path / f"deep{depth}", num_hidden_layers=depth)
        jax.clear_caches()
        with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
            seen = []

            class Seen(logging.Handler):
                def emit(self, record):
                    if record.getMessage().startswith("Compiling"):
                        seen.append(record.getMessage())

            handler = Seen()
            logger = logging.getLogger("jax")
            patch.setattr(logger, "propagate", False)
            logger.addHandler(handler)
            try:
                prune_masks(tmp_path / f"out{depth}", tmp_path / f"deep{depth}", ids, *SMALL)
            finally:
                logger.removeHandler(handler)
        return len(seen)

    shallow = compilations(2)
    assert shallow > 5
    assert compilations(6) == shallow
