"""Convert: readers and writers of other projects' checkpoint formats, and masks in PyTorch.

May import: console, masks, models, data.

| module | what it holds |
|---|---|
| `checkpoint` | the interface of every reader: tensors are read one at a time |
| `folder`, `hf_folder`, `torch_bin`, `orbax_folder` | readers of checkpoint folders |
| `tensor_names` | stored tensor names -> Hugging Face's names of the whole model |
| `gguf_file`, `gguf_header`, `gguf_split`, `gguf_layout`, `gguf_tokenizer` | the reader of .gguf files |
| `gguf_config`, `gguf_gemma` | config.json of a llama or Gemma model in a .gguf file |
| `tokenizer_files` | writing of a tokenizer's files |
| `download` | downloads from the Hugging Face Hub |
| `tied_head` | which matrix is the head where config.json and the tensors disagree |
| `parameters` | Hugging Face tensors <-> Flax parameters |
| `flax_module` | a whole checkpoint as a Flax module with masks, and back |
| `export`, `safetensors_writer`, `formats` | writers |
| `finite` | refusal of values that do not fit their dtype |
| `mask_file` | re-export of `masks.mask_file` under its former path |
| `torch_masks`, `torch_model`, `apply_masks` | masks and models in PyTorch; these import torch and never JAX |
"""
