"""The devices that a computation runs on: the mesh, arrays between host and devices, agreement between processes.

How a decoder block's arrays are sharded over the mesh is in models/sharding.py.
"""

import contextlib
import hashlib
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from barber_jax.console.errors import BarberError
from barber_jax.models.decoder import BlockDefinition, SubBlock
from barber_jax.models.sharding import DATA, MODEL, mask_axes, parameter_axes

Shared = TypeVar("Shared")


class Devices:
    """What the computation runs on: one device, or a mesh.

    Args:
        mesh: with axes `DATA` and `MODEL`, or None for the default device.
    """

    def __init__(self, mesh: Mesh | None = None):
        self._mesh = mesh

    @classmethod
    def of(cls, shape: tuple[int, int] | None) -> "Devices":
        """A mesh of data x model devices; None: one device, or every device of every process as `data` if there are
        several processes.

        Raises:
            BarberError: there are not so many devices, or some process would have none of them.
        """
        count = jax.device_count()
        if shape is None:
            if jax.process_count() == 1:
                return cls()
            shape = (count, 1)
        data, model = shape
        if data * model > count:
            raise BarberError(f"--mesh data={data},model={model} needs {data * model} devices; there are {count}")
        if jax.process_count() > 1 and data * model < count:
            raise BarberError(f"--mesh data={data},model={model}: with many processes all {count} devices must be used")
        devices = jax.devices()[: data * model]
        axes = (AxisType.Auto, AxisType.Auto)
        return cls(jax.make_mesh(shape, (DATA, MODEL), axis_types=axes, devices=devices))

    @property
    def shape(self) -> tuple[int, int]:
        """Sizes of data and model."""
        return (1, 1) if self._mesh is None else tuple(self._mesh.devices.shape)

    @property
    def used(self) -> list[jax.Device]:
        """The devices."""
        return jax.devices()[:1] if self._mesh is None else list(self._mesh.devices.flat)

    def context(self) -> contextlib.AbstractContextManager:
        """In which everything is to be computed."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def put(self, value: np.ndarray, *axes: str | None) -> jax.Array:
        """An array of the host, spread over mesh axes; each process moves its own part only."""
        if self._mesh is None:
            return jnp.asarray(value)
        return jax.make_array_from_callback(value.shape, NamedSharding(self._mesh, P(*axes)), lambda at: value[at])

    def block(self, sub_blocks: Sequence[SubBlock], tensors: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The parameters of a decoder block."""
        axes = parameter_axes(sub_blocks)
        return {path: self.put(value, *axes.get(path, ())) for path, value in tensors.items()}

    def masks(self, sub_blocks: Sequence[SubBlock], masks: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Masks [out, in] of the kernels of a decoder block."""
        return {path: self.put(masks[path], *mask_axes(sub, path)) for sub in sub_blocks for path in sub.kernels}

    def fetch(self, tree: Any) -> Any:
        """Arrays -> NumPy arrays, whole on every process."""
        if jax.process_count() > 1:
            tree = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self._mesh, P()))(tree)
        return jax.tree.map(np.asarray, tree)

    def check(self, definition: BlockDefinition, samples: int) -> None:
        """Raise BarberError unless samples and linears divide evenly."""
        data, model = self.shape
        if samples % data:
            raise BarberError(f"--mesh data={data}: {data} does not divide the {samples} samples")
        shapes = dict(definition.shapes)
        for sub in definition.sub_blocks:
            for path in sub.kernels:
                axis = int(sub.splits_outputs(path))
                if shapes[path][axis] % model:
                    name, side = path.removesuffix(".kernel"), ("inputs", "outputs")[axis]
                    raise BarberError(
                        f"--mesh model={model}: {model} does not divide the {shapes[path][axis]} {side} of {name}"
                    )


def is_primary() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def share(make: Callable[[], Shared]) -> Shared:
    """What `make` returns on the primary process, on every process; the others do not call it."""
    if jax.process_count() == 1:
        return make()
    content = np.frombuffer(pickle.dumps(make()) if is_primary() else b"", np.uint8)
    # Whole gigabytes and the rest: without 64-bit types an int32 is what travels.
    size = np.asarray(divmod(content.size, 2**30), np.int32)
    whole, rest = multihost_utils.broadcast_one_to_all(size).tolist()
    if not is_primary():
        content = np.zeros(whole * 2**30 + rest, np.uint8)
    pieces = np.array_split(content, max(1, -(-content.size // 2**30)))
    return pickle.loads(b"".join(multihost_utils.broadcast_one_to_all(piece).tobytes() for piece in pieces))


def require_agreement(what: str, known: dict) -> None:
    """Raise BarberError unless every process knows the same."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).digest()
    everyone = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    if (everyone != everyone[0]).any():
        raise BarberError(f"the processes differ in {what}; start all with the same command and the same files")
