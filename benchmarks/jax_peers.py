"""The training steps in JAX that `train_step.py` measures."""

import time

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from benchmarks import textbook_vit
from benchmarks.peers import (
    CLIP_NORM,
    LEARNING_RATE,
    NUM_CLASSES,
    WEIGHT_DECAY,
    Settings,
    fields,
    random_batch,
)
from configs import common
from vit_jax.parallel import sharding
from vit_jax.parallel.mesh import create_mesh
from vit_jax.scaling import flops
from vit_jax.training import augment, losses
from vit_jax.training.program import Program


class JaxPeer:
    """A model in JAX.

    Attributes:
        compile_seconds: how long it took to trace and compile the whole step.
        num_params: the number of parameters.
    """

    def __init__(self, init, shapes, loss, compile_step, batch, compile_function):
        """Compiles the step and makes the state.

        Args:
            init: () -> the state: an object with `params`.
            shapes: the state's shapes.
            loss: (params, batch) -> the mean loss.
            compile_step: () -> the compiled function (state, batch) -> (state, metrics).
            batch: `images` and `labels`, on the device.
            compile_function: (function, *shapes) -> the compiled function.
        """
        start = time.perf_counter()
        self.compiled = {"step": compile_step()}
        self.compile_seconds = time.perf_counter() - start
        self.num_params = flops.num_params(shapes.params)
        self.state, self.batch = init(), batch
        functions = {
            "forward": lambda state, batch: loss(state.params, batch),
            "gradients": lambda state, batch: jax.grad(loss)(state.params, batch),
        }
        for part, function in functions.items():
            self.compiled[part] = compile_function(function, shapes, batch)

    def run(self, part: str, steps: int) -> None:
        """Runs a part of the step so many times, and waits until it is done."""
        function = self.compiled[part]
        for _ in range(steps):
            results = function(self.state, self.batch)
            if part == "step":  # the old state's memory was given away
                self.state, results = results
        jax.block_until_ready((self.state, results))

    def peak_bytes(self) -> int:
        """Returns the most memory in use so far; on a CPU, what the compiled step needs."""
        if stats := jax.devices()[0].memory_stats():
            return stats["peak_bytes_in_use"]
        memory = self.compiled["step"].memory_analysis()
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs


def ours(settings: Settings, attention_impl: str = "auto") -> JaxPeer:
    """train.py's own program, its blocks neither scanned nor rematerialized."""
    config = common.imagenet(settings.model, common.imagenet_options(None))
    config.update(image_size=settings.image_size, batch_size=settings.batch_size)
    config.update(dtype=settings.dtype, num_classes=NUM_CLASSES, grad_clip_norm=CLIP_NORM)
    config.total_steps = 100_000
    config.optimizer.update(name="adamw", mu_dtype="float32", weight_decay=WEIGHT_DECAY)
    config.schedule.base_lr = LEARNING_RATE
    config.model.update(attention_impl=attention_impl, remat="none")
    mesh = create_mesh(devices=jax.devices()[:1])
    program = Program(config, (settings.image_size, settings.image_size, 3), mesh)
    loss_fn = losses.create(config.loss).function

    def loss(params, batch):
        images, targets = augment.train_inputs(
            batch["images"], batch["labels"], jax.random.key(0), NUM_CLASSES, config.augment
        )
        logits = program.model.apply({"params": params}, images, train=True)
        return loss_fn(logits, targets).mean()

    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.batch_shapes)
    return JaxPeer(
        init=program.init,
        shapes=program.shapes,
        loss=loss,
        compile_step=lambda: program.train_step,
        batch=jax.device_put(random_batch(settings), shardings),
        compile_function=sharding.compile_for_shapes,
    )


def textbook(settings: Settings) -> JaxPeer:
    """The model of `textbook_vit.py`."""
    if settings.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "float32")  # no TF32, as in ours
    model = textbook_vit.ViT(NUM_CLASSES, **fields(settings), dtype=settings.dtype)
    tx = textbook_vit.optimizer(LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM)
    batch = jax.device_put(random_batch(settings))

    @jax.jit
    def init():
        params = model.init(jax.random.key(0), jnp.zeros((1, *batch["images"].shape[1:])))["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def loss(params, batch):
        return textbook_vit.loss(model, params, batch["images"], batch["labels"])

    def step(state, batch):
        return textbook_vit.train_step(model, state, batch["images"], batch["labels"])

    def compile_function(function, *shapes, **options):
        return jax.jit(function, **options).lower(*shapes).compile()

    shapes = jax.eval_shape(init)
    return JaxPeer(
        init=init,
        shapes=shapes,
        loss=loss,
        compile_step=lambda: compile_function(step, shapes, batch, donate_argnums=0),
        batch=batch,
        compile_function=compile_function,
    )
