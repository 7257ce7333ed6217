"""Gradients of the dense model that a run needs: computed by a backward sweep before its first block and kept on disk.

A resumed run does not repeat a finished sweep. The primary process has the file and sends the others what it reads.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from barber_jax.console.progress import Progress
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.devices.mesh import Devices, broadcast_arrays, broadcast_from_primary, is_primary
from barber_jax.forward.cotangents import Norm
from barber_jax.forward.passes import Parameters
from barber_jax.forward.sweep import Wanted, sweep
from barber_jax.models.family import Model
from barber_jax.run.gradient_file import TOKENS, WEIGHTS, GradientFile


@dataclass(frozen=True)
class Sweeps:
    """What backward sweeps need, and where their results are kept.

    Attributes:
        checkpoint, model: the dense model.
        ids: int32 [M, B, L] calibration tokens.
        devices: to compute on.
        progress: shows the sweeps.
        folder: of the unfinished run; None on processes other than the primary one.
        offload: keep activations in host memory, with one micro-batch at a time on the device.
    """

    checkpoint: Checkpoint
    model: Model
    ids: np.ndarray
    devices: Devices
    progress: Progress
    folder: Path | None
    offload: bool = False

    def weight_norms(self, norm: Norm) -> Callable[[int], Parameters]:
        """Norms over samples of the weight gradients of the next-token loss.

        Returns:
            A function from a block's index to kernel path -> float32 [in, out] on the devices; see
            `forward.sweep.BlockGradients`.

        Raises:
            BarberError: the file cannot be written, or the gradients overflow.
        """
        shapes = dict(self.model.block().shapes)
        read = self._kept(WEIGHTS, Wanted("data", norm), {path: shapes[path] for path in self._kernels()})
        return lambda index: self.devices.put_block(self.model.sub_blocks, read(index))

    def token_weights(self, seed: int) -> Callable[[int], dict[str, np.ndarray]]:
        """Weight of each token in a linear's error: mean over the linear's outputs of the squared gradient of the end
        loss, scaled to a mean of 1; labels are drawn from the dense model's own distribution.

        Args:
            seed: of the labels.

        Returns:
            A function from a block's index to kernel path -> float32 [S, L].

        Raises:
            BarberError: the file cannot be written, or the gradients overflow.
        """
        shape = (self.ids.shape[0] * self.ids.shape[1], self.ids.shape[2])
        wanted = Wanted("model", tokens=True, seed=seed)
        read = self._kept(TOKENS, wanted, dict.fromkeys(self._kernels(), shape))
        return lambda index: {path: scaled(squares) for path, squares in read(index).items()}

    def _kernels(self) -> list[str]:
        return [path for sub in self.model.sub_blocks for path in sub.kernels]

    def _kept(
        self, name: str, wanted: Wanted, shapes: dict[str, tuple[int, ...]]
    ) -> Callable[[int], dict[str, np.ndarray]]:
        """Results of a sweep by the index of a block, from a file that is written first where it is not whole.

        Args:
            name: of the file.
            shapes: kernel path -> shape of its array.
        """
        file = GradientFile(self.folder / name, self.model.layers, shapes) if is_primary() else None

        def blocks():
            with self.progress.phase("gradients of the dense model", 2 * self.model.layers) as phase:
                inputs = (self.checkpoint, self.model, self.ids, self.devices)
                for index, found in sweep(*inputs, wanted, offload=self.offload, phase=phase):
                    yield index, found.tokens if wanted.tokens else found.weights

        if not broadcast_from_primary(lambda: self._is_whole(file)):
            if file:
                file.write(blocks())
            else:
                for _ in blocks():
                    pass
        return lambda index: broadcast_arrays(lambda: (file.read(index), None))[0]

    def _is_whole(self, file: GradientFile) -> bool:
        """Whether an interrupted run has left the file whole; a damaged one is deleted."""
        if not file.path.exists():
            return False
        if file.is_whole():
            self.progress.say(f"{file.path}: gradients of the dense model, kept by the interrupted run")
            return True
        self.progress.say(f"{file.path}: damaged; the gradients of the dense model are computed again")
        with suppress(FileNotFoundError):
            file.path.unlink()
        return False


def scaled(weights: np.ndarray) -> np.ndarray:
    """Weights of tokens, scaled to a mean of 1; all 1 where none has any."""
    mean = weights.mean(dtype=np.float64)
    return (weights / mean).astype(np.float32) if mean > 0 else np.ones_like(weights)
