"""A lower bound of the time that a compiled program takes on a GPU.

XLA's GPU compiler estimates no times. An operation takes at least as long as its matrix products at
the card's peak, and at least as long as its memory traffic at the card's bandwidth.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence

from vit_jax.aot import hlo_cost
from vit_jax.aot.gpu import Card
from vit_jax.aot.hlo import ARRAY_TYPE, Instruction, Module, array_shape
from vit_jax.errors import UserError

# Products of (L, L) with (L, d), or the like, for each head: cuDNN's backward pass computes the
# scores again.
NUM_ATTENTION_PRODUCTS = {"Softmax": 2, "SoftmaxBackward": 5}
# The operands and the result of a convolution's gradients, in the order input, window, output of
# the convolution that they are gradients of, whose attributes they have. -1: the result.
CONVOLUTIONS = {
    "convForward": (0, 1, -1),
    "convBiasActivationForward": (0, 1, -1),
    "convBackwardInput": (-1, 1, 0),
    "convBackwardFilter": (0, -1, 1),
}


def program_bound(
    module: Module, mesh_shape: dict[str, int], card: Card, host_of: Sequence[int] | None = None
) -> hlo_cost.Cost:
    """Returns what a program costs one GPU at least.

    Operations run one after another. Each takes the larger of its products' operations over the
    card's peak and its memory traffic over the card's bandwidth; collectives take no time.

    Args:
        module: the parsed program.
        mesh_shape: {axis: size}, with the devices in row-major order.
        card: the model of GPU.
        host_of: the host of each of these devices; None: all are in one.

    Raises:
        UserError: the program calls a library for something whose operations aren't known.
    """
    return BoundModel(module, mesh_shape, card, host_of).computation(module.entry)


class BoundModel(hlo_cost.CostModel):
    """Adds up the least times of a module's instructions."""

    def __init__(self, module: Module, mesh_shape: dict[str, int], card: Card, host_of=None):
        arguments = (1.0, lambda *_: 0.0, hlo_cost.no_kernels)
        super().__init__(module, mesh_shape, *arguments, host_of=host_of)
        self.card = card

    def add_operation(
        self, cost: hlo_cost.Cost, op: Instruction, instructions: dict, memory_bytes: int
    ) -> float:
        products = list(self.products(op, instructions))
        memory_bytes -= workspace_bytes(op)
        cost.flops += sum(flops for flops, _ in products)
        cost.memory_bytes += memory_bytes
        if is_collective(op, self.computations):
            return 0.0
        computing = sum(flops / self.card.flops[precision] for flops, precision in products)
        return max(computing, memory_bytes / self.card.memory_bandwidth)

    def products(self, op: Instruction, instructions: dict) -> Iterator[tuple[int, str]]:
        """Yields the operations and the precision of the matrix products of an instruction."""
        if op.opcode == "custom-call":
            if flops := library_flops(op, instructions):
                yield flops, precision(op, instructions)
        elif op.called:
            inner = self.computations[op.called]
            for part in inner.values():
                yield from self.products(part, inner)
        elif flops := hlo_cost.product_flops(op, instructions):
            yield flops, precision(op, instructions)


def workspace_bytes(op: Instruction) -> int:
    """Returns the bytes of a library call's workspace, which is the last of its results."""
    workspace = re.search(r", [su]8\[(\d+)\]\{0\}\)$", op.type)
    return int(workspace[1]) if op.opcode == "custom-call" and workspace else 0


def is_collective(op: Instruction, computations: dict) -> bool:
    """Whether an instruction is a collective, or starts one."""
    parts = computations[op.called].values() if op.opcode == "async-start" else [op]
    return any(
        part.opcode.removesuffix("-start").removesuffix("-done") in hlo_cost.COLLECTIVES
        for part in parts
    )


def precision(op: Instruction, instructions: dict) -> str:
    """Returns the precision of a matrix product: a key of `Card.flops`."""
    dtype = ARRAY_TYPE.search(instructions[op.operands[0]].type)[1]
    if dtype != "f32":
        return "bf16"
    # In the attributes of a product, or in the settings of cuBLAS.
    is_exact = re.search(r'operand_precision"?[=:][{\[]"?highest', op.text, re.IGNORECASE)
    return "f32" if is_exact else "tf32"


def library_flops(op: Instruction, instructions: dict) -> int:
    """Returns the operations of the matrix products that a call of cuBLAS or cuDNN does.

    Raises:
        UserError: a call of these that isn't known.
    """
    target = re.search(r'custom_call_target="([^"]*)"', op.text)[1]
    library, _, function = target.partition("$")
    shapes = [array_shape(instructions[name].type) for name in op.operands[:2]]
    shapes.append(array_shape(op.type))
    if library == "__cublas" and function in ("gemm", "lt$matmul"):
        left, _, result = shapes
        contracted = settings(op)["gemm_backend_config"]["dot_dimension_numbers"]
        contracted = contracted["lhs_contracting_dimensions"]
        return 2 * math.prod(result) * math.prod(left[int(axis)] for axis in contracted)
    if library == "__cudnn" and function in CONVOLUTIONS:
        return hlo_cost.convolution_flops(*(shapes[i] for i in CONVOLUTIONS[function]), op.text)
    kind = re.fullmatch(r"fmha(?:ScaleBias)?(Softmax(?:Backward)?)", function)
    if library == "__cudnn" and kind:
        scores = settings(op)["cudnn_fmha_backend_config"]["intermediate_tensor_shape"]
        elements = math.prod(map(int, scores["dimensions"]))  # (N, H, Lq, Lk)
        return NUM_ATTENTION_PRODUCTS[kind[1]] * 2 * elements * shapes[0][-1]
    if library in ("__cublas", "__cudnn"):
        raise UserError(
            f"The operations of {target} in the compiled program aren't known: use the versions of "
            "jax and cuDNN named in docs/pods.md"
        )
    return 0


def settings(op: Instruction) -> dict:
    """Returns a library call's settings, which XLA writes as JSON after its other attributes."""
    return json.JSONDecoder().raw_decode(op.text.partition("backend_config=")[2])[0]
