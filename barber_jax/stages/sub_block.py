"""What is done to one sub-block on stream B: rebuild, refine, reconstruct, in rounds; then the stream goes through it.

Options decide which stages there are. With none but the rebuild this is LLM-Barber as published. Where a choice is
made by a loss (`--alpha auto`, the end of a reconstruction), the last calibration samples are held apart: they are in
chunks of their own at the streams' end, no stage learns from them, and the choice is theirs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax.config import PruneConfig
from barber_jax.console.progress import Stopwatch
from barber_jax.criteria.starting import BlockMasks
from barber_jax.forward.passes import Parameters
from barber_jax.forward.streams import Stream, Streams
from barber_jax.models.decoder import BlockDefinition, SubBlock
from barber_jax.stages import layerwise, rebuild, reconstruct, targets

ALPHAS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""What `--alpha auto` chooses from, lowest first: it is preferred where losses are equal."""
CHECKS = 10
"""How often a reconstruction is judged on the samples held apart."""
APART = 8
"""One sample in so many is held apart."""


def samples_apart(config: PruneConfig, multiple: int) -> int:
    """How many samples are held apart: a multiple of the devices that they are spread over, 0 where nothing chooses."""
    if not config.chooses:
        return 0
    return max(1, config.samples // APART // multiple) * multiple


@dataclass
class Work:
    """A sub-block in the making.

    Attributes:
        start: its masks at the start.
        masks: as they are now.
        updated: path -> parameters that are not the dense ones, as they are now; kernels are the dense ones where
            pruned, which is what a revived weight comes back as.
        target: what its output is to be, chunk by chunk of stream B; None until it is known.
        record: figures for run.json.
    """

    start: BlockMasks
    masks: BlockMasks
    updated: Parameters
    target: Stream | None = None
    record: dict = field(default_factory=dict)


class Stages:
    """Takes sub-blocks through the stages that the options ask for.

    Args:
        definition: of the block.
        config: the options.
        samples: how many calibration samples stages learn from.
        multiple: over how many devices they are spread.
    """

    def __init__(self, definition: BlockDefinition, config: PruneConfig, samples: int, multiple: int):
        self._definition, self._config, self._samples, self._multiple = definition, config, samples, multiple
        rate, weighting = config.reconstruct_rate, config.token_weighting
        self._plan = reconstruct.Plan(config.reconstruct, rate, weighting)

    def __call__(
        self, sub: SubBlock, dense: Parameters, start: Parameters, masks: BlockMasks, streams: Streams, watch: Stopwatch
    ) -> Work:
        """What becomes of a sub-block; `streams.rebuilt` and `streams.dense` are after it then.

        Args:
            dense: the block's parameters, as earlier sub-blocks have left them.
            start: path -> starting weights where they are not the dense ones.
            masks: kernel path -> starting mask.
        """
        config = self._config
        work = Work(masks, masks, {})
        if config.retain_reconstruction or not config.rebuild:
            work.updated = rebuild.survivors({path: dense[path] for path in start}, start, masks)
        if not config.rebuild or streams.apart or streams.dense is not None:
            with watch.stage(f"{sub.name} target"):
                work.target = self._target(sub, dense, streams)
        sparse = start
        if work.target is not None:
            with watch.stage(f"{sub.name} loss"):
                before = {**dense, **work.updated, **sparse}
                work.record["loss_before"] = self._loss(sub, before, masks, streams, work.target, streams.fitted)
                if streams.apart:
                    judged = self._loss(sub, before, masks, streams, work.target, streams.judging)
                    work.record["apart_before"] = judged
        for place in range(config.rounds):
            if config.rebuild:
                self._rebuild(sub, dense, sparse, work, streams, watch)
            if config.refine:
                with watch.stage(f"{sub.name} refine"):
                    self._refine(sub, dense, work, streams)
            if config.reconstruct:
                with watch.stage(f"{sub.name} reconstruct"):
                    self._reconstruct(sub, dense, work, streams, place)
            sparse = work.updated
        if config.rebuild or config.refine:
            revived = rebuild.revived(sub, work.masks, work.start)
            work.record["swaps"] = {path: int(count) for path, count in revived.items()}
        with watch.stage(f"{sub.name} propagate"):
            losses = self.advance(sub, {**dense, **work.updated}, work.masks, work.target, streams)
        work.record["loss_after"] = _mean(losses[streams.fitted])
        if streams.apart:
            work.record["apart_after"] = _mean(losses[streams.judging])
        return work

    def advance(
        self, sub: SubBlock, weights: Parameters, masks: BlockMasks, target: Stream | None, streams: Streams
    ) -> list["Loss"]:
        """Take stream B through a sub-block; its losses against `target`, chunk by chunk. Without one they mean
        nothing, but what is run is the same, so that a replayed stream is so to the last bit."""
        own = {path: masks[path] for path in sub.kernels}
        losses = []

        def outputs() -> Iterator[jax.Array]:
            wanted = iter(target.take()) if target is not None else None
            for chunk in streams.rebuilt.take():
                aim = next(wanted) if wanted is not None else jnp.zeros_like(chunk)
                arguments = (self._definition, sub, weights, own, aim, chunk, self._config.token_weighting)
                after, loss = rebuild.advance(*arguments)
                losses.append((loss, chunk.shape[0]))
                yield after

        streams.rebuilt = Stream(outputs(), self._config.offload_activations).ready()
        return losses

    def follow(self, sub: SubBlock, dense: Parameters, streams: Streams) -> Stream:
        """Take the dense stream through a sub-block; the target that it gives."""
        wanted = []

        def outputs() -> Iterator[jax.Array]:
            own = iter(streams.dense.take())
            for chunk in streams.rebuilt:
                after, target = targets.dense(self._definition, sub, dense, next(own), chunk)
                wanted.append(Stream([target], self._config.offload_activations))
                yield after

        streams.dense = Stream(outputs(), self._config.offload_activations).ready()
        return Stream.joined(wanted)

    def _target(self, sub: SubBlock, dense: Parameters, streams: Streams) -> Stream:
        if streams.dense is not None:
            return self.follow(sub, dense, streams)
        outputs = (targets.same(self._definition, sub, dense, chunk) for chunk in streams.rebuilt)
        return Stream(outputs, self._config.offload_activations).ready()

    def _fitted(self, work: Work, streams: Streams) -> tuple[Stream, Stream]:
        """Stream B and the target, of the samples to learn from."""
        return streams.rebuilt.part(streams.fitted), work.target.part(streams.fitted)

    def _judged(self, sub: SubBlock, dense: Parameters, work: Work, streams: Streams) -> float:
        """Loss on the samples held apart."""
        parameters = {**dense, **work.updated}
        return self._loss(sub, parameters, work.masks, streams, work.target, streams.judging)

    def _loss(
        self,
        sub: SubBlock,
        parameters: Parameters,
        masks: BlockMasks,
        streams: Streams,
        target: Stream,
        chosen: slice,
    ) -> float:
        """Mean loss of the sub-block over some of the chunks."""
        losses = []
        for chunk, wanted in zip(streams.rebuilt.part(chosen), target.part(chosen), strict=True):
            weighting = self._config.token_weighting
            loss = targets.loss(self._definition, sub, parameters, masks, chunk, wanted, weighting)
            losses.append((loss, chunk.shape[0]))
        return _mean(losses)

    def _rebuild(
        self, sub: SubBlock, dense: Parameters, sparse: Parameters, work: Work, streams: Streams, watch: Stopwatch
    ) -> None:
        """LLM-Barber: new masks by the gradient of the loss between dense and `sparse` weights."""
        config = self._config
        with watch.stage(f"{sub.name} gradient"):
            importance, before = self._importance(sub, dense, sparse, work, streams)
            work.record.setdefault("loss_before", before)
        with watch.stage(f"{sub.name} swap"):
            base = {**dense, **work.updated}
            scores = rebuild.scores(sub, {path: base[path] for path in sub.kernels}, importance, config.metric)
            del importance
            new, alpha = self._swap(sub, scores, base, work, streams)
            outliers = rebuild.outlier_maps(sub, scores, work.masks, new)
            del scores
            if config.alpha == "auto":
                work.record.setdefault("alpha", []).append(alpha)
            work.record["outliers"] = {path: np.asarray(outliers[path]) for path in sub.kernels}
            self._replace(sub, dense, new, work)

    def _replace(self, sub: SubBlock, dense: Parameters, masks: BlockMasks, work: Work) -> None:
        """New masks; what they prune is the dense weight again."""
        kernels = {path: work.updated[path] for path in sub.kernels if path in work.updated}
        if kernels:
            survivors = rebuild.survivors({path: dense[path] for path in kernels}, kernels, masks)
            work.updated = {**work.updated, **survivors}
        work.masks = masks

    def _swap(
        self, sub: SubBlock, scores: Parameters, base: Parameters, work: Work, streams: Streams
    ) -> tuple[BlockMasks, float]:
        """New masks, and the alpha that gave them."""
        config = self._config

        def swapped(alpha: float) -> BlockMasks:
            return rebuild.swap_masks(
                sub,
                scores,
                work.masks,
                jnp.float32(alpha),
                granularity=config.granularity,
                pattern=config.sparsity_pattern,
            )

        if config.alpha != "auto":
            return swapped(config.alpha), config.alpha
        tried = {}
        for alpha in ALPHAS:
            masks = swapped(alpha) if alpha else work.masks
            tried[alpha] = self._loss(sub, base, masks, streams, work.target, streams.judging)
        best = min(tried, key=tried.get)
        return (swapped(best) if best else work.masks), best

    def _importance(
        self, sub: SubBlock, dense: Parameters, sparse: Parameters, work: Work, streams: Streams
    ) -> tuple[Parameters, float]:
        """Importance of every weight of a sub-block, and its loss before the swap. The outputs of the dense sub-block
        become the target where there is none yet."""
        totals = rebuild.no_totals(self._definition, sub)

        def outputs() -> Iterator[jax.Array]:
            nonlocal totals
            for chunk in streams.rebuilt.part(streams.fitted):
                arguments = (self._definition, sub, dense, sparse, work.masks, chunk, totals)
                totals, out = rebuild.accumulate(*arguments, self._config.token_weighting)
                yield out

        if work.target is None:
            work.target = Stream(outputs(), self._config.offload_activations)
        else:
            for _ in outputs():
                pass
        importance, loss = rebuild.importance(sub, totals, jnp.float32(self._samples))
        return jax.block_until_ready(importance), float(loss)

    def _refine(self, sub: SubBlock, dense: Parameters, work: Work, streams: Streams) -> None:
        """Refine masks matrix by matrix, each on what those before it now give; all is undone if it does no good on the
        samples held apart."""
        before, masks, updated = self._judged(sub, dense, work, streams), work.masks, work.updated
        swaps, of = self._config.refine, self._config.sparsity_pattern.of
        chosen = {}
        for entering, kernels in layerwise.inputs(sub).items():
            fitted = self._gram(sub, entering, dense, work, streams, streams.fitted)
            judging = self._gram(sub, entering, dense, work, streams, streams.judging)
            for path in kernels:
                kernel = work.updated.get(path, dense[path])
                best = layerwise.refined(kernel, dense[path], work.masks[path], fitted, judging, swaps, of=of)
                chosen[path] = best and best[1]
                if best:
                    self._replace(sub, dense, rebuild.settled(sub, {**work.masks, path: best[0]}), work)
        if not self._judged(sub, dense, work, streams) < before:
            work.masks, work.updated, chosen = masks, updated, dict.fromkeys(chosen)
        work.record.setdefault("shrinkage", []).append(chosen)

    def _gram(
        self, sub: SubBlock, entering: str, dense: Parameters, work: Work, streams: Streams, chosen: slice
    ) -> jax.Array:
        """`layerwise.gram` of some of the chunks."""
        total, parameters = None, {**dense, **work.updated}
        for chunk, wanted in zip(streams.rebuilt.part(chosen), work.target.part(chosen), strict=True):
            arguments = (self._definition, sub, entering, parameters, work.masks, chunk, wanted)
            gram = layerwise.gram(*arguments, self._config.token_weighting)
            total = gram if total is None else total + gram
        return total

    def _reconstruct(self, sub: SubBlock, dense: Parameters, work: Work, streams: Streams, place: int) -> None:
        """Train what survives, and keep what is best on the samples held apart."""
        config = self._config
        base = {**dense, **work.updated}
        paths = reconstruct.trained_paths(self._definition, sub, config.reconstruct_scope)
        training = reconstruct.begin(sub, self._plan, {path: base[path] for path in paths}, work.masks)

        def judged() -> tuple[float, Parameters]:
            values = reconstruct.rounded(training.values, {path: dense[path] for path in paths})
            chosen = streams.judging
            return self._loss(sub, {**base, **values}, work.masks, streams, work.target, chosen), values

        best, kept = judged()
        stopped = 0
        fitted, wanted = self._fitted(work, streams)
        chosen = reconstruct.schedule(self._samples, config.reconstruct, config.reconstruct_batch, config.seed + place)
        for span in np.array_split(np.arange(config.reconstruct), min(CHECKS, config.reconstruct)):
            for stream, target, order in reconstruct.batches(fitted, wanted, chosen[span], self._multiple):
                arguments = (self._definition, sub, self._plan, base, work.masks, stream, target, order, training)
                training = reconstruct.train(*arguments)
            loss, values = judged()
            if loss < best:
                best, kept, stopped = loss, values, int(span[-1]) + 1
        work.updated = {**work.updated, **kept}
        work.record.setdefault("steps", []).append(stopped)


Loss = tuple[jax.Array, int]
"""Sum over micro-batches, and their number."""


def _mean(losses: list[Loss]) -> float:
    return sum(float(loss) for loss, _ in losses) / sum(count for _, count in losses)
