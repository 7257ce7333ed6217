"""Convert: other people's checkpoint formats in and out, and the PyTorch side of masks.

May import: console, masks, models, data.

| module | what it holds |
|---|---|
| `checkpoint` | the lazy view of a checkpoint that every reader gives |
| `folder`, `hf_folder`, `torch_bin`, `orbax_folder` | readers of folders |
| `gguf_file`, `gguf_header`, `gguf_config`, `gguf_tokenizer` | reader of .gguf files |
| `download` | repositories of the Hub |
| `parameters` | Hugging Face tensors <-> Flax parameters |
| `export`, `safetensors_writer`, `formats` | writers |
| `mask_file` | the mask file's old address; it lives in `masks` |
| `torch_masks`, `apply_masks` | masks in PyTorch; these import torch and never JAX |
"""
