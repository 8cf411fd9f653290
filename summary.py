"""What train.py says when a run starts and when it has ended, and the run's report."""

import logging

import jax
from ml_collections import ConfigDict

import command_line
import evaluate
from vit_jax import models, objectives
from vit_jax.errors import first_line
from vit_jax.parallel import sharding
from vit_jax.runs import run_folder
from vit_jax.scaling import flops
from vit_jax.training.program import Program

logger = logging.getLogger("vit_jax")


def log_start(program: Program, train_set, evaluators: dict, state) -> None:
    """Logs what is about to run, on what, and what it takes.

    Args:
        program: the run's program, compiled.
        train_set: its training split, a Source.
        evaluators: {name: Evaluator}.
        state: the TrainState that it starts from.
    """
    config, model, mesh = program.config, program.model, program.mesh
    height, width, channels = image_shape = program.image_shape
    memory = program.train_step.memory_analysis()
    num_seen = config.dataset.offset + config.total_steps * config.batch_size
    epochs = num_seen / train_set.num_examples
    num_params = flops.num_params(state.params)
    optimizer_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    mebibyte = 2**20
    for line in (
        f"Devices      {jax.device_count()} x {jax.devices()[0].device_kind}, "
        f"mesh {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}",
        f"Training     {describe_source(train_set)}, {train_set.num_classes} classes",
        *(
            f"Evaluation   {name}: {', '.join(map(describe_source, evaluator.sources))}"
            for name, evaluator in evaluators.items()
        ),
        *(
            []
            if models.predicts_classes(config)
            else [objectives.describe(config, model, image_shape)]
        ),
        f"Model        {config.model.variant}: width {model.width}, depth {model.depth}, "
        f"{model.num_heads} heads, patch {model.token_pixels[0]}x{model.token_pixels[1]}, "
        f"{config.dtype}",
        f"Attention    {program.attention}",
        f"Parameters   {num_params:,}, with {optimizer_bytes / num_params:.2f} bytes of "
        f"{config.optimizer.name}'s state for each",
        f"FLOPs        {flops.forward_flops(model, program.image_shape) / 1e9:,.3g} G per image "
        f"of {height}x{width}x{channels}, forward",
        f"Memory       {sharding.num_bytes_on_device(state) / mebibyte:,.1f} MiB of state and "
        f"{memory.temp_size_in_bytes / mebibyte:,.1f} MiB of temporaries per device, "
        f"remat {program.remat}",
        f"Run          {config.total_steps:,} steps of {config.batch_size} ({epochs:,.1f} epochs)"
        f", {config.optimizer.name}, {config.schedule.name} from {config.schedule.base_lr:g}",
    ):
        logger.info(line)
    if program.remat != "none" and config.model.remat == "auto":
        logger.warning(
            f"The backward pass recomputes activations (remat {program.remat}), since not all fit; "
            "a larger config.accum_steps, in a new run, may be faster"
        )
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        logger.info("\n".join(["", *sharding.partition_table(state.params, mesh), ""]))


def describe_source(source) -> str:
    return f"{source.name}: {source.num_examples:,} examples"


def log_end(config: ConfigDict, workdir, result: dict[str, float], page) -> None:
    """Logs the result, where the run's files are, and what to try next.

    Args:
        config: the run's configuration.
        workdir: its folder.
        result: the metrics of its last evaluation.
        page: its report, or None.
    """
    if not models.predicts_classes(config):
        log_end_of_masked(config, workdir, result)
        return
    command = command_line.command
    processes = ("coordinator_address", "num_processes", "process_id")
    arguments = command_line.arguments_without("workdir", "config.seed", *processes)
    seed = command("train.py", *arguments, "--config.seed=1", f"--workdir={workdir}_seed1")
    folder = command(
        *("train.py", "--config=configs/vit_ti16.py", "--config.dataset.name=FOLDER"),
        *("--config.dataset.eval_split=val", "--config.batch_size=64", "--config.num_epochs=20"),
        "--config.schedule.warmup_steps=20",
    )
    logger.info(
        f"\n{config.dataset.eval_split.capitalize()} accuracy {result['accuracy']:.2%} "
        f"(top-5 {result['accuracy_top5']:.2%}, loss {result['loss']:.4f})\n"
        + (f"\nReport: {page}\n" if page else "")
        + f"\nIn {workdir}: {', '.join(run_folder.list_files(workdir))}"
        "\n\nNext, you could try"
        f"\n  another seed       {seed}"
        f"\n  evaluation         {command('evaluate.py', f'--workdir={workdir}')}"
        f"\n  predictions        {command('predict.py', f'--workdir={workdir}')} IMAGE..."
        f"\n  a published model  {command('train.py', '--config=configs/vit_b16.py:quick')}"
        f"\n  your own images, in FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg:\n  {folder}"
    )


def log_end_of_masked(config: ConfigDict, workdir, result: dict[str, float]) -> None:
    """Logs the result of a run that learned from masked patches; see `log_end`."""
    loss = f"loss {result['loss']:.4f}"
    if "patch_accuracy" in result:
        loss += f", accuracy {result['patch_accuracy']:.2%}"
    arguments = f"--config.init_from={workdir}", f"--workdir={workdir}_finetuned"
    tune = command_line.command("train.py", "--config=PRESET", *arguments)
    pictures = command_line.command("-m", "vit_jax.figures", str(workdir), "--out=figures")
    logger.info(
        f"\n{config.dataset.eval_split.capitalize()} masked patches: {loss}\n"
        f"\nIn {workdir}: {', '.join(run_folder.list_files(workdir))}"
        "\n\nNext, you could try"
        f"\n  fine-tuning, with a preset for the same model   {tune}"
        f"\n  pictures   {pictures}"
    )


def write_report(config, workdir):
    """Writes the run's report.html and returns its path; logs why it can't, and returns None."""
    if not models.predicts_classes(config):
        logger.info("No report.html: it is about classes, which the run doesn't predict")
        return None
    try:
        return evaluate.report(workdir)
    except Exception as error:  # the run itself is complete
        logger.warning(f"The report can't be written: {first_line(error)}")
        return None
