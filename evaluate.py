"""Evaluates a run's checkpoint, or published weights.

python evaluate.py --workdir=runs/digits
python evaluate.py --workdir=runs/digits --step=best --report --evals=fewshot,knn
python evaluate.py --workdir=runs/vit_b16 --dataset=imagenet_v2 --split=test
python evaluate.py --config=configs/vit_b16.py --config.init_from=B_16.npz --config.image_size=384

Every example of the split counts exactly once. The last command evaluates published weights on
a preset's dataset. docs/evaluation.md explains the numbers.
"""

if __name__ == "__main__":
    import startup  # noqa: F401

import ast
import functools
import json
import logging
import re
from typing import Any, NamedTuple

import jax
from absl import flags
from etils import epath

import command_line
import input_pipeline
from configs import common
from vit_jax import checks, models, pretrained
from vit_jax.errors import UserError, first_line
from vit_jax.evaluation import accuracy, evals
from vit_jax.inference.classifier import Classifier
from vit_jax.logs import run_log
from vit_jax.parallel import feeding, sharding
from vit_jax.parallel.mesh import create_mesh
from vit_jax.report import page, results
from vit_jax.report.results import Result
from vit_jax.runs import checkpoint, checkpoint_paths, run_folder
from vit_jax.storage import mirror
from vit_jax.training import steps, train_state
from vit_jax.training.program import eval_batch_size

logger = logging.getLogger("vit_jax")


class Target(NamedTuple):
    """A model, and the split that it is evaluated on.

    Attributes:
        config: the configuration of a run or a preset, with its own dataset.
        model: the VisionTransformer.
        mesh: the devices.
        params: the parameters, on the mesh: the average, if the run keeps one.
        raw_params: the parameters themselves, if `params` is their average; or None.
        eval_set: the split, an `input_pipeline.Source`.
        step: of the checkpoint, or None.
    """

    config: Any
    model: Any
    mesh: Any
    params: dict
    raw_params: dict | None
    eval_set: Any
    step: int | None


def open_run(workdir, step: int | str | None = None, **dataset) -> Target:
    """Opens a run's checkpoint, split over this machine's devices as `config.mesh` says.

    Args:
        workdir: the run's folder.
        step: the checkpoint's step, "best" or "latest"; None: the latest.
        **dataset: another dataset with the same classes; see `select_dataset`.

    Raises:
        UserError: an unknown run, checkpoint, dataset or split.
    """
    check_predicts_classes(workdir)
    config, params, step = checkpoint.read_params(workdir, step, shapes=param_shapes)
    raw_params, shapes = None, sharding.shapes_of(params)
    if config.ema_decay:
        _, raw_params, _ = checkpoint.read_params(workdir, step, "params", lambda _: shapes)
    selected = select_dataset(config, **dataset)
    if not dataset.get("name"):  # the run's own, maybe in another place
        config.dataset = selected
    check(config)
    eval_set = open_eval_set(selected, run_folder.read_class_names(workdir))
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    return Target(config, models.from_config(config), mesh, params, raw_params, eval_set, step)


def check_predicts_classes(workdir) -> None:
    """Raises UserError if a run predicts masked patches instead of classes."""
    if not models.predicts_classes(run_folder.require_config(workdir)):
        raise UserError(
            f"{workdir} has no classes to evaluate: it was trained to predict masked patches, and "
            f"its metrics.jsonl has how well it does. Fine-tune it (--config.init_from={workdir}), "
            "and evaluate that run"
        )


def param_shapes(config):
    """Returns the parameters of a configuration's model as shapes with shardings."""
    model, image_shape = models.from_config(config), input_pipeline.image_shape(config)
    shapes = jax.eval_shape(lambda: train_state.init_params(model, image_shape, 0))
    return sharding.with_shardings(shapes, mesh_of(config))


def open_weights(config, **dataset) -> Target:
    """Opens the weights in `config.init_from`, and the configuration's dataset.

    Args:
        config: a preset's configuration.
        **dataset: another dataset with the same classes; see `select_dataset`.

    Raises:
        UserError: unknown weights, dataset or split, or weights of a different model.
    """
    checks.check_is_config(config)
    if not config.init_from:
        raise UserError("config.init_from is unset: set it to the weights to evaluate")
    if not models.predicts_classes(config):
        raise UserError(
            f"config.objective is {config.objective!r}; it must be 'classes', which are evaluated"
        )
    config = config.copy_and_resolve_references()
    selected = select_dataset(config, **dataset)
    input_pipeline.check(config)
    pretrained.check(config)
    eval_set = open_eval_set(selected, None)
    config.num_classes = eval_set.num_classes
    model, shape = models.from_config(config), input_pipeline.image_shape(config)
    params, mesh = pretrained.from_config(config, model, shape, new_head=False), mesh_of(config)
    params = jax.device_get(params)  # which any process can split over a mesh of all
    params = jax.device_put(params, sharding.state_sharding(params, mesh))
    return Target(config, model, mesh, params, None, eval_set, None)


def open_eval_set(dataset, class_names: tuple[str, ...] | None):
    """Opens the evaluation split of `config.dataset`, whose labels number the run's classes.

    Args:
        dataset: `config.dataset`.
        class_names: those of the run; None: those of the training split.
    """
    location = (dataset.name, dataset.data_dir)
    if class_names is None:
        class_names = input_pipeline.open_source(*location, dataset.train_split).class_names
    eval_set = input_pipeline.open_source(*location, dataset.eval_split, class_names)
    input_pipeline.check_single_labels(eval_set)
    return eval_set


def check(config) -> None:
    """Checks a recorded configuration; what it lacks, since the code was older, has its default."""
    complete = common.get_config()
    with complete.unlocked(), complete.ignore_type():
        complete.update(config)
    checks.check_values(complete, common.get_config())
    input_pipeline.check(complete)
    steps.check(complete)


def select_dataset(
    config, name: str | None = None, data_dir: str | None = None, split: str | None = None
):
    """Returns `config.dataset` with another dataset to evaluate on; what is None stays.

    Args:
        config: the configuration.
        name: a TFDS name or a folder: `dataset.name`.
        data_dir: `dataset.data_dir`.
        split: `dataset.eval_split`.
    """
    dataset = config.dataset.copy_and_resolve_references()
    fields = dict(name=name, data_dir=data_dir, eval_split=split)
    with dataset.ignore_type():
        dataset.update({field: value for field, value in fields.items() if value})
    if name and split:  # the dataset may lack the split that the run was trained on
        dataset.train_split = split
    return dataset


def evaluate(
    target: Target,
    evaluations: dict[str, evals.Evaluation] | None = None,
    reports_classes: bool = False,
) -> Result:
    """Evaluates a model on its split, and by other evaluations.

    If the run keeps an average of its parameters, the others have the accuracy of the parameters
    themselves, "val_raw", and each evaluation of them, named <name>_raw.

    Args:
        target: the model and the split.
        evaluations: by name, see `evals.parse`; of the configuration's own dataset, unless they
            name another. None: those of `config.evals`.
        reports_classes: whether the result has measures of each class.

    Raises:
        UserError: `target` isn't a Target, or an evaluation or example can't be used.
    """
    if not isinstance(target, Target):
        raise UserError(
            f"target is {target!r}; it must be what `open_run(workdir)` or `open_weights(config)` "
            "returns"
        )
    config, mesh, model = target.config, target.mesh, target.model
    if evaluations is None:
        evaluations = evals.parse(config)
    evals.check_layers(evaluations, model.depth)
    batch_size = eval_batch_size(config, mesh)
    rows = feeding.process_rows(mesh, batch_size)
    arguments = dict(
        batch_size=batch_size, share_index=rows["share_index"], num_shares=rows["num_shares"]
    )
    setup = evals.Setup(
        config=config,
        model=model,
        class_names=target.eval_set.class_names,
        params_shapes=sharding.shapes_of(target.params),
        batch_shape=(batch_size, *input_pipeline.image_shape(config)),
        open_batches=functools.partial(input_pipeline.open_eval_batches, **arguments),
    )
    eval_step = functools.cache(lambda: setup.compile(steps.make_eval_step(model, config)))
    evaluators = evals.create(evaluations, setup, eval_step)
    batches = input_pipeline.EvalBatches(target.eval_set, config, **arguments)
    predict_step = setup.compile(accuracy.make_predict_step(model, config))

    def predict(params):
        on_devices = feeding.to_devices(batches, mesh)
        return accuracy.predict(predict_step, params, on_devices, model.num_classes)

    predictions, others = predict(target.params), {}
    if target.raw_params is not None:
        others["val_raw"] = predict(target.raw_params).metrics()
    for name, evaluator in evaluators.items():
        others[name] = evaluator(target.params, lambda: False)
        if target.raw_params is not None:
            others[f"{name}_raw"] = evaluator(target.raw_params, lambda: False)
    sources = [source for evaluator in evaluators.values() for source in evaluator.sources]
    input_pipeline.report_corrupt(target.eval_set, *sources)
    return results.summarize(
        predictions, target.eval_set, others, step=target.step, reports_classes=reports_classes
    )


def mesh_of(config):
    """Returns the mesh of a configuration; one that only splits batches, if it doesn't fit."""
    try:
        return create_mesh(**config.get("mesh", {}))
    except UserError as error:
        logger.warning(f"{error}. Only batches are split over the devices instead")
        return create_mesh()


def parse_evals(text: str | None, config) -> dict[str, evals.Evaluation] | None:
    """Returns the evaluations that the flag --evals asks for; None: those of `config.evals`."""
    if text is None:
        return None
    entries = config.get("evals") or {}
    try:
        if text.lstrip().startswith("{"):
            chosen = ast.literal_eval(text)
        else:
            chosen = {name: entries.get(name, {"kind": name}) for name in text.split(",")}
    except (SyntaxError, ValueError):
        raise UserError(
            f"--evals is {text!r}; it must be names, or a dictionary such as "
            "{'knn': {'kind': 'knn', 'neighbors': 5}}"
        ) from None
    return evals.parse({"evals": chosen})


def write(target: Target, result: Result, out) -> None:
    """Writes the results to a folder; see `results.write`."""
    config = target.config
    classifier = None
    leaves = jax.tree.leaves(target.params)
    if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in leaves):
        classifier = Classifier(
            model=target.model,
            params=jax.device_get(target.params),
            image_size=input_pipeline.image_shape(config)[:2],
            channels=config.dataset.channels,
            class_names=target.eval_set.class_names,
            mean=tuple(config.augment.mean),
            std=tuple(config.augment.std),
            eval_crop=config.augment.eval_crop,
            eval_method=config.augment.eval_method,
            loss=config.loss,
        )
    images = functools.partial(input_pipeline.load_images, target.eval_set, config)
    try:
        results.write(result, classifier, images, out)
    except OSError as error:
        raise UserError(f"{out} can't be written: {error.strerror or first_line(error)}") from None


def report(workdir) -> epath.Path:
    """Evaluates a run's latest checkpoint, and writes its report; returns the page.

    Does nothing if that is done already.

    Raises:
        UserError: as `open_run`, or the folder can't be written.
    """
    folder = evaluation_folder(workdir)
    steps = run_folder.checkpoint_steps(workdir)
    if not page.is_current(workdir, folder, steps[-1] if steps else None):
        target = open_run(workdir)
        result = evaluate(target, evaluations={}, reports_classes=True)
        write(target, result, folder)
        page.write(workdir, folder)
    return epath.Path(workdir) / page.NAME


def evaluation_folder(workdir, name: str | None = None, split: str | None = None) -> epath.Path:
    """Returns where the results of a run's evaluation are written.

    Args:
        workdir: the run's folder.
        name, split: see `select_dataset`; another dataset or split has a folder of its own.
    """
    folder = epath.Path(workdir) / "evaluation"
    words = re.findall(r"\w+", f"{name or ''} {split or ''}")
    return folder / "_".join(words) if words else folder


class StepParser(flags.ArgumentParser):
    """Reads "best", "latest" or a step."""

    syntactic_help = "best, latest or a number"

    def parse(self, argument):
        try:
            return checkpoint_paths.parse_step(argument)
        except UserError as error:
            raise ValueError(str(error)) from None


def define_flags() -> None:
    """Defines the flags of the script, which train.py, importing it, must not have."""
    flags.adopt_module_key_flags(command_line)
    flags.DEFINE_string(
        "dataset", None, "A TFDS name or a folder. Default: the configuration's dataset.name."
    )
    flags.DEFINE_string(
        "data_dir", None, "Where TFDS keeps its datasets. Default: the configuration's."
    )
    flags.DEFINE(
        StepParser(), "step", None, "The checkpoint: best, latest or its step. Default: the latest."
    )
    flags.DEFINE_string(
        "split", None, "The dataset's split. Default: the configuration's dataset.eval_split."
    )
    flags.DEFINE_string(
        "evals",
        None,
        "More evaluations: names in the run's config.evals, or the kinds fewshot, knn and probe, "
        "separated by commas; or a dictionary like config.evals. Default: config.evals, unless "
        "--dataset is given.",
    )
    flags.DEFINE_bool(
        "report",
        False,
        "Also reports on each class, draws the confusion matrix and mistakes, and writes the run's "
        "report.html.",
    )
    flags.DEFINE_string(
        "out", None, "The folder to write to. Default: <workdir>/evaluation; without a run, none."
    )


def with_flags(message: str) -> str:
    """Names this script's flags in a message about fields of `config.dataset`."""
    for field, flag in command_line.DATASET_FLAGS.items():
        message = message.replace(f"--{field}=", f"{flag}=")
        if f"{field} is " in message:
            is_given = flags.FLAGS[flag.removeprefix("--")].present
            message = (
                message.replace(field, flag) if is_given else f"{message}; {flag}=... gives another"
            )
    return message


def main():
    run_log.start_logging()
    args = flags.FLAGS
    workdir, config = command_line.WORKDIR.value, command_line.CONFIG.value
    dataset = dict(name=args.dataset, data_dir=args.data_dir, split=args.split)
    if config is not None and (workdir is not None or args.step is not None):
        raise UserError(
            "--config can't be combined with --workdir or --step, which select a checkpoint; "
            "--dataset, --data_dir and --split select what it is evaluated on"
        )
    out = args.out or (workdir and evaluation_folder(workdir, args.dataset, args.split))
    if args.report and out is None:
        raise UserError("--report needs --out, the folder to write its pictures to")
    if workdir is None and (config is None or not config.init_from):
        raise UserError(
            "Nothing to evaluate: set --workdir to a run's folder, or --config to a preset and "
            "--config.init_from to published weights"
        )
    try:
        if workdir is not None:
            target = open_run(workdir, args.step, **dataset)
        else:
            target = open_weights(config, **dataset)
    except UserError as error:
        raise UserError(with_flags(str(error))) from None
    if out is not None:
        mirror.check_out(out)
    evaluations = parse_evals(args.evals, target.config)
    if evaluations is None and args.dataset:
        evaluations = {}  # `config.evals` is of the run's own dataset, which may not be here
    result = evaluate(target, evaluations, reports_classes=args.report)
    if jax.process_index() != 0:
        return
    if command_line.JSON.value:
        print(json.dumps(results.as_json(result)))
    else:
        print("\n".join(results.table(result)))
        if result.classes is not None:
            print("\n" + "\n".join(results.class_table(result.classes)))
    if out is None:
        return
    write(target, result, out)
    is_own = workdir is not None and epath.Path(out) == evaluation_folder(workdir)
    written = out
    if args.report:  # of another dataset, the page is beside its numbers
        written = page.write(workdir, out, workdir if is_own else out)
    if not command_line.JSON.value:
        print(f"\n{written}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main, needs_config=False)
