"""Command `python -m barber_jax.recover`: train the surviving weights of a pruned checkpoint, its zeros held."""

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax

from barber_jax.config import recorded_command
from barber_jax.console import interrupt
from barber_jax.console.callable_module import make_callable
from barber_jax.console.errors import BarberError, DamagedInput, exit_with_one_line
from barber_jax.console.progress import Progress
from barber_jax.convert.export import RECOVERED, FolderWriter, claimed, sibling_path
from barber_jax.convert.hf_folder import HFFolder
from barber_jax.data.calibration import SELF
from barber_jax.data.packing import batches
from barber_jax.devices.hosts import join
from barber_jax.devices.mesh import is_primary
from barber_jax.devices.peak import matmul_rates
from barber_jax.devices.settings import prepare_jax
from barber_jax.forward.evaluation import measure_perplexity
from barber_jax.masks.keep_pruned import zero_pruned
from barber_jax.recovery import training
from barber_jax.recovery.checkpoints import Checkpoints, DamagedRun
from barber_jax.recovery.cost import operations_per_token
from barber_jax.recovery.inputs import Prepared, check_log_dir, compute_dtype, prepare
from barber_jax.recovery.loop import Log, Outcome, Setup, run_steps
from barber_jax.recovery.objective import Objective
from barber_jax.recovery.program import ALL, Program, load, load_masks
from barber_jax.recovery.recover_config import RecoverConfig
from barber_jax.recovery.result import write_result
from barber_jax.reports.events import EventLog
from barber_jax.reports.page import try_writing
from barber_jax.reports.recover_card import write_recover_card
from barber_jax.reports.recover_page import write_recover_report
from barber_jax.reports.recover_record import recover_record, source_entry
from barber_jax.reports.summary import recover_headline, recover_summary


def recover(config: RecoverConfig) -> dict:
    """Recover a pruned checkpoint and write the result to `config.out`.

    Returns:
        The content of recover.json.

    Raises:
        BarberError: an error that the user can fix. If the loss was not finite at some step, the result is written
            with the best weights before; otherwise nothing is left under --out.
    """
    text = None if config.text == SELF else config.text
    inputs = [config.ckpt, config.teacher, text, config.masks, config.eval_text]
    paths = [Path(given) for given in inputs if given]
    check_log_dir(config)
    with claimed(config.out, config.overwrite, paths) if is_primary() else contextlib.nullcontext():
        return _recover(config)


def _recover(config: RecoverConfig) -> dict:
    """Do what `recover` does, with --out claimed."""
    start_time = time.perf_counter()
    with contextlib.ExitStack() as stack, jax.default_matmul_precision(config.matmul_precision):
        progress = stack.enter_context(Progress(config.verbose, silent=not is_primary()))
        run = prepare(config, progress)
        config, measured = run.config, {}
        writer = stack.enter_context(open_writer(run)) if is_primary() else None
        checkpoints = stack.enter_context(open_checkpoints(run))
        stack.enter_context(keeping(checkpoints, progress))
        log_dir, done = config.log_dir if writer else None, max(checkpoints.steps(), default=0)
        events = stack.enter_context(contextlib.closing(EventLog(log_dir, done))) if log_dir else None
        sparsity = f"{run.masks.sparsity:.4f} ({run.masks.pattern})"
        progress.say(recover_headline(config.as_dict(), run.model, run.devices, sparsity, run.text.tokens))
        measure = partial(measure_perplexity, config, run.model, run.windows, progress)
        if writer:
            measured["dense_perplexity"] = measure(run.teacher, "teacher") if run.teacher else None
            measured["start_perplexity"] = measure(run.checkpoint, "pruned model")
        with run.devices.context():
            peak = max(matmul_rates(run.model, config.micro_batch * config.length, compute_dtype(config)).values())
            setup, state = begin(run)
            outcome = train(run, setup, state, checkpoints, progress, events)
            if events:
                # Here, where a full disk is no more than a reason to resume.
                events.close()
            values, written = chosen_values(config, setup, outcome, checkpoints)
            movement = write_result(run.checkpoint, run.model, run.masks, run.devices, writer, values)
            if writer:
                measured["perplexity"] = measure(HFFolder(writer.folder), "recovered model")
        log, source = outcome.log, source_entry(run.checkpoint.location)
        pruned_by = recorded_command(source["run"]["options"]) if source["run"] else None
        record = recover_record(
            config.as_dict(),
            run.model,
            run.devices.used,
            commands={"recover": config.command_line(), "prune": pruned_by},
            source=source,
            sparsity=run.masks.sparsity,
            pattern=run.masks.pattern,
            steps=len(log.training),
            tokens_per_step=config.batch * config.length,
            training=log.training,
            evaluations=log.evaluations,
            best_step=log.best_step,
            written=written,
            movement=movement,
            seconds=outcome.earlier_seconds + time.perf_counter() - start_time,
            seconds_training=log.seconds,
            operations_per_token=operations_per_token(run.model, config.length, config.scope, bool(run.teacher)),
            matmul_flops=peak * len(run.devices.used),
            **measured,
        )
        if writer:
            complete(config, record, writer, progress)
        interrupt.check()
        with interrupt.deferred():
            if writer:
                writer.publish()
            checkpoints.remove()
        progress.say(recover_summary(record))
    if outcome.diverged is not None:
        raise BarberError(
            f"--rate {config.rate:g}: loss or gradient of step {outcome.diverged} is not finite; {config.out} holds "
            f"the weights of step {log.best_step}, the best before it; lower --rate"
        )
    return record


def open_writer(run: Prepared) -> FolderWriter:
    """Open the output folder. Raises `BarberError`."""
    pattern = (run.masks.pattern, run.masks.sparsity)
    return FolderWriter(run.config.out, run.checkpoint, run.model.pruned_names(), *pattern)


def open_checkpoints(run: Prepared) -> Checkpoints:
    """Start or resume the run. Raises `BarberError`."""
    folder = sibling_path(run.config.out, ".run")
    if run.config.resume:
        return Checkpoints.resume(folder, run.identity)
    return Checkpoints.create(folder, run.identity, run.config.overwrite)


def begin(run: Prepared) -> tuple[Setup, training.State]:
    """Load the models to the devices and make what a training starts from."""
    config, model, devices = run.config, run.model, run.devices
    program = Program.of(model, config.remat)
    parameters = load(run.checkpoint, model, devices)
    masks = load_masks(run.masks.read, model, devices)
    teacher = load(run.teacher, model, devices) if run.teacher else {}
    trained, frozen = training.split(parameters, program, config.scope)
    # A mask file may prune more than the checkpoint, of kernels that are not trained themselves too.
    frozen = zero_pruned(training.of_values(masks, frozen), frozen)
    objective = Objective(program, config.mix if teacher else 1.0, len(devices.used))
    plan = training.Plan(objective, config.clip, devices.shape)
    state, scales = training.begin(plan, trained, frozen, masks, config.rank or 0, config.seed)
    held_out = run.text.held_out.reshape(
        -1, _divisor(config.held_out, config.micro_batch, len(devices.used)), config.length
    )
    every = config.eval_every
    setup = Setup(
        plan=plan,
        scales=scales,
        frozen=frozen,
        masks=masks,
        teacher=teacher,
        dtypes=tuple((name, str(value.dtype)) for name, value in trained.items()),
        rates=training.learning_rates(config.rate, config.steps, config.warm_up),
        held_out=devices.put(held_out, None, ALL),
        evaluate_at=frozenset([*range(every, config.steps, every), config.steps]),
        micro_batch=config.micro_batch,
        devices=devices,
    )
    return setup, state


def _divisor(count: int, most: int, multiple: int) -> int:
    """Largest divisor of `count` that is a multiple of `multiple` and at most `most`, which `multiple` divides."""
    return max(size for size in range(multiple, most + 1, multiple) if count % size == 0)


def train(
    run: Prepared,
    setup: Setup,
    state: training.State,
    checkpoints: Checkpoints,
    progress: Progress,
    events: EventLog | None,
) -> Outcome:
    """Train from the start, or from the last checkpoint of a run that is resumed."""
    config = run.config
    iterator = batches(
        run.text,
        batch=config.batch,
        seed=config.seed,
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    log, steps = Log(), checkpoints.steps()
    if steps:
        state, kept = checkpoints.restore(steps[-1], state)
        log = Log(**kept["log"])
        iterator.set_state(kept["text"])
        progress.say(f"resuming after step {steps[-1]} of {config.steps}")
    report = events.scalars if events else lambda step, figures: None
    bar = progress.steps("recovering", config.steps, start=steps[-1] if steps else 0)
    with bar as shown, contextlib.closing(iterator):
        return run_steps(setup, state, log, iterator, checkpoints, shown, report)


@contextlib.contextmanager
def keeping(checkpoints: Checkpoints, progress: Progress) -> Iterator[None]:
    """On an error, say how to continue from the last checkpoint, or delete what is there if nothing was trained."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(Exception):
            # A process that ends while its devices compute may crash.
            jax.block_until_ready(jax.live_arrays())
        if not checkpoints.folder.exists() or isinstance(error, DamagedRun):
            raise
        step = max(checkpoints.steps(), default=0)
        if step and not isinstance(error, DamagedInput):
            kept = f"step {step} is kept in {checkpoints.folder}"
            progress.say(f"{kept}; the same command with --resume continues from there")
        elif jax.process_count() == 1:
            checkpoints.remove()
        raise


def chosen_values(
    config: RecoverConfig, setup: Setup, outcome: Outcome, checkpoints: Checkpoints
) -> tuple[dict[str, jax.Array], str]:
    """The parameters to write, and whether they are the best or the last."""
    last = config.keep == "last" and outcome.diverged is None
    values, best = outcome.state.values, outcome.log.best_step
    if not last and best != int(outcome.state.step):
        values = checkpoints.restore(best, outcome.state)[0].values
    return training.final_kernels(values, setup.frozen, setup.masks, setup.plan.mesh), "last" if last else "best"


def complete(config: RecoverConfig, record: dict, writer: FolderWriter, progress: Progress) -> None:
    """Complete the output folder with everything about the run."""
    writer.write_json(RECOVERED, record)
    write_recover_card(writer.folder, config.out.name, record)
    try_writing(partial(write_recover_report, writer.folder, config.out.name), config.out, progress.say)


def run(arguments: list[str] | None = None) -> None:
    """Run the command with command-line arguments (default sys.argv)."""
    config = RecoverConfig.parse("barber_jax.recover", arguments)
    prepare_jax(config.compilation_cache, config.matmul_precision)
    join(config.coordinator, config.processes, config.process, config.public_coordinator)
    recover(config)


make_callable(__name__, recover)

if __name__ == "__main__":
    exit_with_one_line(run)
