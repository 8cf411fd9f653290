"""Trains a Vision Transformer: config -> mesh -> data -> step -> loop.

    python train.py --config=configs/vit_b16.py
    python train.py --config=configs/digits.py --config.seed=1 --workdir=runs/digits_seed1

The same command again resumes from the last checkpoint. The training step itself is
`make_train_step` in vit_jax/training/steps.py.
"""

if __name__ == "__main__":
    import startup  # noqa: F401

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

import command_line
import configuration
import input_pipeline
import summary
from configs import common
from vit_jax import pretrained
from vit_jax.aot import compile_for, topology
from vit_jax.errors import Preempted, UserError
from vit_jax.evaluation import evals
from vit_jax.logs import profile, run_log
from vit_jax.parallel import distributed, feeding
from vit_jax.parallel.mesh import check_batch_size, create_mesh
from vit_jax.parallel.preemption import Preemption
from vit_jax.parallel.watchdog import Watchdog
from vit_jax.runs import branch, checkpoint, resuming, run_folder
from vit_jax.runs.compilation_cache import compilation_cache
from vit_jax.runs.start_point import StartPoint
from vit_jax.scaling import flops
from vit_jax.training.program import Program
from vit_jax.training.train_state import with_params

flags.adopt_module_key_flags(command_line)


class Run(NamedTuple):
    """What the loop needs besides the state and the batches."""

    config: ConfigDict
    program: Program  # the model and the compiled steps
    evaluators: dict  # name -> function; "val" is the result, and selects the best checkpoint
    checkpoints: checkpoint.Checkpoints
    log: run_log.RunLog
    preemption: Preemption
    profile: profile.Profile
    watchdog: Watchdog
    start_point: StartPoint

    def stop_requested(self) -> bool:
        """Whether to stop here; see `Preemption.sync`. A sign of life, too."""
        self.watchdog.beat(f"step {self.log.step:,}")
        return self.preemption.sync()


def train(
    config: ConfigDict,
    workdir,
    recover_config: bool = False,
    profile_steps: range | None = None,
    allow_changes: Sequence[str] = (),
    hang_seconds: float = 0,
) -> dict[str, float]:
    """Trains, or resumes, the run in `workdir`.

    Args:
        config, workdir: the configuration, and the run's folder.
        recover_config: whether to trust `config` if the run has lost its config.json.
        profile_steps: the steps to write a trace of; None: none.
        allow_changes: fields that may differ if the run resumes, see `resuming.parse_allowed`.
        hang_seconds: seconds in a step after which all threads' stacks are logged; 0: never.

    Returns:
        The metrics of its last evaluation.

    Raises:
        UserError: the configuration, dataset or folder can't be used, or the run diverged.
        Preempted: the run was asked to stop, and has saved a checkpoint.
    """
    configuration.check(config)
    configuration.check_weights_given(config, workdir)
    allowed = resuming.parse_allowed(allow_changes, config)
    input_pipeline.check_workdir(config.dataset, workdir)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(run_folder.Lock(workdir))
        files = run_log.start_logging(workdir, lock)
        run_folder.check_shared(workdir)
        mesh = create_mesh(**config.mesh)
        check_batch_size(config.batch_size, config.accum_steps, mesh)
        setup = prepare(config, workdir, mesh, recover_config, allowed)
        config = setup.program.config
        profile.check(profile_steps, config.total_steps)

        checkpoints = checkpoint.Checkpoints(workdir, config.best_metric, config.keep_every_steps)
        stack.callback(checkpoints.close)
        state = compile_and_restore(setup, checkpoints, workdir)
        batches = input_pipeline.train_batches(
            setup.train_set, config, first_step=int(state.step), **setup.share
        )
        batches = feeding.to_devices(batches, mesh)
        run = open_run(
            setup,
            state,
            stack,
            checkpoints=checkpoints,
            files=files,
            profile_steps=profile_steps,
            hang_seconds=hang_seconds,
        )
        try:
            results = loop(run, state, batches)
        except KeyboardInterrupt:  # maybe in the middle of a save
            checkpoints.abandon()
            raise
    return results["val"]


class Setup(NamedTuple):
    """What a run is made of, before anything is compiled or computed."""

    program: Program
    train_set: input_pipeline.Source
    share: dict  # which examples this process loads; see `feeding.process_rows`
    evaluators: dict  # as in `Run`
    start_point: StartPoint
    weights: dict | None  # the parameters to start a new run from; None: random ones


def prepare(config, workdir, mesh, recover_config: bool, allowed) -> Setup:
    """Opens the datasets, and resolves and checks the configuration against the run's folder.

    Args:
        config, workdir, recover_config: see `train`.
        mesh: the devices.
        allowed: see `resuming.check_config`.
    """
    share = feeding.process_rows(mesh, config.batch_size)
    start_point = StartPoint(workdir, config, common.get_config())
    train_set, eval_set = input_pipeline.open_splits(config.dataset)
    order = [start_point.recorded("dataset", field) for field in ("order", "parts")]
    config = configuration.resolve(start_point.inherit(config), train_set, *order)
    image_shape = input_pipeline.image_shape(config)
    remat = start_point.recorded("model", "remat")
    program = Program(config, image_shape, mesh, recorded_remat=remat)
    start_point.check(config, train_set, program.shapes, recover_config, allowed)
    evaluators = create_evaluators(program, train_set, eval_set, share)
    weights = None
    if config.init_from and start_point.is_new:
        weights = pretrained.from_config(config, program.model, image_shape)
    return Setup(program, train_set, share, evaluators, start_point, weights)


def compile_and_restore(setup: Setup, checkpoints: checkpoint.Checkpoints, workdir):
    """Compiles the program; returns the state that the run goes on from, or an initial one.

    Args:
        setup: the program, and what it starts from.
        checkpoints: the run's checkpoints.
        workdir: the run's folder, which keeps compiled programs.
    """
    program, origin = setup.program, setup.start_point.origin
    with compilation_cache(workdir):
        program.compile()
        program.check_memory()
        state = checkpoints.restore_latest(program.shapes, program.init)
    if state is None and origin is not None:
        state = branch.restore(origin, program.shapes, program.init)
    elif state is None:
        state = program.init()
        if setup.weights is not None:
            state = with_params(state, setup.weights)
    setup.start_point.check_step(int(state.step))
    return state


def open_run(
    setup: Setup,
    state,
    stack: contextlib.ExitStack,
    *,
    checkpoints: checkpoint.Checkpoints,
    files,
    profile_steps: range | None,
    hang_seconds: float,
) -> Run:
    """Logs and records what is about to run, and opens what the loop needs.

    Args:
        setup: what the run is made of.
        state: what it goes on from.
        stack: closes what is opened, the last first.
        checkpoints: its checkpoints.
        files: its logs, from `run_log.start_logging`.
        profile_steps, hang_seconds: see `train`.
    """
    program, train_set, start_point = setup.program, setup.train_set, setup.start_point
    config, first_step = program.config, int(state.step)
    summary.log_start(program, train_set, setup.evaluators, state)
    start_point.record(config, train_set.class_names, program.remat, first_step)
    preemption = stack.enter_context(Preemption())  # until the last checkpoint is written
    stack.callback(input_pipeline.report_corrupt, train_set, *eval_sources(setup.evaluators))
    stack.callback(checkpoints.finish_saving)
    peak = peak_images_per_second(program)
    log = run_log.RunLog(files, first_step, config, start_point.step, peak)
    stack.enter_context(contextlib.closing(log))
    trace = profile.Profile(files, profile_steps, first_step)
    stack.callback(trace.close)
    watchdog = stack.enter_context(Watchdog(hang_seconds))
    return Run(
        config=config,
        program=program,
        evaluators=setup.evaluators,
        checkpoints=checkpoints,
        log=log,
        preemption=preemption,
        profile=trace,
        watchdog=watchdog,
        start_point=start_point,
    )


def peak_images_per_second(program: Program) -> float | None:
    """Returns how fast the devices would train if each product ran at their published peak.

    Returns:
        Images per second; None if the peak isn't known, or if frozen parameters, which need no
        gradients, make the model's operations unknown.
    """
    peak = topology.peak_flops(jax.devices()[0], program.config.dtype)
    if peak is None or program.config.optimizer.frozen:
        return None
    return peak * jax.device_count() / flops.training_flops(program.model, program.image_shape)


def create_evaluators(program: Program, train_set, eval_set, share: dict) -> dict:
    """Returns the run's evaluations, its own, "val", and those of `config.evals`.

    Args:
        program: the model and its steps.
        train_set, eval_set: the splits of `config.dataset`.
        share: which examples this process loads; see `feeding.process_rows`.

    Returns:
        {name: (params, stop_requested) -> metrics by name, or None}, see `evals.create`.
    """
    config = program.config
    arguments = {name: share[name] for name in ("share_index", "num_shares")}
    arguments["batch_size"] = program.eval_batch_size
    setup = evals.Setup(
        config=config,
        model=program.model,
        class_names=train_set.class_names,
        params_shapes=program.shapes.eval_params,
        batch_shape=(program.eval_batch_size, *program.image_shape),
        open_batches=functools.partial(input_pipeline.open_eval_batches, **arguments),
    )
    batches = input_pipeline.EvalBatches(eval_set, config, **arguments)
    own = evals.AccuracyEvaluator(
        lambda: program.eval_step, batches, program.mesh, config.eval_every_steps
    )
    others = evals.create(evals.parse(config), setup, lambda: program.eval_step)
    for evaluator in others.values():
        input_pipeline.warn_of_shared(train_set, evaluator.sources[-1])
    return {"val": own, **others}


def eval_sources(evaluators: dict) -> list:
    """Returns the splits that evaluations read."""
    return [source for evaluator in evaluators.values() for source in evaluator.sources]


def loop(run: Run, state, batches) -> dict[str, dict[str, float]]:
    """Takes the remaining steps, evaluating and saving along the way.

    Returns:
        The last results of each evaluation set: {name: metrics}.

    Raises:
        Preempted: the run was asked to stop, and has saved a checkpoint.
    """
    config, log = run.config, run.log
    results = resume_evaluation(run, state)
    for step in range(int(state.step) + 1, config.total_steps + 1):
        run.profile.before(step, state)
        with saves_on_error(run, state), log.wait("input"):
            batch = next(batches)
        state, values = run.program.train_step(state, batch)
        run.profile.after(step, state)
        log.record(step, values)
        due = due_evaluations(run, step)
        saves = is_due(step, config.checkpoint_every_steps, config.total_steps)
        if not (run.stop_requested() or due or saves):
            continue
        log.flush()  # raises if a value isn't finite, before the state is saved
        with log.pause():
            with saves_on_error(run, state):
                results = evaluate(run, state, due) if due else None
            values = results and results.get("val")
            if results:
                write_evaluations(log, step, results)
            # Saved after each evaluation too: it may turn out to be the best.
            if saves or run.preemption.stopping or (values and config.best_metric):
                save(run, step, state, values)
        if run.preemption.stopping and (step < config.total_steps or not results):
            raise stopped_after(step)
    if not results or "val" not in results:  # no step was left to take
        results = evaluate(run, state, ["val"])
    if results is None:
        raise stopped_after(config.total_steps)
    return results


@contextlib.contextmanager
def saves_on_error(run: Run, state):
    """Saves the state if an example can't be used, so that the steps taken aren't lost.

    With several processes, only the one that reads the example knows.
    """
    try:
        yield
    except UserError:
        if jax.process_count() == 1 and int(state.step) > run.log.start_step:
            run.log.flush()  # raises if a value isn't finite
            save(run, int(state.step), state)
        raise


def save(run: Run, step: int, state, values: dict[str, float] | None = None) -> None:
    """Saves a checkpoint, whose rows are in the run's folder before it is complete."""
    run.start_point.record_if_deleted()
    if run.log.upload():
        run.checkpoints.save(step, state, values)
    else:
        run.checkpoints.log_failure("the logs can't be written", step)


def due_evaluations(run: Run, step: int) -> list[str]:
    """Returns the names of the evaluations that are due at a step."""
    last = run.config.total_steps
    return [
        name
        for name, evaluator in run.evaluators.items()
        if is_due(step, evaluator.every_steps, last)
    ]


def evaluate(run: Run, state, names: list[str]) -> dict[str, dict[str, float]] | None:
    """Runs some of the run's evaluations.

    If the run keeps an average of its parameters, each is of the average, and again, named
    <name>_raw, of the parameters themselves: early in a run a slow average is still close to the
    initial parameters.

    Returns:
        {name: metrics}; None if a stop request interrupted it: the resumed run repeats it.
    """
    results, versions = {}, {"": state.eval_params}
    if state.ema_params is not None:
        versions = {"_raw": state.params, **versions}
    for name in names:
        for suffix, params in versions.items():
            values = run.evaluators[name](params, run.stop_requested)
            if values is None:
                return None
            results[name + suffix] = values
    return results


def resume_evaluation(run: Run, state) -> dict[str, dict[str, float]] | None:
    """Reruns the evaluations that the run was stopped in; returns None if there are none."""
    step, log = int(state.step), run.log
    due = due_evaluations(run, step) if step > log.start_step else []
    # Only process 0 reads metrics.jsonl, which tells; all must agree.
    missing = [
        name for name in due if distributed.any_process(log.writes and name not in log.evaluated)
    ]
    if not missing:
        return None
    results = evaluate(run, state, missing)
    if results is None:
        raise stopped_after(step)
    if "val" in results:
        run.checkpoints.add_evaluation(step, results["val"])
    write_evaluations(log, step, results)
    return results


def write_evaluations(log: run_log.RunLog, step: int, results: dict[str, dict[str, float]]) -> None:
    """Logs the results of a step, the run's own evaluation last."""
    for name in sorted(results, key=lambda name: name == "val"):
        log.write_evaluation(step, name, results[name])


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps, and at the last one, is due at a step."""
    return step == last or bool(every and step % every == 0)


def stopped_after(step: int) -> Preempted:
    return Preempted(f"Stopped after step {step}, saved: the same command resumes from there")


def compile_only(config: ConfigDict, machine: str, workdir) -> None:
    """Compiles the run's steps for a TPU slice or GPUs and logs a report.

    The dataset doesn't need to be prepared.
    """
    run_log.start_logging()
    configuration.check(config)
    topology.parse_name(machine)
    config = config.copy_and_resolve_references()
    config.num_classes = config.num_classes or input_pipeline.num_classes(config.dataset)
    compile_for.compile_and_report(config, input_pipeline.image_shape(config), machine, workdir)


def main():
    config, workdir = command_line.CONFIG.value, command_line.WORKDIR.value
    if machine := command_line.COMPILE_FOR.value:
        compile_only(config, machine, workdir)
        return
    workdir = workdir or command_line.default_workdir()
    result = train(
        config,
        workdir,
        recover_config=command_line.RECOVER_CONFIG.value,
        profile_steps=command_line.PROFILE.value,
        allow_changes=command_line.ALLOW_CHANGES.value,
        hang_seconds=command_line.HANG.value,
    )
    writes_report = config.report and jax.process_count() == 1
    page = summary.write_report(config, workdir) if writes_report else None
    if jax.process_index() == 0:
        summary.log_end(config, workdir, result, page)


if __name__ == "__main__":
    command_line.run(main, trains=True)
