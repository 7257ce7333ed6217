"""The stage protocol: what a stage is, and the sub-block that stages hand on to each other.

A stage is one file of this folder that defines a frozen dataclass of its options and `STAGE`, and one line of `STAGES`.
"""

import abc
from dataclasses import dataclass, field
from typing import ClassVar

import jax

from barber_jax.console.options import OptionGroup
from barber_jax.console.progress import Stopwatch
from barber_jax.criteria.starting import BlockMasks
from barber_jax.forward.passes import Parameters
from barber_jax.forward.streams import Stream, Streams
from barber_jax.masks.selection import Selection
from barber_jax.models.decoder import BlockDefinition, SubBlock
from barber_jax.stages.loss import TokenWeighting, loss
from barber_jax.stages.targets import Target
from barber_jax.stages.weights import surviving_weights

INT32_MAX = 2**31 - 1
"""Swaps and steps are counted in int32."""


@dataclass(frozen=True, kw_only=True)
class SharedOptions(OptionGroup):
    """Options that several stages look at."""

    token_weighting: TokenWeighting = "none"
    """Weight of a token in the loss: none (the paper's), norm = normalised by its scale, as the next norm does."""
    target: Target = "dense"
    """Target of --alpha auto, --refine and --reconstruct: the dense model's stream, or dense outputs on same inputs."""
    rounds: int = 1
    """How often the stages of a sub-block are repeated."""

    def settle(self) -> None:
        self._require_least(1, "rounds")
        self._require_most(INT32_MAX, "rounds")


@dataclass
class Work:
    """A sub-block on its way through the stages.

    Attributes:
        definition: of the block.
        sub: the sub-block.
        options: of all stages.
        samples: calibration samples that stages learn from, without the held-out ones.
        data_parallel: over how many devices samples are sharded.
        selection: implementation of the selection, where a comparison group lies on one device.
        dense: parameters of the dense block, earlier sub-blocks as they have become.
        sparse: path -> weights that stand for the pruned sub-block in the rebuild's loss, where they differ from the
            dense ones: the criterion's at first, from the second round on those that the round before left.
        start_masks: masks before the first stage.
        streams: stream B enters the sub-block.
        watch: times the stages.
        token_weights: kernel path -> float32 stream [M, B, L] in chunks like stream B, weight of each token in the
            linear's error by the end loss; empty where no stage needs it.
        masks: masks as they are now.
        updated: path -> parameters as they are now, where they differ from the dense ones. Kernels hold the dense
            weight where pruned: what a weight regrows as.
        target: what the output should be, in chunks like stream B; None until it is known.
        round: 0, 1, ...
        record: figures for run.json.
    """

    definition: BlockDefinition
    sub: SubBlock
    options: SharedOptions
    samples: int
    data_parallel: int
    selection: Selection
    dense: Parameters
    sparse: Parameters
    start_masks: BlockMasks
    streams: Streams
    watch: Stopwatch
    token_weights: dict[str, Stream] = field(default_factory=dict)
    masks: BlockMasks = field(init=False)
    updated: Parameters = field(default_factory=dict)
    target: Stream | None = None
    round: int = 0
    record: dict = field(default_factory=dict)

    def __post_init__(self):
        self.masks = self.start_masks

    @property
    def parameters(self) -> Parameters:
        """Parameters of the block as they are now."""
        return {**self.dense, **self.updated}

    def loss(self, parameters: Parameters, masks: BlockMasks, part: slice) -> float:
        """Mean loss of the sub-block with these parameters and masks, over some of the chunks."""
        losses = []
        for chunk, wanted in zip(self.streams.rebuilt.part(part), self.target.part(part), strict=True):
            weighting = self.options.token_weighting
            total = loss(self.definition, self.sub, parameters, masks, chunk, wanted, weighting)
            losses.append((total, chunk.shape[0]))
        return mean_loss(losses)

    def validation_loss(self) -> float:
        """Loss on the held-out samples, as the sub-block is now."""
        return self.loss(self.parameters, self.masks, self.streams.validation)

    def set_masks(self, masks: BlockMasks) -> None:
        """Take new masks; what they prune goes back to the dense weight."""
        kernels = {path: self.updated[path] for path in self.sub.kernels if path in self.updated}
        if kernels:
            restored = surviving_weights({path: self.dense[path] for path in kernels}, kernels, masks)
            self.updated = {**self.updated, **restored}
        self.masks = masks


ChunkLoss = tuple[jax.Array, int]
"""A chunk's loss summed over its micro-batches, and their number."""


def mean_loss(losses: list[ChunkLoss]) -> float:
    """Mean over the micro-batches of all chunks."""
    return sum(float(total) for total, _ in losses) / sum(count for _, count in losses)


class Stage(abc.ABC):
    """Something that is done to a sub-block after its starting mask.

    Attributes:
        name: of the stage, as run.json and the progress line have it.
        options: options that no other stage looks at.
        switch: how the stage is turned on, for error messages.
        changes_masks: whether it can swap weights.
    """

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    switch: ClassVar[str]
    changes_masks: ClassVar[bool] = True

    @abc.abstractmethod
    def enabled(self, options: SharedOptions) -> bool:
        """Whether the options ask for this stage."""

    @abc.abstractmethod
    def validates(self, options: SharedOptions) -> bool:
        """Whether the stage, where enabled, makes a choice by the loss on held-out samples."""

    @abc.abstractmethod
    def __call__(self, work: Work) -> None:
        """Change masks, parameters and record of the sub-block.

        A stage leaves the sparsity of every comparison group, and N:M groups, as they are. It learns from
        `work.streams.training` alone.
        """
