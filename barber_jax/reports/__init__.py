"""Reports: what a run leaves behind for people and scripts, beside the model itself.

May import: console, masks, models, data, convert, devices, forward, criteria, stages, run.

| module | what it holds |
|---|---|
| `run_record` | run.json |
| `report_page` | report.html |
| `model_card` | README.md of the result |
| `summary` | first and last line of a run |
| `figures`, `page` | plots and the HTML around them |
"""

from barber_jax.reports.run_record import load_record, run_record

__all__ = ["load_record", "run_record"]
