"""What a run computes, from its configuration, the shape of its images and a mesh."""

import contextlib
import functools
import pathlib
import shutil

import jax
from jax.experimental.compilation_cache import compilation_cache

from vit_jax import distributed, models, optim, sharding, train_state


@contextlib.contextmanager
def keeping_compiled(workdir):
    """Keeps what is compiled inside in a run's folder: started again, it doesn't compile again.

    Where JAX_COMPILATION_CACHE_DIR is set, it is kept there, as JAX does by itself.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        yield
        return
    folder = pathlib.Path(workdir).resolve() / "compiled"
    unfinished = folder / "unfinished"
    if jax.process_index() == 0:  # the one that writes
        if unfinished.exists():  # an earlier start was killed here: a file may be cut off
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
    distributed.barrier("the compiled programs were looked at")
    settings = {"jax_compilation_cache_dir": str(folder)}
    settings |= {"jax_persistent_cache_min_compile_time_secs": 0.0}  # the small ones too
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # another run's, in one process
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if jax.process_index() == 0:
            unfinished.unlink(missing_ok=True)


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

    def compile(self) -> None:
        """Compiles both steps, so that what doesn't fit is known before the first."""
        _ = self.train_step, self.eval_step

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
