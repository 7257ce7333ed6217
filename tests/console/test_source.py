"""What the source must not do: run somebody else's code, ask questions, read documents without bounds."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INTO_UNPUBLISHED = {
    *("causes.py", "compiled.py", "export.py", "gguf_file.py", "locks.py", "model_card.py", "outputs.py"),
    *("synthetic.py", "tokenizer_files.py", "train_opt.py"),
}
"""Files whose `write_text` goes to a folder or file that has another name until it is complete, or to a lock or log."""
FILES = sorted(path for folder in ("barber_jax", "convert", "eval") for path in (ROOT / folder).rglob("*.py"))


def calls(path):
    """(dotted name, keywords) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}


def violations(path):
    found = []
    for name, keywords in calls(path):
        last = name.rpartition(".")[2]
        given = {key: getattr(value, "value", None) for key, value in keywords.items()}
        if last in ("from_pretrained", "from_config") and given.get("trust_remote_code") is not False:
            found.append(f"{name} without trust_remote_code=False")
        if name.endswith("AutoModelForCausalLM.from_pretrained") and path.name != "torch_model.py":
            found.append(f"{name}: torch_model.load_model loads no kernels that a checkpoint names")
        if last == "Console" and {given.get("markup"), given.get("emoji")} != {False}:
            found.append(f"{name}: terminal.plain_console prints names letter by letter")
        if last == "load_dataset" and given.get("trust_remote_code"):
            found.append(f"{name} with trust_remote_code")
        if name in ("np.load", "numpy.load") and given.get("allow_pickle") is not False:
            found.append(f"{name} without allow_pickle=False")
        if name in ("torch.load", "self._torch.load") and given.get("weights_only") is not True:
            found.append(f"{name} without weights_only=True")
        if name.startswith(("pickle.", "marshal.", "shelve.", "dill.")) or name in ("eval", "exec", "input"):
            found.append(name)
        if name in ("os.system", "os.popen") or given.get("shell"):
            found.append(f"{name} runs a shell")
        if last in ("write_text", "write_bytes") and path.name not in INTO_UNPUBLISHED:
            found.append(f"{name}: outputs.write_whole writes files")
        reads = name.startswith(
            ("json.load", "tomllib.load", "yaml.load", "yaml.safe_load", "yaml.unsafe", "yaml.full")
        )
        if reads and path.name != "documents.py":
            found.append(f"{name}: documents.py is the one reader")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source(path):
    assert violations(path) == []


def test_the_calls_are_seen(tmp_path):
    """The test above can fail: each of these lines is a violation."""
    path = tmp_path / "a.py"
    lines = (
        *("AutoTokenizer.from_pretrained(x)", "A.from_pretrained(x, trust_remote_code=True)", "input()", "eval(x)"),
        *("load_dataset(x, trust_remote_code=True)", "np.load(x)", "torch.load(x)", "pickle.loads(x)", "json.loads(x)"),
        *("yaml.safe_load(x)", "tomllib.load(x)", "subprocess.run(x, shell=True)", "os.system(x)", "x.write_text(y)"),
        *("Console()", "Console(markup=False)"),
        "AutoModelForCausalLM.from_pretrained(x, trust_remote_code=False)",
    )
    for line in lines:
        path.write_text(line)
        assert len(violations(path)) == 1, line
    assert len(FILES) > 80
