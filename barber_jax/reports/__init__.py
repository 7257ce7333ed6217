"""Reports: run.json, report.html and the model card that a run writes beside the pruned model.

May import: console, masks, models, data, convert, devices, forward, criteria, stages, run.

| module | what it holds |
|---|---|
| `run_record`, `record_check` | run.json; its structure |
| `report_page` | report.html |
| `model_card` | README.md of the pruned model |
| `summary` | first and last line that a run prints |
| `figures`, `page` | SVG plots and HTML elements |
| `markup` | escaping, for HTML and Markdown |
"""

from barber_jax.reports.run_record import load_record, run_record

__all__ = ["load_record", "run_record"]
