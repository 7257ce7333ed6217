"""Every reader, given damaged files from a seed (`mutations.py`): each is read, or refused in one line.

    .venv/bin/pytest -m '' -n 0 tests/end_to_end/test_fuzz.py

2,000 inputs for a reader; of config.json 400 for each of the five families. Fewer where one takes long: .bin (600),
.arrow (200), Orbax (150), blocks of an unfinished run as a whole (150; 2,000 for the file alone), an
unfinished recovery (150), reports and studies with their plots (60).

A fault is shown with seed and index. To repeat input 17: `mutate(files, names, random.Random(f"{SEED} 17"))`.
"""

import gzip
import json
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from checkpoints import FAMILIES, torch, write_model
from cli import prune_masks
from mutations import files_of, fuzz
from recovered import write_recovered
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.orbax_folder import write_orbax
from barber_jax.convert.parameters import check_tensors
from barber_jax.data.calibration import load_calibration
from barber_jax.data.text import tokenize
from barber_jax.eval import device_page
from barber_jax.eval.grid import settings
from barber_jax.eval.grid_file import read_grid
from barber_jax.eval.runs import load_run
from barber_jax.eval.study import as_json, study
from barber_jax.eval.tables import markdown, runs_table
from barber_jax.masks.mask_file import read_masks
from barber_jax.models import build_model
from barber_jax.recovery.checkpoints import Checkpoints
from barber_jax.recovery.training import State
from barber_jax.reports.recover_card import recover_card
from barber_jax.reports.recover_page import write_recover_report
from barber_jax.reports.report_page import description, write_report
from barber_jax.run.block_file import NAME, READ_ERRORS, BlockHandler, BlockRestore
from barber_jax.run.run_state import ITEM, RunState

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("drawn")]

WORDS = ("the cat sat on a mat and saw the dog run far away from it again while rain fell on " * 2).split()
SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture
def attack(tmp_path, capfd):
    """Function that fuzzes a reader on a folder of its own; `names` are the files that are damaged, by default all."""

    def run(files, read, count=2000, names=None, **more):
        folder = tmp_path / "attacked"
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        # The sound files are read, and what a library says the first time is said here.
        read(folder)
        capfd.readouterr()
        fuzz(folder, files, names or list(files), lambda: read(folder), count, capfd, **more)

    return run


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>"], show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    write_model(folder, **SMALL)
    return folder


def read_model(path):
    """All that a command reads of a model."""
    checkpoint = open_checkpoint(str(path))
    model = build_model(checkpoint.config, jnp.float32)
    check_tensors(checkpoint, model)
    for name in checkpoint.names():
        # One row of a table of frequencies or the like may be of a dtype that is not read.
        if not name.endswith(model.names.ignored):
            checkpoint.read(name)
            checkpoint.mask(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_config(family, tmp_path, attack):
    # Gemma's entry for each block.
    kinds = {"layer_types": ["sliding_attention"]} if "layer_types" in FAMILIES[family][2] else {}
    write_model(tmp_path / "model", family, **SMALL, **kinds)
    attack(files_of(tmp_path / "model"), read_model, 400, ["config.json"])


def test_safetensors(tmp_path, attack):
    write_model(tmp_path / "model", **SMALL)
    attack(files_of(tmp_path / "model"), read_model, names=["model.safetensors"])


def test_safetensors_shards_and_their_index(tmp_path, attack):
    write_model(tmp_path / "model", shard_size=4000, **SMALL)
    files = files_of(tmp_path / "model")
    index = "model.safetensors.index.json"
    attack(files, read_model, names=[index, index, max(files)])


def test_bin(tmp_path, attack):
    write_model(tmp_path / "model", **SMALL)
    tensors = {name: torch.from_numpy(array) for name, array in load_file(tmp_path / "model/model.safetensors").items()}
    (tmp_path / "model/model.safetensors").unlink()
    torch.save(tensors, tmp_path / "model/pytorch_model.bin")
    attack(files_of(tmp_path / "model"), read_model, 600, ["pytorch_model.bin"])


def test_orbax(tmp_path, attack):
    write_model(tmp_path / "model", **SMALL)
    (tmp_path / "both").mkdir()
    shutil.copy(tmp_path / "model/config.json", tmp_path / "both")
    write_orbax(tmp_path / "both", open_checkpoint(str(tmp_path / "model")), None)
    attack(files_of(tmp_path / "both"), read_model, 150)


def write_gguf(path):
    """A model of one block with a tokenizer."""
    hidden, inner, tokens = 32, 32, ["<unk>", "<s>", "</s>", *"abcdefghij", "ab", "cd", "abcd"]
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": hidden, "feed_forward_length": inner}
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 2, "rope.dimension_count": 16}
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "gpt-2")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.merges", ["a b", "c d", "ab cd"])
    writer.add_array("tokenizer.ggml.token_type", [3] * 3 + [1] * (len(tokens) - 3))
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    shapes |= {f"blk.0.{name}": (hidden, hidden) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {"blk.0.ffn_gate": (inner, hidden), "blk.0.ffn_up": (inner, hidden), "blk.0.ffn_down": (hidden, inner)}
    shapes |= {"blk.0.attn_norm": (hidden,), "blk.0.ffn_norm": (hidden,)}
    for name, shape in shapes.items():
        value = rng.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if "ffn_up" in name or "attn_v" in name else None
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(value, kind) if kind else value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path, attack):
    def read(folder):
        read_model(folder / "model.gguf")
        tokenize(open_checkpoint(str(folder / "model.gguf")).tokenizer(), "abcd cab jig")

    write_gguf(tmp_path / "model.gguf")
    attack(files_of(tmp_path), read)


def test_tokenizer(tokenizer_folder, attack):
    def read(folder):
        tokenize(open_checkpoint(str(folder)).tokenizer(), " ".join(WORDS))

    attack(files_of(tokenizer_folder), read, 2000, ["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])


def write_sources(folder):
    """Calibration sources of every kind, of three documents or rows."""
    documents = [" ".join(WORDS), " ".join(WORDS[::-1]), " ".join(WORDS[::2] * 3)]
    rows = [{"text": document, "number": 1} for document in documents]
    lines = "\n".join(map(json.dumps, rows)).encode()
    table = pa.table({"text": documents, "number": [1, 2, 3]})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    for name, opened in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with opened(folder / name, table.schema) as writer:
            writer.write_table(table)
    np.save(folder / "a.npy", np.arange(48, dtype=np.int32).reshape(3, 16))
    for name, content in (
        ("a.txt", " ".join(documents).encode()),
        ("a.jsonl", lines),
        ("a.json", json.dumps(rows).encode()),
    ):
        (folder / name).write_bytes(content)
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))


SOURCES = ["npy", "txt", "txt.gz", "jsonl", "jsonl.gz", "json", "json.gz", "parquet", "stream.arrow", "file.arrow"]


@pytest.mark.parametrize("kind", SOURCES)
def test_calibration(kind, tmp_path, tokenizer_folder, attack):
    write_sources(tmp_path)
    name = kind if kind.endswith(".arrow") else f"a.{kind}"
    tokenizer = open_checkpoint(str(tokenizer_folder)).tokenizer()

    def read(folder):
        load_calibration(str(folder / name), lambda: tokenizer, samples=2, length=4, seed=0, vocab_size=97)

    attack({name: (tmp_path / name).read_bytes()}, read, 200 if "arrow" in kind else 2000)


@pytest.fixture(scope="module")
def run_files(tmp_path_factory):
    """What a run leaves, without the weights, with results of evaluations."""
    folder = tmp_path_factory.mktemp("run")
    write_model(folder / "model", **SMALL)
    np.save(folder / "ids.npy", np.random.default_rng(1).integers(0, 97, (4, 16)))
    prune_masks(folder / "out", folder / "model", folder / "ids.npy", "--samples", 4, "--length", 8, "--refine", 2)
    files = {name: (folder / "out" / name).read_bytes() for name in ("run.json", "masks.safetensors")}
    result = {"ckpt": "x", "source": "text.txt", "split": None, "length": 8, "windows": 2, "tokens": 16}
    result |= {"perplexity": 12.5, "nll": 2.5, "seconds": 1.0}
    tasks = {"rte": {"acc": 0.5}, "boolq": {"acc": 0.25}}
    zero_shot = {"format": "barber_jax.zero_shot", "version": 1, "limit": 9, "tasks": tasks, "mean": 0.375}
    files["perplexity.json"] = json.dumps({"ckpt": "x", "results": [result, {**result, "source": "b"}]}).encode()
    files["zero_shot.json"] = json.dumps(zero_shot).encode()
    return files


def test_masks(run_files, attack):
    def read(folder):
        masks = read_masks(folder)
        for name in masks.names():
            masks.read(name)

    attack({"masks.safetensors": run_files["masks.safetensors"]}, read)


@pytest.mark.parametrize("name", ["run.json", "perplexity.json", "zero_shot.json"])
def test_run(name, run_files, attack):
    def read(folder):
        run = load_run(folder)
        markdown(*runs_table([run]))
        json.dumps(as_json([run], [], []), ensure_ascii=False).encode()
        description(run.record)

    attack(run_files, read, names=[name])


def test_report_and_study(run_files, attack, tmp_path):
    def read(folder):
        write_report(folder)
        study([load_run(folder, "one"), load_run(folder, "other")], tmp_path / "study")

    attack(run_files, read, 60, fresh=True)


@pytest.fixture(scope="module")
def check_file():
    """A device_check.json with something in every table."""
    steady = {"seconds": 2.0, "operations": 4e12, "flops": 2e12, "fraction_of_peak": 0.5}
    kernel = {"dtype": "bfloat16", "precision": "default", "seconds": 0.002, "flops": 3e12}
    selection = {"granularity": "layer", "what": "start", "selection": "top_k", "seconds": 0.1}
    attention = {**kernel, "length": 512, "implementation": "ours", "direction": "forward"}
    results = {
        "speed": {"steady": steady, "blocks": [{"read": 9.0, "start": 5.0}], "peak_memory": {"host_bytes": 10**9}},
        "masks": {"settings": {"wanda": {"agreement": 0.9, "lowest_matrix": 0.8, "weights": 100, "seconds": 1.0}}},
        "kernels": {
            "attention": [attention, {**attention, "error": "none"}],
            "matrix_products": [kernel],
            "selection": [selection],
        },
    }
    step = {"name": "a", "arguments": [], "status": "done", "seconds": 3.0, "error": "", "log": None}
    content = {"format": device_page.FORMAT, "version": device_page.VERSION, "shape": "llama-7b"}
    content["environment"] = {
        "device": {"platform": "gpu", "kind": "Some GPU", "count": 1},
        "versions": {"jax": "1.2.3", "python": "3.11"},
        "driver": "1.0",
    }
    content["steps"] = [{**step, "part": part, "result": result} for part, result in results.items()]
    content["forecast"] = [{"name": "a", "layers": 2, "seconds": 9.0, "compiling_seconds": 3.0}]
    return json.dumps(content).encode()


def test_device_check(check_file, attack):
    def read(folder):
        checks = device_page.read_checks([folder])
        device_page.markdown_page(checks)
        "".join(map(str, device_page.page_parts(checks))).encode()
        json.dumps(as_json([], [], checks), ensure_ascii=False).encode()

    attack({device_page.CHECK_FILE: check_file}, read)


@pytest.fixture(scope="module")
def recovered_files(tmp_path_factory):
    """What a recovery leaves, without the weights."""
    return files_of(write_recovered(tmp_path_factory.mktemp("recovered") / "out"))


def test_recovered(recovered_files, attack):
    def read(folder):
        run = load_run(folder)
        markdown(*runs_table([run]))
        json.dumps(as_json([run], [], []), ensure_ascii=False).encode()
        recover_card("name", run.recovered)

    attack(recovered_files, read, names=["recover.json"])


def test_recovered_report_and_study(recovered_files, attack, tmp_path):
    def read(folder):
        write_recover_report(folder)
        study([load_run(folder, "one"), load_run(folder, "other")], tmp_path / "study")

    attack(recovered_files, read, 60, fresh=True)


def moments(value):
    """The state of a recovery in which every number is `value`."""
    values = {"a": jnp.full((8, 8), value)}
    return State(values, (jax.tree.map(jnp.copy, values), jnp.int32(value)), jnp.int32(value))


@pytest.fixture(scope="module")
def checkpoint_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recovery") / "out.run"
    with Checkpoints.create(folder, IDENTITY, overwrite=False) as checkpoints:
        checkpoints.save(3, moments(3.0), {"log": {"best_step": 3}, "text": {"next": 12}}, keep=set())
    return files_of(folder)


def test_unfinished_recovery(checkpoint_files, attack):
    def read(folder):
        with Checkpoints.resume(folder, IDENTITY) as checkpoints:
            for step in checkpoints.steps():
                state, progress = checkpoints.restore(step, moments(0.0))
                # What is read is what was written, or is not taken.
                assert (progress["log"], progress["text"]) == ({"best_step": 3}, {"next": 12})
                assert all(np.all(leaf == 3) for leaf in jax.tree.leaves(state))

    attack(checkpoint_files, read, 150, fresh=True)


GRIDS = {
    "grid.yaml": b"""prune: {sparsity: 0.5, calibration: x.npy, samples: 4, length: 32}
sweep:
  - {method: [magnitude, wanda], rebuild: false}
  - {method: [wanda, sparsegpt], pattern: 2:4, alpha: [0.1, 0.3], granularity: output1}
  - {method: wanda, refine: &a [2, 4], reconstruct: *a}
perplexity: {dataset: [wikitext2], length: 32, windows: 2}
zero_shot: {tasks: [boolq, rte]}
dense: true
""",
    "grid.toml": b"""dense = true
sweep = [{method = ["magnitude", "wanda"], rebuild = false}, {method = "wanda", alpha = [0.1, 0.3]}]
[prune]
sparsity = 0.5
samples = 4
[perplexity]
dataset = ["wikitext2"]
""",
}


@pytest.mark.parametrize("name", GRIDS)
def test_grid(name, attack):
    attack({name: GRIDS[name]}, lambda folder: settings(read_grid([folder / name]), "some/model"))


IDENTITY = {"--alpha": 0.1, "--method": "wanda", "--rebuild": True, "--batch": None, "content of --ckpt x": "0123" * 8}


ARRAYS = {f"mask/{n}": np.arange(40, dtype=np.uint8) + n for n in range(3)}


@pytest.fixture(scope="module")
def state_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state") / "out.partial"
    with RunState.create(folder, IDENTITY) as state:
        for index in range(2):
            state.commit(index, ARRAYS, {"block": index, "loss": 0.5, "sub_blocks": [{"name": "attention"}]})
    return files_of(folder)


def resume(folder):
    with RunState.resume(folder, IDENTITY) as state:
        for index in range(state.finished):
            arrays, record = state.load(index)
            assert record["block"] == index and list(arrays) == list(ARRAYS)
            assert all(np.array_equal(arrays[name], array) for name, array in ARRAYS.items())
        if state.damaged is not None:
            # Not an error: the block is computed again.
            raise BarberError("damaged")


def test_identity_of_an_unfinished_run(state_files, attack):
    # Without its blocks, which take long to open.
    attack({"identity.json": state_files["identity.json"]}, resume)


def test_unfinished_run(state_files, attack):
    attack(state_files, resume, 150, [name for name in state_files if name != "identity.json"], fresh=True)


def test_block_of_an_unfinished_run(state_files, attack):
    def read(folder):
        # The run state deletes a block that raises one of these.
        try:
            BlockHandler().restore(folder, BlockRestore())
        except READ_ERRORS as error:
            raise BarberError("damaged") from error

    attack({NAME: state_files[f"0/{ITEM}/{NAME}"]}, read)
