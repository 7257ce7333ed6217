"""Reports: run.json or recover.json, report.html and the model card, written beside the pruned or recovered model.

May import: console, masks, models, data, convert, devices, forward, criteria, stages, run.

| module | what it holds |
|---|---|
| `run_record`, `record_check` | run.json; its structure |
| `recover_record`, `recover_check` | recover.json; its structure |
| `report_page`, `recover_page` | report.html of a pruning run, and of a recovery |
| `parts` | texts and key figures that both pages share |
| `model_card`, `recover_card` | README.md of the pruned model, and of the recovered one |
| `events` | TensorBoard events of a training loop |
| `summary` | first and last line that a run prints |
| `figures`, `page` | SVG plots and HTML elements |
| `markup` | escaping, for HTML and Markdown |
"""

from barber_jax.reports.run_record import load_record, run_record

__all__ = ["load_record", "run_record"]
