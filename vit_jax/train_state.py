"""A run's state, and the two steps: train and evaluate."""

from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import optax

from vit_jax import augment, losses, metrics, sharding
from vit_jax.errors import UserError


@flax.struct.dataclass
class TrainState:
    """All that a run carries from step to step.

    step int32 (); params, ema_params: the model's tree (ema_params None where EMA is off);
    skipped int32 (): updates that were dropped, see `on_nonfinite`.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    ema_params: dict | None
    skipped: jax.Array

    @property
    def eval_params(self) -> dict:
        """What is evaluated and published: the average where there is one."""
        return self.params if self.ema_params is None else self.ema_params


def init_params(model, image_shape: tuple[int, int, int], seed: int) -> dict:
    """The model's parameters at the start of a run; a function of the seed alone."""
    images = jnp.zeros((1, *image_shape))
    return model.init(jax.random.key(seed), images, train=False)["params"]


def initializer(model, tx, image_shape: tuple[int, int, int], config, mesh):
    """How a run's state begins: (() -> TrainState, its shapes with their shardings).

    The state is made in place on the mesh: no device ever holds more than its part. The shapes
    are what a checkpoint is restored to.
    """

    def init():
        params = init_params(model, image_shape, config.seed)
        # The average starts as a copy: the train step is given both to overwrite.
        ema_params = jax.tree.map(jnp.copy, params) if config.ema_decay else None
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, tx.init(params), ema_params, jnp.copy(zero))

    shapes = jax.eval_shape(init)
    placement = sharding.state_sharding(shapes, mesh)
    shapes = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        placement,
    )
    return jax.jit(init, out_shardings=placement), shapes


def with_params(state: TrainState, params: dict) -> TrainState:
    """The state of a run that begins with these parameters, placed as the state's are."""
    placement = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    params = jax.device_put(params, placement)
    # The train step is given both to overwrite.
    ema_params = None if state.ema_params is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema_params=ema_params)


def make_train_step(model, tx, learning_rate: Callable, config) -> Callable:
    """(state, batch) -> (state, metrics): one update, a pure function for `jax.jit`.

    batch: images uint8 (N, H, W, C), labels int32 (N,). Every random choice is drawn from a key
    made of (config.seed, state.step). Metrics are float32 scalars on the device: the loss before
    the update, accuracy, learning_rate, and the norms of gradient and updated parameters; with
    `on_nonfinite` "skip" also `skipped`, how many updates were dropped by then: those of steps
    where another of these numbers isn't finite.
    """
    loss_fn = losses.by_name(config.loss)
    augment.check(config.augment)
    if config.on_nonfinite not in ("stop", "skip"):
        raise UserError(f"config.on_nonfinite is {config.on_nonfinite!r}; it can be 'stop', 'skip'")
    if model.pool == "none":
        raise UserError(
            "config.model.pool 'none' gives logits for each patch, and training needs them for "
            "each image: take 'cls', 'gap' or 'map'"
        )

    def loss_and_accuracy(params, images, labels, key):
        augment_key, dropout_key = jax.random.split(key)
        images, targets = augment.train_inputs(
            images, labels, augment_key, model.num_classes, config.augment
        )
        rngs = {"dropout": dropout_key}
        logits = model.apply({"params": params}, images, train=True, rngs=rngs)
        hits = jnp.argmax(logits, axis=-1) == labels
        return loss_fn(logits, targets).mean(), hits.mean(dtype=jnp.float32)

    def grad_fn(*args):
        values, grads = jax.value_and_grad(loss_and_accuracy, has_aux=True)(*args)
        return values, sharding.placed(grads)

    def train_step(state: TrainState, batch: dict):
        key = step_key(config.seed, state.step)
        (loss, accuracy), grads = accumulate(
            grad_fn,
            state.params,
            (batch["images"], batch["labels"]),
            key,
            config.accum_steps,
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optax.incremental_update(params, ema_params, 1.0 - config.ema_decay)
        values = {
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": learning_rate(state.step),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
        }
        new = TrainState(state.step + 1, params, opt_state, ema_params, state.skipped)
        if config.on_nonfinite == "skip":
            finite = jnp.isfinite(jnp.stack(list(values.values()))).all()
            new = new_or_old(finite, new, state)
            values["skipped"] = new.skipped
        return new, values

    return train_step


def new_or_old(finite, new: TrainState, old: TrainState) -> TrainState:
    """`new` where `finite`, else `old` with the step counted, and the update as dropped.

    The schedule goes on with the steps, so its count does too.
    """

    def is_schedule(leaf):
        return isinstance(leaf, optax.ScaleByScheduleState)

    def choose(new, old):
        return new if is_schedule(new) else jnp.where(finite, new, old)

    kept = jax.tree.map(choose, new, old, is_leaf=is_schedule)
    return kept.replace(step=new.step, skipped=old.skipped + jnp.where(finite, 0, 1))


def step_key(seed: int, step):
    """What every random choice of a training step on the device is drawn from."""
    return jax.random.fold_in(jax.random.key(seed), step)


def accumulate(grad_fn: Callable, params, batch: tuple, key, accum_steps: int):
    """The mean of `grad_fn(params, *part, key)` over `accum_steps` equal parts of the batch.

    One part is computed on at a time. Part i takes every accum_steps-th example, so that each
    device's share of a part lies on that device already.
    """
    if accum_steps == 1:
        return grad_fn(params, *batch, key)

    def split(x):  # (N, ...) -> (accum_steps, N / accum_steps, ...)
        return x.reshape(-1, accum_steps, *x.shape[1:]).swapaxes(0, 1)

    def add(total, part):
        part, key = part
        return jax.tree.map(jnp.add, total, grad_fn(params, *part, key)), None

    parts = (jax.tree.map(split, batch), jax.random.split(key, accum_steps))
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(grad_fn, params, *jax.tree.map(lambda leaf: leaf[0], parts[0]), key),
    )
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda leaf: leaf / accum_steps, total)


def make_eval_step(model, config) -> Callable:
    """(params, batch) -> `metrics.batch_sums`; batch: images, labels and mask bool (N,)."""
    loss_fn = losses.by_name(config.loss)

    def eval_step(params, batch):
        images = augment.normalize(batch["images"], config.augment.mean, config.augment.std)
        logits = model.apply({"params": params}, images, train=False)
        example_losses = loss_fn(logits, augment.soft_labels(batch["labels"], model.num_classes))
        return metrics.batch_sums(logits, batch["labels"], example_losses, batch["mask"])

    return eval_step


def check_batch_size(batch_size: int, accum_steps: int, mesh) -> None:
    """Raises UserError where a batch can't be shared out evenly."""
    shards = sharding.num_shards(mesh)
    if accum_steps < 1 or batch_size < 1 or batch_size % (shards * accum_steps):
        unit = shards * max(accum_steps, 1)
        near = max(round(batch_size / unit), 1) * unit
        raise UserError(
            f"config.batch_size {batch_size} is not divisible by {shards} devices x "
            f"{accum_steps} accumulation steps: take {near}, or change accum_steps"
        )


def eval_batch_size(config, mesh) -> int:
    """As many examples as one part of a training step, rounded up to share out evenly."""
    shards = sharding.num_shards(mesh)
    return -(-config.batch_size // (config.accum_steps * shards)) * shards
