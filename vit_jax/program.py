"""What a run computes, from its configuration, the shape of its images and a mesh."""

import functools
import pathlib

import jax

from vit_jax import models, optim, sharding, train_state


def keep_compiled(workdir) -> None:
    """Keeps compiled programs in a run's folder, so that started again it doesn't compile again.

    Where JAX_COMPILATION_CACHE_DIR is set, they are kept there, as JAX does by itself.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = pathlib.Path(workdir).resolve() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the small ones too


class Program:
    """The model, its optimizer and the compiled steps; the same here and for another machine.

    Attributes:
        model: the `models.VisionTransformer`.
        tx: optax's transformation; learning_rate: step -> rate.
        init: () -> the TrainState a run begins with, made in place on the mesh.
        shapes: of that state, with shardings.
        train_step: (state, batch) -> (state, metrics), compiled when first asked for.
        eval_step: (params, batch) -> `metrics.batch_sums`, likewise.
    """

    def __init__(self, config, image_shape: tuple[int, int, int], mesh):
        """config: with `num_classes` and `total_steps` filled in; image_shape: (H, W, C).

        Raises:
            UserError: a configuration that can't work.
        """
        self.config, self.image_shape, self.mesh = config, image_shape, mesh
        train_state.check_batch_size(config.batch_size, config.accum_steps, mesh)
        self.model = models.from_config(config)
        models.checks.check_image(self.model, image_shape[:2])
        params = jax.eval_shape(
            lambda: train_state.init_params(self.model, image_shape, config.seed)
        )
        self.tx, self.learning_rate = optim.create(config, params, config.total_steps)
        self.init, self.shapes = train_state.initializer(
            self.model, self.tx, image_shape, config, mesh
        )
        self._train_step = train_state.make_train_step(
            self.model, self.tx, self.learning_rate, config
        )

    @property
    def batch_shapes(self) -> dict:
        return sharding.batch_shapes(self.config.batch_size, self.image_shape, self.mesh)

    @functools.cached_property
    def train_step(self):
        return sharding.compile_step(self._train_step, self.shapes, self.batch_shapes)

    @functools.cached_property
    def eval_step(self):
        step = train_state.make_eval_step(self.model, self.config)
        batch = sharding.batch_shapes(
            self.eval_batch_size, self.image_shape, self.mesh, with_mask=True
        )
        return sharding.compiled(step, self.shapes.eval_params, batch)

    @property
    def eval_batch_size(self) -> int:
        return train_state.eval_batch_size(self.config, self.mesh)
