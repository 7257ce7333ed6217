"""The device check: its steps, what it does when they fail or the time is up, its page, and checks side by side."""

import json

import numpy as np
import pytest
from rich.console import Console

from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.eval import device_check, device_masks, device_page, study, synthetic
from barber_jax.eval.device_check import DeviceCheckConfig, Step

SILENT = Console(quiet=True)
SPEED = {
    "steady": {"seconds": 2.0, "operations": 4e12, "flops": 2e12, "fraction_of_peak": 0.5},
    "blocks": [
        {"read": 9.0, "start": 5.0, "propagate": 0.5, "commit": 9.0},
        {"read": 9.0, "start": 1.0, "mlp gradient": 2.0, "commit": 9.0},
    ],
    "compilation": {"seconds": {"trace": 1.0, "compile": 2.5}},
    "peak_memory": {"host_bytes": 10**9, "device_bytes": 3 * 10**9},
    "device": {"platform": "gpu", "kind": "Some GPU", "count": 1},
    "versions": {"jax": "1.2.3"},
}


def check(**masks) -> dict:
    """Content of a device_check.json with one speed step, one of masks and one of kernels."""
    settings = {"wanda": {"agreement": 0.995, "lowest_matrix": 0.99, "weights": 100, "seconds": 1.0} | masks}
    kernels = {"attention": [{"dtype": "bfloat16", "length": 512, "implementation": "ours", "direction": "forward"}]}
    kernels["attention"][0] |= {"seconds": 0.002, "flops": 3e12}
    kernels["attention"].append({**kernels["attention"][0], "implementation": "cudnn", "error": "<b>no kernel</b>"})
    planned = [
        Step("speed", "wanda, float32", "benchmark", (), status="done", seconds=30.0, result=SPEED),
        Step("masks", "float32", "device_masks", (), status="done", result={"settings": settings}),
        Step("kernels", "alone", "device_kernels", (), status="out of time", result=kernels),
    ]
    head = {"format": device_page.FORMAT, "version": device_page.VERSION, "shape": "llama-7b"}
    return head | device_check.summary(planned)


def test_forecast_propagates_stream_a_and_leaves_files_out():
    step = Step("speed", "wanda", "benchmark", (), result=SPEED)
    assert device_check.forecast(step)["seconds"] == 32 * (1.0 + 2.0 + 0.5)
    assert device_check.forecast(step)["compiling_seconds"] == 3.5


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("", "it wrote nothing"),
        ("reading\nerror: no such file\n", "error: no such file"),
        (
            "Traceback:\n  File\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory\n----\nFor simplicity",
            "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory",
        ),
        ("Killed", "Killed"),
    ],
)
def test_error_line(log, line):
    assert device_check.error_line(log) == line


def test_comparisons_of_masks_share_the_device_but_not_a_tpu():
    planned = [Step(part, "", "", ()) for part in ("masks", "masks", "masks", "speed", "masks")]

    def groups(platform):
        waiting, sizes = list(enumerate(planned)), []
        while waiting:
            sizes.append(len(device_check.next_group(waiting, platform)))
        return sizes

    assert groups("gpu") == [3, 1, 1]
    assert groups("tpu") == groups("cpu") == groups(None) == [1, 1, 1, 1, 1]


def test_time_that_is_up_and_steps_that_tell_nothing_on_a_cpu(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(device_check, "run_step", lambda step, left: ran.append(step.name))
    late, only = Step("masks", "late", "", ()), Step("masks", "only", "", (), accelerators_only=True)
    device_check.run_group([late, only], 60, "cpu", SILENT)
    assert (ran, only.status) == (["late"], "left out")
    device_check.run_group([late, only], -1, "gpu", SILENT)
    assert (ran, late.status) == (["late"], "out of time")


def test_a_step_out_of_time_keeps_what_it_wrote(tmp_path, monkeypatch):
    script = tmp_path / "endless.py"
    script.write_text(
        "import sys, time, pathlib\npathlib.Path(sys.argv[-1]).write_text('{\"found\": 1}')\ntime.sleep(600)\n"
    )
    step = Step("masks", "endless", "endless", (), log=tmp_path / "log")
    real = device_check.subprocess.Popen
    # Only the module is another one; the process, its end and its file are real.
    monkeypatch.setattr(
        device_check.subprocess, "Popen", lambda command, **more: real([command[0], str(script), *command[3:]], **more)
    )
    device_check.run_step(step, 2)
    assert (step.status, step.result) == ("out of time", {"found": 1})
    assert step.seconds < 60


def test_a_failed_step_says_why(tmp_path):
    step = Step("masks", "wrong", "device_masks", ("--compute-dtype", "float7"), log=tmp_path / "log")
    device_check.run_step(step, 120)
    assert step.status == "failed"
    assert step.error.startswith("error: ")
    assert "float7" in step.error


def test_page_of_two_checks(tmp_path):
    for name, agreement in (("one", 0.995), ("other", 1.0)):
        (tmp_path / name).mkdir()
        device_check.write(check(agreement=agreement), tmp_path / name)
    study.run([str(tmp_path / "one"), str(tmp_path / "other"), "--out", str(tmp_path / "study")])
    text, html = (tmp_path / "study" / "study.md").read_text(), (tmp_path / "study" / "study.html").read_text()
    assert "| precision | setting | one | other |" in text
    assert "| float32 | wanda | 99.500% (99.00%) | 100.000% (99.00%) |" in text
    assert "1.9 min for 32 blocks" in text
    assert "Some GPU" in html
    assert "<h2>Attention</h2>" in html
    assert "<b>no kernel</b>" not in html
    assert "&lt;b&gt;no kernel" in html
    assert json.loads((tmp_path / "study" / "study.json").read_text())["device_checks"].keys() == {"one", "other"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: {},
        lambda c: [],
        lambda c: c | {"version": 99},
        lambda c: c | {"steps": 3},
        lambda c: {key: value for key, value in c.items() if key != "shape"},
        lambda c: c | {"environment": {"versions": {}}},
        lambda c: c | {"environment": 7},
        lambda c: c | {"steps": [{**c["steps"][0], "seconds": 10**400}]},
    ],
)
def test_damaged_check_is_one_line(tmp_path, damage):
    (tmp_path / device_page.CHECK_FILE).write_text(json.dumps(damage(check())))
    with pytest.raises(BarberError, match="check again"):
        device_page.read_check(tmp_path / device_page.CHECK_FILE)


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_minutes_are_positive(minutes, tmp_path):
    with pytest.raises(BarberError, match="--minutes"):
        DeviceCheckConfig(out=tmp_path, minutes=minutes)


def test_agreement_of_masks():
    files = [device_masks.reference_file(setting) for setting in ("wanda, no rebuild", "wanda, output1")]
    same = device_masks.agreement(files[0], files[0])
    assert (same["agreement"], same["lowest_matrix"]) == (1, 1)
    masks = [device_masks.read_masks(file) for file in files]
    equal = [masks[0].read(name) == masks[1].read(name) for name in masks[0].names()]
    found = device_masks.agreement(*files)
    assert found["agreement"] == pytest.approx(np.mean(np.concatenate([each.ravel() for each in equal])))
    assert found["lowest_matrix"] == pytest.approx(min(each.mean() for each in equal))
    assert found["lowest_matrix"] < 1


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_masks_of_the_packaged_model_are_those_recorded(tmp_path):
    found = device_masks.compare(device_masks.MasksConfig(json=tmp_path / "masks.json"), tmp_path / "masks.json")
    assert found["settings"].keys() == device_masks.SETTINGS.keys()
    for setting, entry in found["settings"].items():
        assert entry["agreement"] > 0.999, setting
    assert json.loads((tmp_path / "masks.json").read_text()) == found


def test_synthetic_checkpoint_is_read_by_its_shapes(tmp_path):
    shape = synthetic.Shape(blocks=2, hidden=16, intermediate=32, heads=4, kv_heads=2, vocabulary=10)
    synthetic.write(tmp_path / "model", shape, shard=2000)
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    assert {name: checkpoint.shape(name) for name in shape.tensors} == shape.tensors
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1


@pytest.mark.slow
def test_small_check_from_end_to_end(tmp_path):
    device_check.run(["--out", str(tmp_path), "--shape", "small", "--minutes", "2"])
    content = device_page.read_check(tmp_path / device_page.CHECK_FILE)
    status = {step["name"]: step["status"] for step in content["steps"]}
    assert status["float32"] == status["wanda + rebuild, float32"] == "done"
    assert "failed" not in status.values()
    assert content["environment"]["device"]["platform"] == "cpu"
    assert content["forecast"]
