"""Device mesh: build it, move arrays between host and devices, and keep several processes consistent.

The sharding rules of a decoder block's arrays are in models/sharding.py.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from barber_jax.console.errors import BarberError
from barber_jax.devices import wire
from barber_jax.models.decoder import BlockDefinition, SubBlock
from barber_jax.models.sharding import DATA, MODEL, mask_axes, parameter_axes

Arrays = dict[str, np.ndarray]
"""Host arrays by name."""


class Devices:
    """The devices that a run uses: one device, or a mesh.

    Args:
        mesh: mesh with axes `DATA` and `MODEL`; None for the default device.
    """

    def __init__(self, mesh: Mesh | None = None):
        self._mesh = mesh

    @classmethod
    def of(cls, shape: tuple[int, int] | None) -> "Devices":
        """Build the mesh from its shape (data, model).

        Args:
            shape: None for one device or, in a multi-process run, for all devices of all processes along `data`.

        Raises:
            BarberError: there are too few devices, or a multi-process run would leave some unused.
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
            raise BarberError(
                f"--mesh data={data},model={model}: a run over several processes must use all {count} devices"
            )
        devices = jax.devices()[: data * model]
        axes = (AxisType.Auto, AxisType.Auto)
        return cls(jax.make_mesh(shape, (DATA, MODEL), axis_types=axes, devices=devices))

    @property
    def shape(self) -> tuple[int, int]:
        """Sizes of the mesh axes (data, model); (1, 1) without a mesh."""
        return (1, 1) if self._mesh is None else tuple(self._mesh.devices.shape)

    @property
    def used(self) -> list[jax.Device]:
        """The devices of the mesh, or the default device."""
        return jax.devices()[:1] if self._mesh is None else list(self._mesh.devices.flat)

    def context(self) -> contextlib.AbstractContextManager:
        """Context manager that sets the mesh; all computations of a run belong inside it."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def put(self, value: np.ndarray, *axes: str | None) -> jax.Array:
        """Copy a host array to the devices; each process transfers only the shards of its own devices.

        Args:
            axes: for each axis of the array, the mesh axis over which it is sharded, or None. Axes left out are
                replicated.
        """
        if self._mesh is None:
            return jnp.asarray(value)
        return jax.make_array_from_callback(value.shape, NamedSharding(self._mesh, P(*axes)), lambda at: value[at])

    def put_share(self, share: np.ndarray, *axes: Any) -> jax.Array:
        """Copy to the devices an array of which each process has an equal share, along the axes that are sharded.

        Args:
            axes: as for `put`; a tuple of mesh axes counts as one.
        """
        if self._mesh is None:
            return jnp.asarray(share)
        return jax.make_array_from_process_local_data(NamedSharding(self._mesh, P(*axes)), share)

    def put_block(self, sub_blocks: Sequence[SubBlock], tensors: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Copy parameters of a decoder block (path -> array) to the devices, sharded."""
        axes = parameter_axes(sub_blocks)
        return {path: self.put(value, *axes.get(path, ())) for path, value in tensors.items()}

    def put_masks(self, sub_blocks: Sequence[SubBlock], masks: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Copy the masks of a decoder block (kernel path -> bool [out, in]) to the devices, sharded as the kernels."""
        return {path: self.put(masks[path], *mask_axes(sub, path)) for sub in sub_blocks for path in sub.kernels}

    def fetch(self, tree: Any) -> Any:
        """Copy a tree of arrays to the host as NumPy arrays, each of them whole on every process."""
        if jax.process_count() > 1:
            tree = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self._mesh, P()))(tree)
        return jax.tree.map(np.asarray, tree)

    def check(self, definition: BlockDefinition, samples: int) -> None:
        """Raise `BarberError` unless the mesh divides the samples, and the sharded axis of every kernel."""
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
    """Whether this process is process 0, which writes the files and prints the progress."""
    return jax.process_index() == 0


def broadcast_from_primary(compute: Callable[[], Any]) -> Any:
    """Call `compute` on the primary process only and return its result, of the types of JSON, on every process."""
    if jax.process_count() == 1:
        return compute()
    return wire.decode(_broadcast(wire.encode(compute()) if is_primary() else b""))[0]


def broadcast_arrays(compute: Callable[[], tuple[Arrays, Any]]) -> tuple[Arrays, Any]:
    """`broadcast_from_primary` for arrays by name together with another value."""
    if jax.process_count() == 1:
        return compute()
    content = b""
    if is_primary():
        arrays, value = compute()
        content = wire.encode(value, arrays)
    value, arrays = wire.decode(_broadcast(content))
    return arrays, value


def _broadcast(sent: bytes) -> bytes:
    """Send bytes from the primary process to all; what the others give is not used."""
    content = np.frombuffer(sent, np.uint8)
    # The size in bytes may exceed int32, and without 64-bit types int64 is not available: GiB and remainder.
    size = np.asarray(divmod(content.size, 2**30), np.int32)
    whole, rest = multihost_utils.broadcast_one_to_all(size).tolist()
    if not is_primary():
        content = np.zeros(whole * 2**30 + rest, np.uint8)
    pieces = np.array_split(content, max(1, -(-content.size // 2**30)))
    return b"".join(multihost_utils.broadcast_one_to_all(piece).tobytes() for piece in pieces)


def require_agreement(what: str, values: dict) -> None:
    """Raise `BarberError` unless `values` are the same on every process; `what` names them in the message."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    if (digests != digests[0]).any():
        raise BarberError(f"the processes differ in {what}; start all with the same command and the same files")
