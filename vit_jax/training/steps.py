"""The training step and the evaluation step: pure functions of a state and a batch."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from vit_jax import checks
from vit_jax.errors import UserError
from vit_jax.models import predicts_classes
from vit_jax.objectives import masked_patches
from vit_jax.parallel import sharding
from vit_jax.training import augment, losses, metrics, optim
from vit_jax.training.train_state import TrainState

ON_NONFINITE = ("stop", "skip")
RANGES = {
    "seed": checks.Range(0, 2**32 - 1, whole=True),
    "num_epochs": checks.Range(0, 10**6, above=True, optional=True),
    "total_steps": dataclasses.replace(checks.COUNT, optional=True),
    "batch_size": checks.Range(1, 2**24, whole=True),
    "accum_steps": checks.COUNT,
    "ema_decay": checks.Range(0, 1, below=True, optional=True),
}


def make_train_step(model, tx, learning_rate: Callable, config) -> Callable:
    """Returns the function (state, batch) -> (state, metrics), to be compiled by `jax.jit`.

    All randomness comes from a key made of (config.seed, state.step).

    To add a metric, a scalar: one of the examples goes into the dict that `classes_forward` makes
    (or `patches_forward`), which is averaged over microbatches; one of gradients or parameters
    into `values`. A value that isn't finite stops the run. Both are written to metrics.jsonl and
    TensorBoard; what the console shows is in `RunLog.write_step`.

    Args:
        model: the VisionTransformer.
        tx: the optax transformation.
        learning_rate: step -> learning rate, for the metrics.
        config: a run's configuration.

    Returns:
        A function of a TrainState and a batch: `images` uint8 (N, H, W, C), `labels` int32 (N,).
        Its metrics are scalars:
            loss: before the update.
            accuracy: before the update, of the images' own labels, also with MixUp and CutMix; of
                masked patches instead patch_accuracy, if their target is a color.
            learning_rate: of this update.
            grad_norm: of the parameters that aren't frozen, before clipping.
            param_norm: after the update.
            skipped: with `config.on_nonfinite="skip"`, how many updates have been dropped so far:
                those for which a metric above wasn't finite.
    """
    check(config)
    forward = (classes_forward if predicts_classes(config) else patches_forward)(model, config)

    def gradients(params, images, labels, key):
        """Returns (loss, metrics), and the gradients of the parameters that aren't frozen."""
        trained, frozen = optim.split_frozen(params, config.optimizer.frozen)

        def loss_of(trained):
            return forward(optim.merge_frozen(trained, frozen), images, labels, key)

        values, grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
        return values, sharding.shard_like_params(grads)

    def train_step(state: TrainState, batch: dict):
        key = step_key(config.seed, state.step)
        (loss, others), grads = accumulate(
            gradients, state.params, (batch["images"], batch["labels"]), key, config.accum_steps
        )
        updates, opt_state = tx.update(
            optim.fill_frozen(grads, state.params), state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optax.incremental_update(params, ema_params, 1.0 - config.ema_decay)
        values = {
            "loss": loss,
            **others,
            "learning_rate": learning_rate(state.step),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
        }
        new_state = state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, ema_params=ema_params
        )
        if config.on_nonfinite == "skip":
            finite = jnp.isfinite(jnp.stack(list(values.values()))).all()
            new_state = keep_if(finite, new_state, state)
            values["skipped"] = new_state.skipped
        return new_state, values

    return train_step


def classes_forward(model, config) -> Callable:
    """Returns the function (params, images, labels, key) -> the loss of predicting classes.

    Its result is the mean loss of one microbatch, and other metrics by name.
    """
    loss_fn = losses.create(config.loss, config.loss_args).function

    def forward(params, images, labels, key):
        augment_key, dropout_key = jax.random.split(key)
        arguments = (augment_key, model.num_classes, config.augment, config.dataset.repeats)
        images, targets = augment.train_inputs(images, labels, *arguments)
        logits = model.apply({"params": params}, images, train=True, rngs={"dropout": dropout_key})
        hits = jnp.argmax(logits, axis=-1) == labels
        return loss_fn(logits, targets).mean(), {"accuracy": hits.mean(dtype=jnp.float32)}

    return forward


def patches_forward(model, config) -> Callable:
    """Returns the function (params, images, labels, key) -> the loss of masked patches.

    Its result is that of `classes_forward`; the labels aren't used.
    """
    values_of = patch_values(model, config)

    def forward(params, images, labels, key):
        corruption_key, dropout_key = jax.random.split(key)
        keys = jax.random.split(corruption_key, len(images))
        values = values_of(params, images, keys, train=True, rngs={"dropout": dropout_key})
        means = {name: value.mean() for name, value in values.items()}
        return means.pop("loss"), means

    return forward


def patch_values(model, config) -> Callable:
    """Returns the function (params, images, keys, **options) -> `masked_patches.losses`.

    Images are uint8 (N, H, W, C), and their corruption is drawn from keys (N,).
    """
    module = masked_patches.create(model, config)

    def values_of(params, images, keys, **options):
        num_patches = math.prod(model.grid(images.shape[1:3]))
        corruption = masked_patches.draw(keys, num_patches, module.settings)
        expected = masked_patches.targets(images, model.patch_shape, module.settings)
        images = augment.normalize(images, config.augment.mean, config.augment.std)
        outputs = module.apply({"params": params}, images, corruption, **options)
        return masked_patches.losses(outputs, expected, corruption.corrupted, module.settings)

    return values_of


def make_eval_step(model, config) -> Callable:
    """Returns the function (params, batch) -> sums over a batch, of `metrics.NAMES` and `count`.

    A batch is `images` uint8 (N, H, W, C), `labels` int32 (N,) and `mask` bool (N,); and for
    masked patches, `index` int32 (N,), which their corruption follows from.
    """
    if not predicts_classes(config):
        values_of = patch_values(model, config)

        def masked_eval_step(params, batch):
            keys = masked_patches.evaluation_keys(batch["index"])
            return metrics.sums(values_of(params, batch["images"], keys), batch["mask"])

        return masked_eval_step

    # `get`: evaluate.py takes the recorded configuration, which may lack newer fields.
    loss_fn = losses.create(config.loss, config.get("loss_args")).function

    def eval_step(params, batch):
        images = augment.normalize(batch["images"], config.augment.mean, config.augment.std)
        logits = model.apply({"params": params}, images, train=False)
        example_losses = loss_fn(logits, augment.soft_labels(batch["labels"], model.num_classes))
        return metrics.batch_sums(logits, batch["labels"], example_losses, batch["mask"])

    return eval_step


def check(config) -> None:
    """Raises UserError if a configuration is invalid for the training or evaluation step."""
    checks.check_ranges("config", config, RANGES)
    losses.create(config.loss, config.get("loss_args"))
    augment.check(config.augment)
    checks.check_choice("config.on_nonfinite", config.on_nonfinite, ON_NONFINITE)
    if config.model.pool == "none":
        raise UserError(
            "config.model.pool 'none' gives logits for each patch, and training needs them for "
            "each image: use 'cls', 'gap' or 'map'"
        )


def step_key(seed: int, step):
    """Returns the key that all on-device randomness of a training step comes from."""
    return jax.random.fold_in(jax.random.key(seed), step)


def accumulate(gradients: Callable, params, batch: tuple, key, accum_steps: int):
    """Returns the mean of `gradients(params, *microbatch, key)` over the batch's microbatches.

    Microbatches run sequentially. Microbatch i has the examples i, i + accum_steps, ..., so each
    device keeps the examples that it has.
    """
    if accum_steps == 1:
        return gradients(params, *batch, key)

    def split(x):  # (N, ...) -> (accum_steps, N / accum_steps, ...)
        return x.reshape(-1, accum_steps, *x.shape[1:]).swapaxes(0, 1)

    def add(total, microbatch):
        batch, key = microbatch
        return jax.tree.map(jnp.add, total, gradients(params, *batch, key)), None

    microbatches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda leaf: leaf[0], microbatches)
    shapes = jax.eval_shape(gradients, params, *first, key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (microbatches, jax.random.split(key, accum_steps)))
    return jax.tree.map(lambda leaf: leaf / accum_steps, total)


def keep_if(finite, new: TrainState, old: TrainState) -> TrainState:
    """Returns `new` if `finite`; otherwise `old`, except that the step and the schedule advance."""

    def is_schedule(leaf):
        return isinstance(leaf, optax.ScaleByScheduleState)

    def choose(new, old):
        return new if is_schedule(new) else jnp.where(finite, new, old)

    kept = jax.tree.map(choose, new, old, is_leaf=is_schedule)
    return kept.replace(step=new.step, skipped=old.skipped + jnp.where(finite, 0, 1))
