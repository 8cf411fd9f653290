"""Self-attention on a TPU as one kernel: no scores in the chip's main memory.

A grid step computes all heads of one image, or some of them if there are many tokens. The scores of
one head fit the chip's vector memory (VMEM) whole, at the numbers of tokens that a ViT has, so that
no running softmax is needed (FlashAttention, arXiv:2205.14135, without its tiles). Queries, keys
and values are read as the projections leave them, (L, H * d), the heads side by side. To pick out a
head, its columns are the only ones in one operand of a product that aren't zero, and the product is
of the whole registers of 128 columns that hold them: the matrix unit contracts 128 numbers at once,
however many of them are zero.

The forward pass saves the logarithm of each softmax's denominator; the backward pass computes the
weights again from it. There the scores are transposed, (Lk, Lq), so that what belongs to a query
lies along the lanes: sums over keys are then sums of registers.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from vit_jax.parallel.mesh import AXES, BATCH

ATTENTION_OUTPUT = "attention_output"  # what `remat` policies call it
LANES = 128
MASKED = -1e30  # added to the scores of masked tokens; not infinite, whose differences are NaN
LARGEST_VMEM = 48 * 2**20  # of the 64 or 128 MiB that the served chips have
SCORES_PER_STEP = 2**20  # of several heads
MOST_SCORES = 2**22  # of several heads that can't be separated, or of a single one
SMALL_CHIPS = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")  # have 16 MiB


def problem(device, head_dim: int) -> str | None:
    """Returns why the kernel doesn't serve a device; or None."""
    if device.platform != "tpu":
        return f"needs a TPU, not {device.device_kind}"
    if device.device_kind in SMALL_CHIPS:
        return f"needs more vector memory than {device.device_kind} has"
    if head_dim % 8:
        return f"needs heads whose width is a multiple of 8, not {head_dim}"
    return None


def fits(length: int, width: int, num_heads: int, dtype) -> bool:
    """Whether the kernel serves so many tokens, on the mesh in use."""
    local_heads = heads_per_device(num_heads)
    if local_heads is None:
        return False
    width = width * local_heads // num_heads
    columns = columns_per_step(length, width, local_heads)
    scores = columns * local_heads // width * padded(length, 8) * padded(length, LANES)
    vmem = vmem_bytes(length, width, local_heads, dtype)
    return vmem <= LARGEST_VMEM and scores <= MOST_SCORES


def heads_per_device(num_heads: int) -> int | None:
    """Returns how many heads a device of the mesh in use computes; None if they can't be split."""
    mesh = jax.sharding.get_abstract_mesh()
    num_parts = mesh.shape["tensor"] if mesh.axis_names == AXES else 1
    return None if num_heads % num_parts else num_heads // num_parts


def vmem_bytes(length: int, width: int, num_heads: int, dtype) -> int:
    """Returns an estimate of the vector memory that a grid step of the backward pass needs."""
    rows, keys = padded(length, 16), padded(length, LANES)
    columns = padded(columns_per_step(length, width, num_heads), LANES)
    itemsize = jnp.dtype(dtype).itemsize
    arrays = 2 * 8 * rows * columns * itemsize  # double-buffered
    gradients = 2 * rows * columns * 4
    transposed = columns * keys * (4 + 4 + itemsize)
    scores = 8 * rows * keys * 4
    return max(arrays + gradients + transposed + scores, 16 * 2**20)


def attention(query, key, value, mask, num_heads: int, interpret: bool = False):
    """Returns scaled dot-product attention, (N, L, H * d), on the mesh in use, if there is one.

    Args:
        query, key, value: (N, L, H * d), of one type.
        mask: bool (N, L), False for tokens to ignore; or None. If all of an image's tokens are
            False, none is ignored.
        num_heads: H; on a mesh, a multiple of the size of its axis `tensor`.
        interpret: whether to run on any device, slowly, for tests.
    """
    bias = None
    if mask is not None:
        mask |= ~mask.any(axis=1, keepdims=True)
        bias = jnp.where(mask, 0.0, MASKED).astype(jnp.float32)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != AXES:
        return kernels(query, key, value, bias, num_heads, interpret)
    heads, local_heads = P(*BATCH, None, "tensor"), heads_per_device(num_heads)

    def on_device(*args):
        return kernels(*args, local_heads, interpret)

    in_specs = (heads, heads, heads, None if bias is None else P(*BATCH))
    sharded = jax.shard_map(
        on_device, mesh=mesh, in_specs=in_specs, out_specs=heads, check_vma=False
    )
    return sharded(query, key, value, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def kernels(query, key, value, bias, num_heads, interpret):
    return forward(query, key, value, bias, num_heads, interpret)[0]


def forward(query, key, value, bias, num_heads, interpret):
    n, length, width = query.shape
    columns = columns_per_step(length, width, num_heads)
    log_sums_shape = (n, width // columns, num_heads * columns // width, length)
    out, log_sums = call(
        attention_forward,
        (query, key, value),
        [] if bias is None else [bias[:, None, :]],  # (N, 1, Lk)
        [
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct(log_sums_shape, jnp.float32),
        ],
        num_heads,
        interpret,
    )
    out, log_sums = (checkpoint_name(array, ATTENTION_OUTPUT) for array in (out, log_sums))
    return out, (query, key, value, bias, out, log_sums)


def backward(num_heads, interpret, saved, d_out):
    query, key, value, bias, out, log_sums = saved
    gradients = call(
        attention_backward,
        (query, key, value, out, d_out, log_sums),
        [] if bias is None else [bias[:, :, None]],  # (N, Lk, 1)
        [jax.ShapeDtypeStruct(query.shape, query.dtype)] * 3,
        num_heads,
        interpret,
    )
    return (*gradients, None if bias is None else jnp.zeros_like(bias))


kernels.defvjp(forward, backward)


def call(kernel, inputs, bias, outputs, num_heads: int, interpret: bool):
    """Runs a kernel once for each image and each group of heads.

    Args:
        kernel: called with a reference to the step's part of each array, and with `head_dim`.
        inputs: arrays (N, L, H * d), or (N, groups, heads per group, L).
        bias: [] or [the bias]; each step gets an image's whole bias.
        outputs: shapes like those of `inputs`.
    """
    n, length, width = inputs[0].shape
    columns = columns_per_step(length, width, num_heads)

    def block(array):
        if array.ndim == 4:
            return pl.BlockSpec((None, None, *array.shape[2:]), lambda i, j: (i, j, 0, 0))
        return pl.BlockSpec((None, length, columns), lambda i, j: (i, 0, j))

    bias_blocks = [pl.BlockSpec((None, *array.shape[1:]), lambda i, j: (i, 0, 0)) for array in bias]
    limit = vmem_bytes(length, width, num_heads, inputs[0].dtype)
    return pl.pallas_call(
        functools.partial(kernel, head_dim=width // num_heads),
        grid=(n, width // columns),
        in_specs=[block(array) for array in inputs] + bias_blocks,
        out_specs=[block(array) for array in outputs],
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=limit
        ),
        interpret=interpret,
        name=kernel.__name__,
    )(*inputs, *bias)


def columns_per_step(length: int, width: int, num_heads: int) -> int:
    """Returns the columns of the heads that a grid step computes.

    Its code, which has no loops, grows with the heads and with the square of the tokens. Groups of
    heads begin and end where registers do; if they can't, all heads are one group.
    """
    head_dim = width // num_heads
    smallest = math.lcm(head_dim, LANES)
    if width % smallest:
        return width
    scores = padded(length, 8) * padded(length, LANES)
    groups = [n * smallest for n in range(1, width // smallest + 1) if width // smallest % n == 0]
    return max(
        (columns for columns in groups if columns // head_dim * scores <= SCORES_PER_STEP),
        default=smallest,
    )


def padded(size: int, multiple: int) -> int:
    """Rounds a size up to a multiple."""
    return -(-size // multiple) * multiple


def attention_forward(q_ref, k_ref, v_ref, *refs, head_dim: int):
    """Computes the output (L, H * d) and the log-sum-exp of the scores (H, L)."""
    *bias_ref, out_ref, log_sums_ref = refs
    width = q_ref.shape[1]
    out, log_sums = Columns(width), []
    for head in Head.all(head_dim, width):
        k, v = k_ref[:, head.window], v_ref[:, head.window]
        scores = dot(head.only(q_ref[:, head.window]), k, 1, 1) * head_dim**-0.5  # (Lq, Lk)
        if bias_ref:
            scores += bias_ref[0][...]
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        out.set(head, dot(weights.astype(v.dtype), v, 1, 0) / total)
        log_sums.append(largest + jnp.log(total))  # (Lq, 1)
    out.write(out_ref)
    log_sums_ref[...] = jnp.concatenate(log_sums, axis=1).T


def attention_backward(q_ref, k_ref, v_ref, out_ref, d_out_ref, log_sums_ref, *refs, head_dim: int):
    """Computes the gradients of queries, keys and values, each (L, H * d)."""
    *bias_ref, dq_ref, dk_ref, dv_ref = refs
    width, dtype, scale = q_ref.shape[1], q_ref.dtype, head_dim**-0.5
    k_rows = k_ref[...].T  # (H * d, Lk)
    product = d_out_ref[...].astype(jnp.float32) * out_ref[...].astype(jnp.float32)
    product = product.T  # (H * d, Lq)
    dq_rows, dk, dv = [], Columns(width), Columns(width)
    for head in Head.all(head_dim, width):
        q, d_out = q_ref[:, head.window], d_out_ref[:, head.window]
        scores = dot(head.only(k_ref[:, head.window]), q, 1, 1) * scale  # (Lk, Lq)
        if bias_ref:
            scores += bias_ref[0][...]
        weights = jnp.exp(scores - log_sums_ref[head.index : head.index + 1])
        delta = product[head.columns].sum(0, keepdims=True)  # (1, Lq)
        d_weights = dot(head.only(v_ref[:, head.window]), d_out, 1, 1)
        d_scores = (weights * (d_weights - delta) * scale).astype(dtype)
        dv.set(head, dot(weights.astype(dtype), d_out, 1, 0))
        dk.set(head, dot(d_scores, q, 1, 0))
        dq_rows.append(dot(k_rows[head.columns], d_scores, 1, 0))  # (d, Lq)
    dq_ref[...] = jnp.concatenate(dq_rows).T.astype(dtype)
    dk.write(dk_ref)
    dv.write(dv_ref)


class Head:
    """A head's columns, and its window: the columns of the registers that hold them."""

    def __init__(self, index: int, head_dim: int, width: int):
        self.index = index
        self.columns = slice(index * head_dim, (index + 1) * head_dim)
        first = self.columns.start // LANES * LANES
        self.window = slice(first, min(padded(self.columns.stop, LANES), width))

    @classmethod
    def all(cls, head_dim: int, width: int):
        return [cls(index, head_dim, width) for index in range(width // head_dim)]

    def lanes(self, first: int, last: int):
        """Which of the columns first .. last - 1 are the head's, bool (1, last - first)."""
        column = first + jax.lax.broadcasted_iota(jnp.int32, (1, last - first), 1)
        return (column >= self.columns.start) & (column < self.columns.stop)

    def only(self, x):
        """Sets the columns of other heads in a window (L, lanes) to zero."""
        if self.window == self.columns:
            return x
        return jnp.where(self.lanes(self.window.start, self.window.stop), x, jnp.zeros_like(x))


class Columns:
    """An array (L, H * d) that is put together register by register, each from its heads."""

    def __init__(self, width: int):
        self.width = width
        self.tiles = {}

    def set(self, head: Head, values):
        """Sets a head's columns; `values` is (L, lanes) of its window."""
        for first in range(head.window.start, head.window.stop, LANES):
            last = min(first + LANES, self.width)
            part = values[:, first - head.window.start : last - head.window.start]
            if first in self.tiles:
                part = jnp.where(head.lanes(first, last), part, self.tiles[first])
            self.tiles[first] = part

    def write(self, ref):
        for first, tile in self.tiles.items():
            ref[:, first : first + LANES] = tile.astype(ref.dtype)


def dot(a, b, axis_of_a: int, axis_of_b: int):
    """Contracts an axis of one matrix with an axis of another, and accumulates in float32."""
    dimensions = (((axis_of_a,), (axis_of_b,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )
