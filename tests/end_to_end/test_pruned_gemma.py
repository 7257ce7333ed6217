"""Gemma from end to end: masks against the slow statement of the method, and what transformers loads."""

import numpy as np
import pytest
import transformers
from checkpoints import IDS, logits, our_logits, torch
from cli import ORACLES, prune_masks

pytestmark = pytest.mark.usefixtures("optimized")

SETTINGS = {
    "wanda": {"method": "wanda", "granularity": "output1", "alpha": 0.1},
    "magnitude": {"method": "magnitude", "granularity": "block", "alpha": 0.1},
    "sparsegpt": {"method": "sparsegpt", "granularity": "layer", "alpha": 0.1},
    "2:4": {"method": "wanda", "granularity": "output1", "alpha": 0.3, "pattern": "2:4"},
}


CASES = [("gemma3_text", "wanda")]
SLOW = [("gemma2", "wanda"), *(("gemma3_text", setting) for setting in list(SETTINGS)[1:])]


@pytest.mark.parametrize(
    ("family", "setting"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_masks_are_those_of_the_slow_statement(family, setting, tiny, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ORACLES))
    load = torch.from_numpy
    import slow_reference

    np.save(tmp_path / "ids.npy", IDS[0])
    options = {f"--{name}": value for name, value in SETTINGS[setting].items()}
    line = ["--samples", 3, "--length", 40, *(word for option in options.items() for word in option)]
    masks = prune_masks(tmp_path / "out", tiny(family), tmp_path / "ids.npy", *line)
    want = slow_reference.prune(slow_reference.load(tiny(family)), load(IDS[0]).long(), **SETTINGS[setting])
    assert masks.keys() == want.keys()
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, want[name], name)
    pruned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(our_logits(tmp_path / "out"), logits(pruned, IDS[0]), atol=1e-4, rtol=0)
