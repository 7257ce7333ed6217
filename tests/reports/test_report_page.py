"""report.html: what it holds, what it refuses, and that a real browser has nothing to complain of."""

import json
import os
import re
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from cli import ORACLES, command, prune_masks
from hypothesis import given, settings
from hypothesis import strategies as st

from barber_jax.masks.mask_file import read_masks
from barber_jax.models.decoder import SubBlock
from barber_jax.reports.report_page import output_sparsity
from barber_jax.stages import outliers
from barber_jax.stages.outliers import format_maps, parse_map

LLAMA = ORACLES / "llama"
QUICK = ["--samples", 4, "--length", 32]
pytestmark = pytest.mark.usefixtures("drawn")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A pruned checkpoint's folder, with the starting masks."""
    out = tmp_path_factory.mktemp("report") / "run <1>"
    prune_masks(
        out, LLAMA, LLAMA / "calibration_ids.npy", *QUICK, "--granularity", "layer", "--alpha", 0.5, "--save-start"
    )
    return out


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_outlier_maps_count_what_masks_prune(outputs, inputs, seed):
    rng = np.random.default_rng(seed)
    sub = SubBlock("mlp", (("mlp.up", "in"),))
    scores = rng.random((outputs, inputs), np.float32)
    masks = rng.random((2, outputs, inputs)) < 0.5
    named = lambda array: {"mlp.up.kernel": jnp.asarray(array)}  # noqa: E731
    got = np.asarray(outliers.outlier_maps(sub, named(scores), named(masks[0]), named(masks[1]))["mlp.up.kernel"])
    count = scores.size // outliers.OUTLIERS
    wanted = np.zeros((2, outliers.BINS, outliers.BINS), int)
    # Highest last; among equals the lower index is pruned first, and so is no outlier first.
    for flat in np.argsort(scores.ravel(), kind="stable")[scores.size - count :]:
        o, i = divmod(int(flat), inputs)
        for which in range(2):
            if not masks[which, o, i]:
                wanted[which, o * outliers.BINS // outputs, i * outliers.BINS // inputs] += 1
    np.testing.assert_array_equal(got, wanted)
    texts = format_maps(got)
    np.testing.assert_array_equal([parse_map(texts["before"]), parse_map(texts["after"])], wanted)


def test_starting_masks_are_those_of_a_run_without_a_rebuild(run, tmp_path):
    plain = prune_masks(tmp_path / "plain", LLAMA, LLAMA / "calibration_ids.npy", *QUICK, "--no-rebuild")
    start = read_masks(run / "start_masks.safetensors")
    assert start.names() == list(plain)
    for name, mask in plain.items():
        np.testing.assert_array_equal(start.read(name), mask)


def test_spread_over_outputs(run):
    masks = read_masks(run / "masks.safetensors")
    for name, values in output_sparsity(run / "masks.safetensors").items():
        pruned = 1 - masks.read(name).mean(axis=1)
        assert values[[0, 2, 4]] == pytest.approx([pruned.min(), np.median(pruned), pruned.max()])


def test_the_page_holds_settings_tables_and_plots(run):
    html = (run / "report.html").read_text()
    record = json.loads((run / "run.json").read_text())
    assert "<h1>run &lt;1&gt;</h1>" in html and "run <1>" not in html
    assert html.count("<figure") == 7
    for text in ("--granularity", "layer", "jax version", f"{record['totals']['swaps']:,}", "prefers-color-scheme"):
        assert text in html
    for block in record["blocks"]:
        for sub in block["sub_blocks"]:
            assert f"{sub['loss_before']:.4g}" in html
            assert all(name in html for name in sub["matrices"])
    # Nothing is fetched: every address is a namespace or inside the page.
    for address in re.findall(r'(?:href|src)=["\']([^"\']*)', html):
        assert address.startswith(("#", "data:"))
    assert "#0102" not in html
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    for used in re.findall(r'(?:xlink:href="|url\()#([^")]*)', html):
        assert used in ids


def test_a_run_without_a_rebuild_has_a_page_too(tmp_path):
    prune_masks(tmp_path / "out", LLAMA, LLAMA / "calibration_ids.npy", *QUICK, "--no-rebuild", "--method", "magnitude")
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("<figure") == 3 and "not rebuilt" in html


def test_the_command_makes_it_anew(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "report.html").unlink()
    done = command("report", copy)
    assert (done.returncode, done.stdout.strip()) == (0, str(copy / "report.html")), done.stderr
    same = (run / "report.html").read_text()
    for tag in ("<title>", "<h1>"):
        same = same.replace(f"{tag}run &lt;1&gt;", f"{tag}copy")
    assert (copy / "report.html").read_text() == same


def test_where_the_starting_masks_came_from(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    given = ["--masks", copy / "masks.safetensors", *QUICK]
    prune_masks(tmp_path / "next", LLAMA, LLAMA / "calibration_ids.npy", *given)
    record = json.loads((tmp_path / "next" / "run.json").read_text())
    assert record["started_from"]["method"] == "wanda" and record["started_from"]["folder"] == str(copy)
    assert str(copy) in (tmp_path / "next" / "report.html").read_text()
    # One that cannot be read costs no run.
    change(copy, version=9)
    prune_masks(tmp_path / "last", LLAMA, LLAMA / "calibration_ids.npy", *given)
    assert "started_from" not in json.loads((tmp_path / "last" / "run.json").read_text())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "run.json").unlink(), "run.json: no such file"),
        (lambda folder: (folder / "run.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "run.json").write_text("[]"), "not a record of barber_jax.prune"),
        (lambda folder: change(folder, version=3), "version 3, but this barber_jax reads versions up to 2"),
        (lambda folder: change(folder, blocks=None), "damaged: blocks is missing or not a list"),
        (lambda folder: (folder / "masks.safetensors").unlink(), "masks.safetensors: no such file"),
    ],
)
def test_bad_folders_are_one_line(run, tmp_path, spoil, says):
    copy = shutil.copytree(run, tmp_path / "copy")
    spoil(copy)
    done = command("report", copy)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and says in line


def change(folder, **entries):
    path = folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("size", ["1280,900", "390,800"])
def test_a_browser_shows_it_without_errors(run, tmp_path, size):
    """Errors land on the console, which --enable-logging=stderr shows; the page itself reports its widths."""
    probe = "<script>addEventListener('load',()=>{const d=document.documentElement;document.body.dataset.seen="
    probe += "[d.scrollWidth<=innerWidth,document.querySelectorAll('figure svg').length,"
    probe += (
        "[...document.querySelectorAll('figure svg')].every(s=>s.getBoundingClientRect().height>80)].join()})</script>"
    )
    page = tmp_path / "report.html"
    page.write_text((run / "report.html").read_text().replace("</body>", probe + "</body>"))
    done = subprocess.run(
        [
            *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size}"),
            *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert 'data-seen="true,7,true"' in done.stdout, done.stdout[-300:] + done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr
