"""Writes a tokenizer's files so that every version of transformers can load them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from barber_jax.console import documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG = "tokenizer_config.json"
NEW_NAME, KNOWN_NAME = "TokenizersBackend", "PreTrainedTokenizerFast"
"""One class: its name since transformers 5, which earlier versions and other loaders lack, and the one all know."""


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write a tokenizer's files to `folder`, with a class name in them that transformers 4 and 5 both have."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / CONFIG
    config = documents.read(path)
    if config.get("tokenizer_class") == NEW_NAME:
        config["tokenizer_class"] = KNOWN_NAME
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
