"""Eval: commands that measure a model or compare runs. Nothing else imports it.

May import: everything.

| module | what it holds |
|---|---|
| `perplexity`, `zero_shot` | the two commands that measure a checkpoint |
| `language_model`, `lm_eval_cli`, `task_data` | lm-eval's side of zero-shot tasks |
| `study`, `grid`, `runs`, `tables`, `agreement`, `study_page` | runs side by side, and grids of runs |
| `benchmark`, `operations`, `against_torch` | speed, against the hardware's and PyTorch's |
| `demo`, `train_opt` | a real model from PyPI; a small OPT trained from scratch |
| `picture` | the picture of the README |
"""
