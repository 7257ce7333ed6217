"""Data: calibration samples, evaluation windows and text to train on, from text files and Hub datasets.

May import: console.

| module | what it holds |
|---|---|
| `text` | documents of local files and of Hub datasets, and their token ids |
| `local` | documents of local files and folders, one after another |
| `lines`, `columns` | .txt and JSON; .parquet, .arrow and saved datasets |
| `sampling` | token ids of local text in bounded memory |
| `streams` | token ids of text of any size, to hold out and to train on |
| `packing` | text to train on: packed windows, and batches of them in a random order |
| `calibration` | calibration samples |
| `windows` | evaluation windows |
| `begin` | the begin token in front of both |
| `hub` | check that the Hub can be reached |

JAX is not imported here, but by grain once `packing.batches` is called.
"""

from barber_jax.data.calibration import load_calibration
from barber_jax.data.text import read_documents
from barber_jax.data.windows import cut_windows, evaluation_ids

__all__ = ["cut_windows", "evaluation_ids", "load_calibration", "read_documents"]
