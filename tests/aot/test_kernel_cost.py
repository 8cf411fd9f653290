"""The attention kernel's cost in a TPU's program; counting its schedule needs libtpu."""

import textwrap

import pytest

from vit_jax.aot import hlo, hlo_cost, kernel_cost
from vit_jax.aot.topology import Slice
from vit_jax.errors import UserError

# Of the program of a training step, shortened.
# ruff: noqa: E501
PROGRAM = textwrap.dedent("""\
    HloModule kernels

    ENTRY %main (q: bf16[64,197,768], k: bf16[64,197,768], v: bf16[64,197,768], m: f32[64,1,197]) -> bf16[64,197,768] {
      %q = bf16[64,197,768]{2,1,0} parameter(0)
      %k = bf16[64,197,768]{2,1,0} parameter(1)
      %v = bf16[64,197,768]{2,1,0} parameter(2)
      %m = f32[64,1,197]{2,1,0} parameter(3)
      %attention_forward.1 = (bf16[64,197,768]{2,1,0:T(8,128)(2,1)}, f32[64,1,12,197]{3,2,1,0:T(8,128)}) custom-call(%q, %k, %v), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x"}}
      %out = bf16[64,197,768]{2,1,0} get-tuple-element(%attention_forward.1), index=0
      %sums = f32[64,1,12,197]{3,2,1,0} get-tuple-element(%attention_forward.1), index=1
      %closed_call.2 = (bf16[64,197,768]{2,1,0}, bf16[64,197,768]{2,1,0}, bf16[64,197,768]{2,1,0}) custom-call(%q, %k, %v, %out, %out, %sums, %m), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/attention_backward/pallas_call"}
      ROOT %dq = bf16[64,197,768]{2,1,0} get-tuple-element(%closed_call.2), index=0
    }
""")


def kernels():
    instructions = hlo.Module(PROGRAM).computations["main"]
    found = [kernel_cost.find_kernel(op, instructions) for op in instructions.values()]
    return [kernel for kernel in found if kernel]


def test_kernels_are_found_in_a_program():
    forward, backward = kernels()
    shape = dict(num_images=64, length=197, width=768, num_heads=12, dtype="bfloat16")
    assert forward == kernel_cost.Kernel("attention_forward", **shape, has_mask=False)
    assert backward == kernel_cost.Kernel("attention_backward", **shape, has_mask=True)
    # Two products of the forward pass: 2 x 2 L^2 D for each image.
    assert kernel_cost.kernel_flops(forward) == 64 * 4 * 197**2 * 768
    assert kernel_cost.kernel_flops(backward) == 64 * 10 * 197**2 * 768


def test_kernels_count_in_a_program_s_cost():
    def cost(op, instructions, memory_bytes):
        return (1000, 7) if kernel_cost.find_kernel(op, instructions) else (0, 0)

    module = hlo.Module(PROGRAM)
    result = hlo_cost.program_cost(module, {"data": 1}, 1.0, lambda *_: 0.0, cost)
    assert (result.cycles, result.flops, result.seconds) == (2000, 14, 2000)


def test_an_unknown_kernel_is_not_free():
    text = PROGRAM.replace("attention_forward", "other_kernel")
    instructions = hlo.Module(text).computations["main"]
    with pytest.raises(UserError, match="kernel, other_kernel.1, whose cost isn't known"):
        kernel_cost.find_kernel(instructions["other_kernel.1"], instructions)


@pytest.mark.compiler
def test_a_kernel_takes_at_least_its_bundles_and_its_memory_traffic():
    forward, backward = kernels()
    tpu = Slice("v5e:2x2")
    bundles = kernel_cost.count_bundles("v5e:2x2", "bfloat16", 197, 768, 12, False)
    # The matrix unit alone needs 300 cycles for two heads.
    assert bundles["attention_forward"] > 6 * 300
    assert bundles["attention_backward"] > bundles["attention_forward"]
    cycles = kernel_cost.kernel_cycles(forward, 0, tpu)
    assert cycles == 10_000 + 64 * (bundles["attention_forward"] + 500)
    assert kernel_cost.kernel_cycles(backward, int(819e9), tpu) > tpu.chip.cycles_per_second
