"""A whole model as one flat dict of parameters, the blocks' stacked, and its pass from token ids to hidden states.

Names are those of the Flax parameters after `embed.`, `blocks.` or `head.`: `blocks.self_attn.q_proj.kernel` is
[N, in, out], N blocks. A tied head has no kernel of its own. Masks have the kernels' names and layout.

Fully sharded data parallelism (arXiv 1910.02054, stage 3): every large array is sharded over all devices of the mesh,
and so are samples. A block's parameters are gathered when the block is computed, and its gradient is scattered.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.parameters import read_parameters, read_stacked
from barber_jax.devices.mesh import Devices
from barber_jax.forward.passes import Parameters
from barber_jax.models.decoder import PRODUCT, BlockDefinition, BlockStack, Definition
from barber_jax.models.family import Model
from barber_jax.models.sharding import DATA, MODEL, constrain
from barber_jax.recovery import lora

EMBED, BLOCKS, HEAD = "embed.", "blocks.", "head."
ALL = (DATA, MODEL)
"""Both mesh axes as one: the whole mesh."""
SMALL = 1 << 16
"""Elements of a parameter below which it may be replicated."""

Remat = Literal["all", "light", "none"]
"""What of a block is computed again for the gradient instead of being kept: everything; everything but the products of
its linears, which are most of the work; nothing."""


@dataclass(frozen=True)
class Program:
    """A model without its parameters; hashable, so that it can be a static argument of jitted functions.

    Attributes:
        embed, blocks, head: definitions of the parts.
        tied: path of the head's kernel where it is the token embedding transposed, and that embedding's path.
        remat: what is computed again for the gradient.
    """

    embed: Definition
    blocks: BlockStack
    head: Definition
    tied: tuple[str, str] | None
    remat: Remat = "all"

    @classmethod
    def of(cls, model: Model, remat: Remat = "all") -> "Program":
        """The program of a model."""
        embedding = {name: path for path, name in model.names.embed.items()}
        shared = [(path, embedding[name]) for path, name in model.names.head.items() if name in embedding]
        return cls(model.embed(), model.blocks(), model.head(), shared[0] if shared else None, remat)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the prunable kernels."""
        return tuple(f"{BLOCKS}{path}" for sub in self.blocks[0].sub_blocks for path in sub.kernels)

    def head_names(self, names: Iterable[str]) -> list[str]:
        """Those of some parameters' names that the head uses."""
        embedding = f"{EMBED}{self.tied[1]}" if self.tied else None
        return [name for name in names if name.startswith(HEAD) or name == embedding]

    def hidden_states(self, parameters: Parameters, masks: Parameters, ids: jax.Array) -> jax.Array:
        """Hidden states after the last block, [B, L, D], of token ids int32 [B, L].

        Args:
            parameters: of the whole model, and any low-rank factors.
            masks: of the kernels that have low-rank factors; {} where there are none.
        """

        def step(
            block: BlockDefinition, hidden: jax.Array, layer: tuple[Parameters, Parameters]
        ) -> tuple[jax.Array, None]:
            whole, kept = ({path: constrain(value) for path, value in part.items()} for part in layer)
            return constrain(block.run(lora.merge(whole, kept), hidden), ALL), None

        if self.remat != "none":
            kept = jax.checkpoint_policies.save_only_these_names(*([PRODUCT] if self.remat == "light" else []))
            step = jax.checkpoint(step, prevent_cse=False, policy=kept, static_argnums=0)
        hidden = constrain(self.embed.bind(part(parameters, EMBED))(ids), ALL)
        return self.blocks.scan(step, hidden, (part(parameters, BLOCKS), part(masks, BLOCKS)))[0]

    def logits(self, parameters: Parameters, hidden: jax.Array) -> jax.Array:
        """Logits of hidden states [B, L, D] after the last block: float32 [B, L, vocabulary].

        Args:
            parameters: those that the head uses.
        """
        own = part(parameters, HEAD)
        if self.tied:
            own = {**own, self.tied[0]: parameters[f"{EMBED}{self.tied[1]}"].T}
        return self.head.bind(own)(hidden).astype(jnp.float32)


def part(parameters: Parameters, prefix: str) -> Parameters:
    """The parameters under a prefix, by path without it."""
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def axes(name: str, shape: tuple[int, ...], mesh: tuple[int, int]) -> tuple[Any, ...]:
    """Mesh axes of each axis of a parameter: its longest axis that the mesh divides is sharded over all devices.

    Where the whole mesh divides no axis, one of the mesh axes is tried. The blocks' axis is scanned over, so it is
    never sharded.
    """
    if np.prod(shape) < SMALL or np.prod(mesh) == 1:
        return ()
    data, model = mesh
    for devices, axis_names in ((data * model, ALL), (data, DATA), (model, MODEL)):
        candidates = [axis for axis in range(name.startswith(BLOCKS), len(shape)) if shape[axis] % devices == 0]
        if devices > 1 and candidates:
            longest = max(candidates, key=lambda axis: shape[axis])
            return (*(None,) * longest, axis_names)
    return ()


def shard(parameters: Parameters, mesh: tuple[int, int]) -> Parameters:
    """Constrain the sharding of parameters, or of anything of their names and shapes, in a jitted function."""
    return {name: constrain(value, *axes(name, value.shape, mesh)) for name, value in parameters.items()}


def load(checkpoint: Checkpoint, model: Model, devices: Devices) -> Parameters:
    """Read a whole model to the devices, in the checkpoint's dtypes. The host holds one stacked parameter at a time."""
    program, loaded = Program.of(model), {}
    for prefix, names in ((EMBED, model.names.embed), (HEAD, model.names.head)):
        for path, name in names.items():
            if prefix == EMBED or not program.tied or path != program.tied[0]:
                (value,) = read_parameters(checkpoint, {path: name}).values()
                loaded[f"{prefix}{path}"] = put(f"{prefix}{path}", value, devices)
    for path in model.names.block:
        loaded[f"{BLOCKS}{path}"] = put(f"{BLOCKS}{path}", read_stacked(checkpoint, model, path), devices)
    return loaded


def load_masks(read: Callable[[str], np.ndarray], model: Model, devices: Devices) -> Parameters:
    """Read the masks of all prunable kernels to the devices: name -> bool [N, in, out], True = kept.

    Args:
        read: returns the mask of a weight, bool [out, in], by its Hugging Face name.
    """
    masks = {}
    for path in model.kernel_names(0):
        layers = [read(model.kernel_names(index)[path]).T for index in range(model.layers)]
        masks[f"{BLOCKS}{path}"] = put(f"{BLOCKS}{path}", np.stack(layers), devices)
    return masks


def put(name: str, value: np.ndarray, devices: Devices) -> jax.Array:
    """Copy a parameter to the devices, sharded."""
    return devices.put(value, *axes(name, value.shape, devices.shape))
