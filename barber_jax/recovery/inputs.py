"""Opens and checks all that a recovery needs, before the long computation."""

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.files import expand
from barber_jax.console.options import flag
from barber_jax.console.outputs import PARTIAL
from barber_jax.console.progress import Progress
from barber_jax.convert.checkpoint import Checkpoint, open_checkpoint
from barber_jax.convert.export import sibling_path
from barber_jax.convert.parameters import check_same_settings, check_tensors
from barber_jax.data.begin import settled
from barber_jax.data.calibration import SELF
from barber_jax.data.packing import PackedText, check_batch, open_text
from barber_jax.devices.mesh import Devices, require_agreement
from barber_jax.devices.options import PROCESS_OPTIONS, parse_mesh
from barber_jax.forward.evaluation import evaluation_windows
from barber_jax.models import build_model
from barber_jax.models.family import Model
from barber_jax.recovery.cost import choose_remat
from barber_jax.recovery.options import DEFAULT_RANK
from barber_jax.recovery.program import Remat
from barber_jax.recovery.recover_config import RecoverConfig
from barber_jax.recovery.self_text import self_text
from barber_jax.recovery.source import MaskSource, open_masks
from barber_jax.run.fingerprint import array_fingerprint, fingerprint

CPU_TOKENS, ACCELERATOR_TOKENS = 2048, 16384
"""Tokens of each device in a micro-batch, at most, unless --micro-batch is given."""
EVALUATIONS = 20
"""Measurements of the held-out loss, unless --eval-every is given."""
STATE_VERSION = 2
"""Version of the checkpoints of an unfinished run."""
NOT_COMPARED = (
    *("ckpt", "teacher", "masks", "text", "text_field", "tokens", "steps", "out", "keep", "log_dir"),
    *("overwrite", "resume", "verbose", "eval_text", "eval_dataset", "eval_windows", "begin_token"),
    *("compilation_cache", *PROCESS_OPTIONS),
)
"""Options that do not change the weights of a step, and options that name inputs, whose content is compared."""


@dataclass
class Prepared:
    """All that a run needs, read and checked before the long computation.

    Attributes:
        config: options, with what depends on the inputs filled in: steps, micro_batch, eval_every.
        checkpoint, teacher, model: the pruned checkpoint, the dense one, and what both are.
        masks: of the pruned checkpoint.
        text: windows to train on, and held out.
        windows: int32 [windows, length] evaluation tokens; None to evaluate nothing.
        devices: to compute on.
        identity: what must be the same for the run to be resumed.
    """

    config: RecoverConfig
    checkpoint: Checkpoint
    teacher: Checkpoint | None
    model: Model
    masks: MaskSource
    text: PackedText
    windows: np.ndarray | None
    devices: Devices
    identity: dict[str, Any]


def prepare(config: RecoverConfig, progress: Progress) -> Prepared:
    """Open and check the inputs. Raises `BarberError`."""
    checkpoint = open_checkpoint(config.ckpt)
    model = build_model(checkpoint.config, compute_dtype(config))
    check_tensors(checkpoint, model)
    model.check_length(config.length)
    config = dataclasses.replace(config, begin_token=settled(config.begin_token, model.begins))
    teacher = open_teacher(config, model)
    devices = Devices.of(parse_mesh(config.mesh))
    check_rank(config, model)
    masks = open_masks(config.masks, checkpoint, model)
    config = with_micro_batch(config, len(devices.used), devices.used[0].platform)
    if config.remat == "auto":
        config = dataclasses.replace(config, remat=remat(config, model, devices))
    tokens_per_step = config.batch * config.length
    needed = config.tokens or (config.steps or 0) * tokens_per_step
    cache = sibling_path(config.out, ".text")
    # Before anything is written by the teacher, which may take long.
    windows = evaluation_windows(config, checkpoint, model, progress.say)
    source = config.text
    if source == SELF:
        count = config.held_out + -(-needed // tokens_per_step) * config.batch
        options = {"length": config.length, "seed": config.seed, "dtype": config.compute_dtype}
        source = str(self_text(teacher, model, devices, windows=count, **options, cache=cache, progress=progress))
    text = open_text(
        source,
        checkpoint.tokenizer,
        length=config.length,
        seed=config.seed,
        held_out=config.held_out,
        # One pass over the text, unless a number is given.
        needed=needed or sys.maxsize,
        vocab_size=model.vocabulary,
        text_field=config.text_field,
        cache=cache,
        say=progress.say,
    )
    check_batch(text, config.batch)
    steps = -(-needed // tokens_per_step) or max(1, text.tokens // tokens_per_step)
    every = min(config.eval_every or max(1, -(-steps // EVALUATIONS)), steps)
    config = dataclasses.replace(config, steps=steps, tokens=None, eval_every=every)
    identity = run_identity(config, checkpoint, teacher, masks, text)
    require_agreement("options or files", identity)
    return Prepared(config, checkpoint, teacher, model, masks, text, windows, devices, identity)


def check_log_dir(config: RecoverConfig) -> None:
    """Raise `BarberError` if --log-dir is in a folder that the run replaces or deletes, and the events with it."""
    if config.log_dir is None:
        return
    logs = Path(os.path.realpath(expand(config.log_dir)))
    for own in (sibling_path(config.out, suffix) for suffix in ("", PARTIAL, ".run", ".text")):
        if own == logs or own in logs.parents:
            raise BarberError(
                f"--log-dir {config.log_dir} is or is inside {own}, which the run itself writes; choose another folder"
            )


def compute_dtype(config: RecoverConfig) -> jnp.dtype:
    """Dtype of activations."""
    return jnp.dtype(config.compute_dtype)


def open_teacher(config: RecoverConfig, model: Model) -> Checkpoint | None:
    """Open the dense checkpoint. Raises `BarberError` if it is another model than the pruned one."""
    if config.teacher is None:
        return None
    teacher = open_checkpoint(config.teacher)
    dense = build_model(teacher.config, compute_dtype(config))
    for what in ("model_type", "vocabulary", "hidden", "layers"):
        ours, theirs = getattr(model, what), getattr(dense, what)
        if ours != theirs:
            name = what.replace("_", " ")
            raise BarberError(
                f"--teacher {config.teacher}: its {name} is {theirs}, that of {config.ckpt} is {ours}; "
                "give the dense checkpoint that was pruned"
            )
    check_tensors(teacher, model)
    check_same_settings(model, config.ckpt, teacher, "give the dense checkpoint that was pruned")
    return teacher


def check_rank(config: RecoverConfig, model: Model) -> None:
    """Raise `BarberError` if --rank is above the smaller side of a matrix that gets factors."""
    if not config.rank:
        return
    shapes = dict(model.block().shapes)
    for path, name in model.kernel_names(0).items():
        if config.rank > min(shapes[path]):
            inputs, outputs = shapes[path]
            raise BarberError(
                f"--rank {config.rank} is above {min(shapes[path])}, the smaller side of {name} [{outputs}, {inputs}]"
            )


def with_micro_batch(config: RecoverConfig, devices: int, platform: str) -> RecoverConfig:
    """Fill in --micro-batch. Raises `BarberError` if the devices do not divide a number of windows."""
    for option in ("batch", "micro_batch", "held_out"):
        value = getattr(config, option)
        if value and value % devices:
            raise BarberError(
                f"{flag(option)} {value} is not a multiple of the {devices} devices of the mesh; change one of them"
            )
    if config.micro_batch:
        return config
    tokens = CPU_TOKENS if platform == "cpu" else ACCELERATOR_TOKENS
    most = max(1, tokens // config.length) * devices
    size = max(
        b for b in range(devices, config.batch + 1, devices) if config.batch % b == 0 and (b <= most or b == devices)
    )
    return dataclasses.replace(config, micro_batch=size)


def remat(config: RecoverConfig, model: Model, devices: Devices) -> Remat:
    """What `--remat auto` is."""
    return choose_remat(
        devices.used[0].platform,
        model,
        devices=len(devices.used),
        micro_batch=config.micro_batch,
        length=config.length,
        scope=config.scope,
        rank=config.rank or DEFAULT_RANK,
        compute=config.compute_dtype,
    )


def run_identity(
    config: RecoverConfig, checkpoint: Checkpoint, teacher: Checkpoint | None, masks: MaskSource, text: PackedText
) -> dict[str, Any]:
    """Values that must be the same for the run to be resumed: options that change its result, and hashes of inputs."""
    options = config.as_dict()
    identity = {flag(name): value for name, value in options.items() if name not in NOT_COMPARED}
    identity["--steps"] = config.steps
    identity["version of the run state"] = STATE_VERSION
    for option, given in (("--ckpt", checkpoint), ("--teacher", teacher)):
        sources = given.sources() if given else []
        for path in sources:
            identity[f"content of {option} {os.path.relpath(path, sources[0].parent)}"] = fingerprint(path)
    if masks.file:
        identity["content of the masks"] = fingerprint(masks.file.path)
    identity["content of the text"] = array_fingerprint(text.windows.ids)
    identity["content of the held-out text"] = array_fingerprint(text.held_out)
    return identity
