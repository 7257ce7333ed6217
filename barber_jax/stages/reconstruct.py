"""Reconstruction: the surviving weights of a sub-block are trained to give its target, and the best are kept."""

from dataclasses import dataclass

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.options import OptionGroup
from barber_jax.forward.passes import Parameters
from barber_jax.stages import training
from barber_jax.stages.base import INT32_MAX, Stage, Work

VALIDATIONS = 10
"""How often the weights are validated in the course of a training."""


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions(OptionGroup):
    """Better weights: train those that survive."""

    reconstruct: int = 0
    """Steps of training the surviving weights of each sub-block; 0 = none."""
    reconstruct_rate: float = 0.01
    """Learning rate, as a fraction of the root mean square of a matrix's surviving weights."""
    reconstruct_batch: int = 1
    """Samples in a step."""
    reconstruct_scope: training.Scope = "weights"
    """What is trained: surviving weights, or all = biases and norms too."""

    def settle(self) -> None:
        self._require_least(0, "reconstruct")
        self._require_least(1, "reconstruct_batch")
        self._require_most(INT32_MAX, "reconstruct", "reconstruct_batch")
        if not 0 < self.reconstruct_rate <= 1:  # NaN fails this too
            raise BarberError(f"--reconstruct-rate {self.reconstruct_rate:g} is outside (0, 1]")


class Reconstruct(Stage):
    """Reconstruction as a stage."""

    name = "reconstruct"
    options = ("reconstruct_rate", "reconstruct_batch", "reconstruct_scope")
    switch = "--reconstruct"
    changes_masks = False

    def enabled(self, options: ReconstructOptions) -> bool:
        return options.reconstruct > 0

    def validates(self, options: ReconstructOptions) -> bool:
        return True

    def __call__(self, work: Work) -> None:
        """Train, and keep the weights with the lowest loss on held-out samples."""
        with work.watch.stage(f"{work.sub.name} reconstruct"):
            self._train(work)

    def _train(self, work: Work) -> None:
        options, base = work.options, work.parameters
        plan = training.Plan(options.reconstruct, options.reconstruct_rate, options.token_weighting)
        paths = training.trained_paths(work.definition, work.sub, options.reconstruct_scope)
        state = training.begin(work.sub, plan, {path: base[path] for path in paths}, work.masks)

        def validated() -> tuple[float, Parameters]:
            # Rounded to what will be written before it is measured.
            values = training.rounded(state.values, {path: work.dense[path] for path in paths})
            return work.loss({**base, **values}, work.masks, work.streams.validation), values

        least, best = validated()
        best_step = 0
        stream = work.streams.rebuilt.part(work.streams.training)
        target = work.target.part(work.streams.training)
        seed = options.seed + work.round
        schedule = training.schedule(work.samples, options.reconstruct, options.reconstruct_batch, seed)
        for span in np.array_split(np.arange(options.reconstruct), min(VALIDATIONS, options.reconstruct)):
            for hidden, wanted, order in training.batches(stream, target, schedule[span], work.data_parallel):
                arguments = (work.definition, work.sub, plan, base, work.masks, hidden, wanted, order, state)
                state = training.train(*arguments)
            loss, values = validated()
            if loss < least:
                least, best, best_step = loss, values, int(span[-1]) + 1
        work.updated = {**work.updated, **best}
        work.record.setdefault("best_steps", []).append(best_step)


STAGE = Reconstruct()
