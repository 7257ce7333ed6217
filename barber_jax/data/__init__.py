"""Data: calibration samples and evaluation windows from text files and Hub datasets.

May import: console.

| module | what it holds |
|---|---|
| `text` | documents of local files and of Hub datasets, and their token ids |
| `local` | documents of local files and folders, one after another |
| `lines`, `columns` | .txt and JSON; .parquet, .arrow and saved datasets |
| `sampling` | token ids of local text in bounded memory |
| `calibration` | calibration samples |
| `windows` | evaluation windows |
| `hub` | check that the Hub can be reached |

JAX is not imported here.
"""

from barber_jax.data.calibration import load_calibration
from barber_jax.data.text import read_documents
from barber_jax.data.windows import cut_windows, evaluation_ids

__all__ = ["cut_windows", "evaluation_ids", "load_calibration", "read_documents"]
