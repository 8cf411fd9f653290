"""What a run computes: model, optimizer and compiled steps, for any mesh."""

import functools
import math

import jax

from vit_jax import models, objectives
from vit_jax.errors import UserError
from vit_jax.models import attention
from vit_jax.parallel import distributed, memory, sharding
from vit_jax.parallel import mesh as meshes
from vit_jax.training import optim, steps, train_state

# Values of the model's field `remat`, the fastest first, that "auto" tries. With `scan`, keeping
# more is slower by the TPU compiler's estimate.
AUTO_REMAT = ("none", "dots_and_attention", "full")
AUTO_REMAT_OF_SCAN = ("none", "full")
USABLE_SHARE = 0.95  # of a device's memory; the rest is for batches in flight


class Program:
    """A run's model, optimizer and steps, compiled when first used.

    The mesh may have this machine's devices, or devices that are only described (`vit_jax/aot`).

    Attributes:
        model: the VisionTransformer.
        attention: how its attention is computed on the mesh, in words.
        remat: what the training step recomputes; not "auto" once the step is compiled.
        tx: the optax transformation.
        learning_rate: step -> learning rate.
        init: () -> the initial TrainState, on the mesh.
        shapes: the state's shapes with shardings, which a checkpoint is restored to.
    """

    def __init__(
        self,
        config,
        image_shape: tuple[int, int, int],
        mesh,
        *,
        memory_bytes: int | None = None,
        recorded_remat: str | None = None,
    ):
        """Creates the model and the optimizer; compiles nothing.

        Args:
            config: a run's configuration, resolved.
            image_shape: (H, W, C).
            mesh: the mesh to compile for.
            memory_bytes: the memory of one of its devices; None: that of this machine's.
            recorded_remat: what the run that is resumed recomputed; with `remat="auto"` it goes on
                with it if that fits, to the same bits.

        Raises:
            UserError: invalid fields of the model or the optimizer.
        """
        self.config, self.image_shape, self.mesh = config, image_shape, mesh
        self.memory_bytes, self.recorded_remat = memory_bytes, recorded_remat
        model = models.from_config(config)
        impl = attention.resolve(model, mesh.devices.flat[0])
        self.model = model.clone(attention_impl=impl)
        self.attention = attention.describe(model, impl, model.num_tokens(image_shape))
        self.remat = model.remat
        module = objectives.trained_module(self.model, config)
        params = jax.eval_shape(lambda: train_state.init_params(module, image_shape, config.seed))
        self.tx, self.learning_rate = optim.create(config, params, config.total_steps)
        self.init, self.shapes = train_state.initializer(module, self.tx, image_shape, config, mesh)

    @functools.cached_property
    def train_step(self):
        """The compiled training step, see `steps.make_train_step`."""
        if self.model.remat == "auto":
            *policies, self.remat = self.policies_to_try()
            for remat in policies:
                if (compiled := self.compile_if_it_fits(remat)) is not None:
                    self.remat = remat
                    return compiled
        return self.compile_train_step(self.remat)

    def policies_to_try(self) -> tuple[str, ...]:
        """Returns the values of `remat` that "auto" may mean, in the order to try them."""
        policies = AUTO_REMAT_OF_SCAN if self.model.scan else AUTO_REMAT
        if self.recorded_remat in (None, "auto"):
            return policies
        if self.recorded_remat in policies:
            return policies[policies.index(self.recorded_remat) :]
        return self.recorded_remat, policies[-1]

    def compile_train_step(self, remat: str):
        """Compiles the training step with a value of the model's field `remat`."""
        model = self.model.clone(remat=remat)
        step = steps.make_train_step(model, self.tx, self.learning_rate, self.config)
        return sharding.compile_train_step(step, self.shapes, self.batch_shapes)

    def compile_if_it_fits(self, remat: str):
        """Returns the compiled training step; None if it needs more memory than a device has."""
        try:
            compiled = self.compile_train_step(remat)
            needed = program_bytes(compiled)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            compiled, needed = None, math.inf
        available = self.memory_bytes or memory.bytes_per_device()
        exceeds = compiled is None
        exceeds |= available is not None and needed > USABLE_SHARE * available
        # All processes must run the same program.
        return None if distributed.any_process(exceeds) else compiled

    @functools.cached_property
    def eval_step(self):
        """The compiled evaluation step, see `steps.make_eval_step`."""
        step = steps.make_eval_step(self.model, self.config)
        batch = sharding.batch_shapes(
            self.eval_batch_size, self.image_shape, self.mesh, for_evaluation=True
        )
        return sharding.compile_for_shapes(step, self.shapes.eval_params, batch)

    def compile(self) -> None:
        """Compiles both steps now: an out-of-memory error is raised before the first step."""
        _ = self.train_step, self.eval_step

    def check_memory(self) -> None:
        """Raises UserError if this machine's devices have less memory than the steps need.

        The compiler tells how much they need.
        """
        state, available = sharding.num_bytes_on_device(self.shapes), memory.bytes_per_device()
        temporaries = max(
            compiled.memory_analysis().temp_size_in_bytes
            for compiled in (self.train_step, self.eval_step)
        )
        exceeds = available is not None and state + temporaries > available
        if not distributed.any_process(exceeds):  # all raise, or none: none waits for the others
            return
        if not exceeds:
            raise UserError("Another process has less memory than the run needs; see its message")
        remedy = (
            f"raise config.accum_steps (now {self.config.accum_steps}) or lower config.batch_size, "
            "in a new run, or use more devices"
        )
        if state > available:
            remedy = "use a smaller model, or spread it over more devices with config.mesh.fsdp"
        gibibyte = 2**30
        raise UserError(
            f"The run needs {state / gibibyte:,.1f} GiB of state and {temporaries / gibibyte:,.1f} "
            f"GiB of temporaries per device, which has {available / gibibyte:,.1f} GiB: {remedy}"
        )

    @property
    def batch_shapes(self) -> dict:
        """The shapes of a global training batch."""
        return sharding.batch_shapes(self.config.batch_size, self.image_shape, self.mesh)

    @property
    def eval_batch_size(self) -> int:
        """The global batch size of evaluation."""
        return eval_batch_size(self.config, self.mesh)


def program_bytes(compiled) -> int:
    """Returns the bytes per device that a compiled function needs, with its arguments."""
    sizes = compiled.memory_analysis()
    # Outputs that reuse the memory of a donated argument don't count.
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    inputs = sizes.argument_size_in_bytes + sizes.generated_code_size_in_bytes
    return inputs + sizes.temp_size_in_bytes + outputs


def eval_batch_size(config, mesh) -> int:
    """Returns the training microbatch size, rounded up to a multiple of the number of shards."""
    shards = meshes.num_shards(mesh)
    return -(-config.batch_size // (config.accum_steps * shards)) * shards
