"""The state of a run: step, parameters, optimizer state and the parameters' average."""

import flax
import jax
import jax.numpy as jnp
import optax

from vit_jax.parallel import sharding


@flax.struct.dataclass(kw_only=True)
class TrainState:
    """Everything that a run carries from step to step.

    To add a field, an array or a tree of arrays, declare it below with the default None (tests make
    states without it), start it in `initializer` (and in `with_params`, if it is made from the
    parameters) and give it to `state.replace` in `train_step` (steps.py), which leaves None as
    None, as it does for `ema_params`. Checkpoints store every field that isn't None; when a run
    resumes from one that lacks it, it starts at its initial value. An update dropped by
    `on_nonfinite="skip"` leaves every field as it was.

    Attributes:
        step: int32 (), the number of steps taken.
        params: the model's parameters.
        opt_state: the optimizer's state.
        ema_params: the exponential moving average of `params`; None if `config.ema_decay` is None.
        skipped: int32 (), the number of updates dropped by `config.on_nonfinite="skip"`.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    ema_params: dict | None = None
    skipped: jax.Array

    @property
    def eval_params(self) -> dict:
        """The parameters to evaluate and publish: the average if there is one."""
        return self.params if self.ema_params is None else self.ema_params


def init_params(model, image_shape: tuple[int, int, int], seed: int) -> dict:
    """Returns the parameters that a run starts from; they depend on the seed alone."""
    images = jnp.zeros((1, *image_shape))
    model = model.clone(attention_impl="xla")  # the parameters don't depend on it
    return model.init(jax.random.key(seed), images, train=False)["params"]


def initializer(model, tx, image_shape: tuple[int, int, int], config, mesh):
    """Returns a function that makes the initial state on the mesh, and the state's shapes.

    Each device makes its own shards; no device ever holds more.

    Args:
        image_shape: (H, W, C).
        config: a run's configuration, of which `seed` and `ema_decay` are used.

    Returns:
        (() -> TrainState, a TrainState of jax.ShapeDtypeStruct with shardings).
    """

    def init():
        params = init_params(model, image_shape, config.seed)
        ema_params = copy(params) if config.ema_decay else None
        zero = jnp.zeros((), jnp.int32)
        # Copied, because the training step donates every array of the state.
        return TrainState(
            step=zero,
            params=params,
            opt_state=tx.init(params),
            ema_params=ema_params,
            skipped=jnp.copy(zero),
        )

    shapes = sharding.with_shardings(jax.eval_shape(init), mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(init, out_shardings=shardings), shapes


def with_params(state: TrainState, params: dict) -> TrainState:
    """Returns an initial state with other parameters, sharded like the state's own.

    Layers that they lack, those of the training on masked patches, keep their initial ones.
    """
    params = {**state.params, **params}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    params = jax.device_put(params, shardings)
    ema_params = None if state.ema_params is None else copy(params)
    return state.replace(params=params, ema_params=ema_params)


def copy(params: dict) -> dict:
    """Copies parameters: the training step donates both the parameters and their average."""
    return jax.tree.map(jnp.copy, params)
