"""The tables of options in docs/: every option of a command once, in the order of its --help."""

import dataclasses
import re
from pathlib import Path

import pytest

from barber_jax.config import PruneConfig
from barber_jax.console.options import flag
from barber_jax.recovery.recover_config import RecoverConfig

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("page", "config"), [("using.md", PruneConfig), ("recover.md", RecoverConfig)])
def test_every_option_is_in_the_table(page, config):
    text = (DOCS / page).read_text(encoding="utf-8")
    table = next(part for part in text.split("\n\n") if "| **files** |" in part)
    documented = [option for row in table.splitlines() for option in re.findall(r"`(--[\w-]+)`", row.split("|")[1])]
    options = [flag(each.name) for group in config.GROUPS.values() for each in dataclasses.fields(group)]
    assert [option for option in documented if not option.startswith("--no-")] == options
