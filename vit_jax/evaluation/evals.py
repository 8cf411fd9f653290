"""The evaluations of a run: the entries of `config.evals`, and what runs them.

An entry is a name and a dictionary, for instance in a preset

    config.evals = {
        "minival": {"split": "train[99%:]"},
        "v2": {"name": "imagenet_v2", "split": "test", "every_steps": 10_000},
        "fewshot": {"kind": "fewshot", "shots": (5, 10), "train_split": "train[:5%]"},
    }

To add a kind that classifies features, write a file like `knn.py` with the functions `evaluate` and
`check` and a table RANGES, and give it a row in KINDS. The keyword-only parameters of `evaluate`
are the kind's settings. A metric of single examples belongs in vit_jax/training/metrics.py.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from vit_jax import checks
from vit_jax.errors import UserError
from vit_jax.evaluation import accuracy, embeddings, fewshot, knn, probe
from vit_jax.parallel import feeding, sharding
from vit_jax.parallel.mesh import replicated

KINDS = {"fewshot": fewshot, "knn": knn, "probe": probe}  # and "accuracy"
RESERVED = ("train", "val")  # names that the run's own metrics have


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One entry of `config.evals`.

    Attributes:
        kind: "accuracy", of the model's own classes, or a key of KINDS.
        name, data_dir: the dataset; None: that of the run. Unless the kind is "accuracy", it may
            have other classes.
        split: the split to evaluate on; None: `config.dataset.eval_split`.
        every_steps: how often training evaluates it, besides at the end; None:
            `config.eval_every_steps`.
        eval_crop, eval_method: as in `config.augment`; None: those of the run.
        train_split: the split that the classifier is fitted to; None: `config.dataset.train_split`.
        train_examples: at most so many of its examples are used, evenly spaced; None: all.
        layer: None for the features that the head gets, or the number of a block, from 1, whose
            output is averaged over the patches.
        settings: of the kind, such as {"neighbors": 20}.
    """

    kind: str = "accuracy"
    name: str | None = None
    data_dir: str | None = None
    split: str | None = None
    every_steps: int | None = None
    eval_crop: float | str | None = None
    eval_method: str | None = None
    train_split: str | None = None
    train_examples: int | None = 100_000
    layer: int | None = None
    settings: Mapping = dataclasses.field(default_factory=dict)


OF_VIEWS = ("eval_crop", "eval_method")
OF_ACCURACY = ("kind", "name", "data_dir", "split", "every_steps", *OF_VIEWS)
OF_FEATURES = (*OF_ACCURACY, "train_split", "train_examples", "layer")
TEXTS = ("name", "data_dir", "split", "train_split")


def parse(config) -> dict[str, Evaluation]:
    """Returns the evaluations of `config.evals`, by name.

    Raises:
        UserError: an entry isn't valid; the message names its field.
    """
    # `get`: the configuration may be of a run from before the field.
    entries = checks.dictionary("config.evals", config.get("evals"), "{'knn': {'kind': 'knn'}}")
    return {name: parse_entry(name, entry) for name, entry in entries.items()}


def parse_entry(name: str, entry) -> Evaluation:
    """Returns the evaluation of one entry; see `parse`."""
    field = f"config.evals.{name}"
    if name in RESERVED or not name or "/" in name or name.endswith("_raw"):
        raise UserError(
            f"config.evals has {name!r}; a name must not be 'train' or 'val', have a slash, or end "
            "in '_raw'"
        )
    entry = checks.dictionary(field, entry, "{'kind': 'knn'}")
    kind = entry.get("kind", "accuracy")
    checks.check_choice(f"{field}.kind", kind, ("accuracy", *KINDS))
    own = settings_of(kind)
    known = (*(OF_ACCURACY if kind == "accuracy" else OF_FEATURES), *own)
    for key in entry:
        if key not in known:
            raise UserError(f"{field} has {key!r}; {kind!r} takes {', '.join(known)}")
    settings = {key: freeze(entry[key]) for key in own if key in entry}
    for key, value in settings.items():
        check_setting(f"{field}.{key}", value, own[key], KINDS[kind].RANGES[key])
    common = {key: value for key, value in entry.items() if key not in own}
    check_common(field, common)
    return Evaluation(**common, settings=settings)


def settings_of(kind: str) -> dict:
    """Returns the settings that a kind has besides the common fields, with their defaults."""
    if kind == "accuracy":
        return {}
    parameters = inspect.signature(KINDS[kind].evaluate).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def freeze(value):
    """Returns a list as a tuple, and any other value as it is."""
    return tuple(value) if isinstance(value, list) else value


def check_setting(field: str, value, default, valid: checks.Range) -> None:
    """Raises UserError unless a setting is a number in a range, or numbers if its default is."""
    if isinstance(default, tuple):
        if not isinstance(value, tuple) or not value:
            raise UserError(f"{field} is {value!r}; it must be numbers, such as {default}")
        for number in value:
            checks.check_range(field, number, valid)
    else:
        checks.check_range(field, value, valid)


def check_common(field: str, entry: Mapping) -> None:
    """Raises UserError if a field that every kind has isn't valid."""
    for key in TEXTS:
        if not isinstance(entry.get(key), str | None):
            raise UserError(f"{field}.{key} is {entry[key]!r}; it must be text")
    optional_count = dataclasses.replace(checks.COUNT, optional=True)
    for key in ("train_examples", "layer"):
        checks.check_range(f"{field}.{key}", entry.get(key), optional_count)
    every = dataclasses.replace(checks.COUNT_OR_ZERO, optional=True)
    checks.check_range(f"{field}.every_steps", entry.get("every_steps"), every)
    views = {"eval_crop": checks.SQUEEZE, "eval_method": checks.EVAL_METHODS[0]}
    views |= {key: value for key, value in entry.items() if key in views and value is not None}
    checks.check_eval_view(**views, group=f"{field}.")


def check(config, depth: int) -> None:
    """Raises UserError if `config.evals` isn't valid for a model with `depth` blocks."""
    check_layers(parse(config), depth)


def check_layers(evaluations: Mapping[str, Evaluation], depth: int) -> None:
    """Raises UserError if an evaluation is of a layer that a model with `depth` blocks lacks."""
    for name, evaluation in evaluations.items():
        if evaluation.layer is not None and evaluation.layer > depth:
            raise UserError(
                f"config.evals.{name}.layer is {evaluation.layer}; the model has {depth} blocks"
            )


class Setup(NamedTuple):
    """What an evaluation needs to know of the run.

    Attributes:
        config: its configuration.
        model: the VisionTransformer.
        class_names: those of the model's classes.
        params_shapes: the parameters as shapes with shardings on the mesh.
        batch_shape: of a global batch of images.
        open_batches: `input_pipeline.open_eval_batches`, with the arguments that tell which part
            of each batch this process loads.
    """

    config: Any
    model: Any
    class_names: tuple[str, ...]
    params_shapes: dict
    batch_shape: tuple[int, int, int, int]
    open_batches: Callable

    @property
    def mesh(self):
        return jax.tree.leaves(self.params_shapes)[0].sharding.mesh

    def compile(self, step: Callable, label_shape: tuple[int, ...] = ()):
        """Compiles a step (params, batch) -> arrays that every process then has whole."""
        batch_size, *image_shape = self.batch_shape
        batch_shapes = sharding.batch_shapes(
            batch_size, image_shape, self.mesh, for_evaluation=True, label_shape=label_shape
        )
        return sharding.compile_for_shapes(
            step, self.params_shapes, batch_shapes, out_shardings=replicated(self.mesh)
        )


class AccuracyEvaluator:
    """Evaluates the model's own predictions: (params, stop_requested) -> `metrics.NAMES`."""

    def __init__(self, eval_step: Callable, batches, mesh, every_steps: int):
        """Takes () -> the compiled step of `steps.make_eval_step`, and the set's batches."""
        self.eval_step, self.batches, self.mesh = eval_step, batches, mesh
        self.every_steps = every_steps
        self.sources = [batches.source]

    def __call__(self, params, stop_requested: Callable[[], bool]) -> dict[str, float] | None:
        batches = feeding.to_devices(self.batches, self.mesh)
        return accuracy.evaluate(self.eval_step(), params, batches, stop_requested)


class FeatureEvaluator:
    """Evaluates a classifier of frozen features: (params, stop_requested) -> numbers by name.

    Opens the dataset when it is created; compiles when it is first called.
    """

    def __init__(self, name: str, evaluation: Evaluation, setup: Setup):
        self.name, self.evaluation, self.setup = name, evaluation, setup
        self.every_steps = every_steps(evaluation, setup.config)
        dataset, config = setup.config.dataset, with_preprocessing(setup.config, evaluation)
        open_batches = functools.partial(
            setup.open_batches, config, name=evaluation.name, data_dir=evaluation.data_dir
        )
        self.train_batches = open_batches(
            split=evaluation.train_split or dataset.train_split,
            max_examples=evaluation.train_examples,
        )
        class_names = self.train_batches.source.class_names
        self.test_batches = open_batches(
            split=evaluation.split or dataset.eval_split, class_names=class_names
        )
        self.num_classes = len(class_names)
        self.sources = [self.train_batches.source, self.test_batches.source]
        self.check_sources()
        self.call(KINDS[evaluation.kind].check, self.train_batches.source.num_examples)

    @functools.cached_property
    def embed_step(self):
        config, model = self.setup.config, self.setup.model
        return self.setup.compile(embeddings.make_embed_step(model, config, self.evaluation.layer))

    def __call__(self, params, stop_requested: Callable[[], bool]) -> dict[str, float] | None:
        sets = []
        for batches in (self.train_batches, self.test_batches):
            batches = feeding.to_devices(batches, self.setup.mesh)
            sets.append(
                embeddings.embed(self.embed_step, params, batches, self.num_classes, stop_requested)
            )
            if sets[-1] is None:
                return None
        return self.call(KINDS[self.evaluation.kind].evaluate, *sets)

    def check_sources(self) -> None:
        """Raises UserError if the examples have sets of labels, or are tested on themselves."""
        fitted, tested = self.sources
        if any(source.max_labels is not None for source in self.sources):
            raise UserError(
                f"config.evals.{self.name}: {tested.name} has sets of labels, which only the kind "
                "'accuracy' can use"
            )
        if shared := fitted.num_shared(tested):
            raise UserError(
                f"config.evals.{self.name}: {shared:,} of the {tested.num_examples:,} examples of "
                f"{tested.name} are also in its train_split, {fitted.name}: use other splits"
            )

    def call(self, function: Callable, *args):
        """Calls a function of the kind; its errors name the entry."""
        try:
            return function(*args, self.num_classes, **self.evaluation.settings)
        except UserError as error:
            raise UserError(f"config.evals.{self.name}: {error}") from None


def every_steps(evaluation: Evaluation, config) -> int:
    """Returns how often training runs an evaluation, in steps."""
    own = evaluation.every_steps
    return config.eval_every_steps if own is None else own


def with_preprocessing(config, evaluation: Evaluation):
    """Returns a configuration with the preprocessing of an evaluation."""
    own = {key: getattr(evaluation, key) for key in OF_VIEWS}
    config = config.copy_and_resolve_references()
    with config.ignore_type():  # "squeeze", where the run has a number, or the other way round
        config.augment.update({key: value for key, value in own.items() if value is not None})
    return config


def create(evaluations: Mapping[str, Evaluation], setup: Setup, eval_step: Callable) -> dict:
    """Opens the datasets of evaluations.

    Args:
        evaluations: by name.
        setup: what they need to know of the run.
        eval_step: () -> the compiled step of `steps.make_eval_step`.

    Returns:
        For each name a function (params, stop_requested) -> numbers by name, or None as soon as
        `stop_requested()` is True. Its attribute `sources` has the splits that it reads, the one
        that it evaluates last, and `every_steps` how often training runs it.

    Raises:
        UserError: an unknown dataset or split, or one with other classes.
    """

    @functools.cache
    def label_set_step(label_shape):
        step = accuracy.make_label_set_step(setup.model, setup.config)
        return setup.compile(step, label_shape)

    def step_for(source):
        if source.max_labels is None:
            return eval_step
        if not setup.model.num_classes:
            raise UserError(
                f"config.evals: {source.name} has sets of labels, and the run predicts no classes"
            )
        return functools.partial(label_set_step, source.label_shape)

    evaluators = {}
    for name, evaluation in evaluations.items():
        if evaluation.kind in KINDS:
            evaluators[name] = FeatureEvaluator(name, evaluation, setup)
        else:
            batches = setup.open_batches(
                with_preprocessing(setup.config, evaluation),
                split=evaluation.split or setup.config.dataset.eval_split,
                name=evaluation.name,
                data_dir=evaluation.data_dir,
                class_names=setup.class_names,
            )
            every = every_steps(evaluation, setup.config)
            step = step_for(batches.source)
            evaluators[name] = AccuracyEvaluator(step, batches, setup.mesh, every)
    return evaluators
