"""Trains a Vision Transformer as a configuration says: config -> mesh -> data -> model -> loop.

    python train.py --config=configs/vit_b16.py
    python train.py --config=configs/digits.py --config.seed=1 --workdir=runs/digits_seed1

Started again with the same --workdir, a run goes on from its last checkpoint.
"""

import contextlib
import logging

import jax
from absl import flags

import command_line
import compile_for
import input_pipeline
from configs import finetune
from vit_jax import (
    checkpoint,
    distributed,
    flops,
    metrics,
    pretrained,
    run_folder,
    run_log,
    sharding,
    train_state,
)
from vit_jax.errors import Preempted, UserError
from vit_jax.preemption import Preemption
from vit_jax.program import Program, keeping_compiled

logger = logging.getLogger("vit_jax")

flags.adopt_module_key_flags(command_line)


def train(config, workdir) -> dict[str, float]:
    """Trains, or takes up, the run in `workdir`; returns its last evaluation.

    Raises:
        UserError: a configuration, dataset or folder that can't work; a run that diverged.
    """
    run_log.start_logging(workdir)
    run_folder.check_shared(workdir)
    if config.init_from_required and not config.init_from:
        raise UserError(finetune.where_weights_are(config.model.variant, command()))
    input_pipeline.check(config)
    mesh = sharding.create_mesh(**config.mesh)
    train_state.check_batch_size(config.batch_size, config.accum_steps, mesh)  # before the data
    feeding = sharding.feeding(mesh, config.batch_size)
    host = {name: feeding[name] for name in ("process_index", "process_count")}

    train_set, eval_set = input_pipeline.open_splits(config.dataset)
    config = resolved(config, train_set, host["process_count"])
    image_shape = input_pipeline.image_shape(config)

    program = Program(config, image_shape, mesh)
    run_folder.check_config(workdir, config)
    weights = None
    if config.init_from and not run_folder.checkpoint_steps(workdir):
        weights = pretrained.from_config(config, program.model, image_shape)
    checkpoints = checkpoint.Checkpoints(workdir, config.best_metric, config.keep_every_steps)
    with keeping_compiled(workdir):
        program.compile()
        state = checkpoints.restore_latest(program.shapes) or program.init()
    if weights is not None:
        state = train_state.with_params(state, weights)
    first_step = int(state.step)

    batches = input_pipeline.train_batches(train_set, config, first_step=first_step, **feeding)
    batches = sharding.to_devices(batches, mesh)

    def evaluate(params, stop=lambda: False):
        size = program.eval_batch_size
        batches = input_pipeline.eval_batches(eval_set, config, batch_size=size, **host)
        batches = sharding.to_devices(batches, mesh)
        return metrics.evaluate(program.eval_step, params, batches, stop)

    log_summary(program, train_set, eval_set, state)
    if jax.process_index() == 0:
        run_folder.write_config(workdir, config)
        run_folder.write_class_names(workdir, train_set.class_names)
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(Preemption())  # until the last checkpoint is written
        stack.callback(input_pipeline.report_damaged, train_set, eval_set)
        stack.callback(checkpoints.close)
        log = stack.enter_context(contextlib.closing(run_log.RunLog(workdir, first_step, config)))
        state = loop(config, state, batches, program.train_step, evaluate, checkpoints, log, asked)
        return log.last_evaluation or evaluate(state.eval_params)


def loop(config, state, batches, train_step, evaluate, checkpoints, log, asked):
    """The steps from the state's to the last, with their evaluations and checkpoints.

    Raises:
        Preempted: the run was asked to stop, and is saved.
    """

    def due(step, every):
        return step == config.total_steps or (every and step % every == 0)

    def evaluate_and_save(step, state, evaluates, saves):
        """A stop in the middle of the evaluation leaves it to the next start."""
        log.flush()  # raises where a number isn't finite, before it is saved
        with log.pause():
            result = evaluate(state.eval_params, asked.sync) if evaluates else None
            if result:
                log.write_evaluation(step, result)
            # The best evaluation is worth nothing without its parameters.
            if saves or asked.reached or (result and config.best_metric):
                checkpoints.save(step, state, result)
        if asked.reached and (step < config.total_steps or not result):
            raise stopped_after(step)

    first = int(state.step)
    owed = log.writes and not log.evaluated  # the first process has the rows
    if first and due(first, config.eval_every_steps) and distributed.anywhere(owed):
        if not (result := evaluate(state.eval_params, asked.sync)):
            raise stopped_after(first)
        checkpoints.add_evaluation(first, result)
        log.write_evaluation(first, result)
    for step in range(first + 1, config.total_steps + 1):
        state, values = train_step(state, next(batches))
        log.record(step, values)
        evaluates = due(step, config.eval_every_steps)
        saves = due(step, config.checkpoint_every_steps)
        if asked.sync() or evaluates or saves:
            evaluate_and_save(step, state, evaluates, saves)
    return state


def stopped_after(step):
    return Preempted(f"Stopped after step {step}, saved: the same command goes on from there")


def resolved(config, train_set, num_parts):
    """The configuration with what follows from the dataset, and who reads it, filled in."""
    config = config.copy_and_resolve_references()
    if config.num_classes not in (None, train_set.num_classes):
        raise UserError(
            f"config.num_classes is {config.num_classes}, but {train_set.name} has "
            f"{train_set.num_classes} classes: leave it out"
        )
    config.num_classes = train_set.num_classes
    config.dataset.order = input_pipeline.order(train_set, config.dataset)
    config.dataset.parts = num_parts if config.dataset.order == "buffer" else 1
    if config.total_steps is None:
        if config.num_epochs is None:
            raise UserError("Neither config.num_epochs nor config.total_steps is set")
        config.total_steps = round(config.num_epochs * train_set.num_examples / config.batch_size)
    if config.total_steps < 1:
        raise UserError(f"The run would have {config.total_steps} steps: set config.total_steps")
    return config


def log_summary(program, train_set, eval_set, state) -> None:
    """One screen on what is about to run."""
    config, model, mesh = program.config, program.model, program.mesh
    image_shape = program.image_shape
    mebibytes = 1 / 2**20
    memory = program.train_step.memory_analysis()
    epochs = config.total_steps * config.batch_size / train_set.num_examples
    size = "x".join(map(str, image_shape))
    for line in (
        f"Devices      {jax.device_count()} x {jax.devices()[0].device_kind}, "
        f"mesh {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}",
        f"Training     {train_set.name}: {train_set.num_examples:,} examples, "
        f"{train_set.num_classes} classes",
        f"Evaluation   {eval_set.name}: {eval_set.num_examples:,} examples",
        f"Model        {config.model.variant}: width {model.width}, depth {model.depth}, "
        f"{model.num_heads} heads, patch {model.token_pixels[0]}x{model.token_pixels[1]}, "
        f"{config.dtype}",
        f"Parameters   {flops.num_params(state.params):,}",
        f"FLOPs        {flops.forward_flops(model, image_shape) / 1e9:,.3g} G an image of "
        f"{size}, forward",
        f"Memory       {flops.num_bytes_on_device(state) * mebibytes:,.1f} MiB of state and "
        f"{memory.temp_size_in_bytes * mebibytes:,.1f} MiB of temporaries a device",
        f"Run          {config.total_steps:,} steps of {config.batch_size} ({epochs:,.1f} epochs)"
        f", {config.optimizer.name}, {config.schedule.name} from {config.schedule.base_lr:g}",
    ):
        logger.info(line)
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        logger.info("\n".join(["", *sharding.table(state.params, mesh), ""]))
    if step := int(state.step):
        logger.info(f"Resuming at step {step:,} of {config.total_steps:,}")


def command() -> str:
    """How this run was started, as far as its preset."""
    preset = command_line.config_name() or "configs/finetune.py"
    return f"{command_line.python()} train.py --config={preset}"


def farewell(config, workdir, result) -> None:
    """The result, where everything is, and what to try next."""
    python = command_line.python()
    folder = (
        f"{python} train.py --config=configs/vit_ti16.py --config.dataset.name=FOLDER "
        "--config.dataset.eval_split=val --config.batch_size=64 --config.num_epochs=20 "
        "--config.schedule.warmup_steps=20"
    )
    logger.info(
        f"\n{config.dataset.eval_split.capitalize()} accuracy {result['accuracy']:.2%} "
        f"(top-5 {result['accuracy_top5']:.2%}, loss {result['loss']:.4f})\n"
        f"\nIn {workdir}: checkpoints/, metrics.jsonl, train.log, config.json, TensorBoard events"
        "\n\nWorth trying next:"
        f"\n  another seed      {command()} --config.seed=1 --workdir={workdir}_seed1"
        f"\n  its numbers       {python} evaluate.py --workdir={workdir}"
        f"\n  its predictions   {python} predict.py --workdir={workdir} IMAGE..."
        f"\n  a published size  {python} train.py --config=configs/vit_b16.py:quick"
        f"\n  your own images, in FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg:\n  {folder}"
    )


def main():
    workdir = command_line.WORKDIR.value or command_line.default_workdir()
    config = command_line.CONFIG.value
    if slice_name := command_line.COMPILE_FOR.value:
        compile_for.check(config, slice_name, command_line.WORKDIR.value)
        return
    result = train(config, workdir)
    if jax.process_index() == 0:
        farewell(config, workdir, result)


if __name__ == "__main__":
    command_line.run(main, trains=True)
