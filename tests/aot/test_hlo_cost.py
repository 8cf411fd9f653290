"""The estimated cost of programs whose cost is known."""

import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.aot import hlo, hlo_cost
from vit_jax.parallel import mesh as meshes
from vit_jax.parallel import sharding


def cost(text, mesh_shape, wire_seconds=lambda *_: 0.0, **options):
    """Returns the cost to a device that runs one cycle per second."""
    return hlo_cost.program_cost(hlo.Module(text), mesh_shape, 1.0, wire_seconds, **options)


def test_loop_of_sharded_products():
    """Six times (8, 32) @ (32, 16) @ (16, 32), with each matrix split over devices."""
    mesh = meshes.create_mesh(data=1, fsdp=2, tensor=4)

    def sharded(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    def function(x, up, down):
        def body(x, _):
            return jnp.tanh(x @ up) @ down, None

        return jax.lax.scan(body, x, length=6)[0]

    x, up, down = (8, 32), (32, 16), (16, 32)
    compiled = sharding.compile_for_shapes(
        function, sharded(x, "fsdp"), sharded(up, None, "tensor"), sharded(down, "tensor")
    )
    result = cost(compiled.as_text(), dict(mesh.shape))
    assert result.flops == 6 * 2 * (2 * 8 * 32 * 16) / 8
    # Inside the loop, the second product is summed over the four devices of `tensor`.
    (((kind, axes, _), (count, sent)),) = result.collectives.items()
    assert (kind, axes, count) == ("all-reduce", ("tensor",), 6)
    assert sent == 6 * 2 * 3 / 4 * (4 * 32 * 4)


# ruff: noqa: E501
SCHEDULE = """\
    HloModule schedule

    %begin (p: f32[4]) -> (f32[4], f32[8]) {
      %p = f32[4]{0} parameter(0)
      %gather.1 = f32[8]{0} all-gather(%p), channel_id=1, replica_groups={{0,1}}, dimensions={0}
      ROOT %c = (f32[4]{0}, f32[8]{0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
    }

    %overlap (q: f32[4]) -> f32[8] {
      %q = f32[4]{0} parameter(0)
      ROOT %gather.2 = f32[8]{0} all-gather(%q), channel_id=1, replica_groups={{0,1}}, dimensions={0}
    }

    %end (r: f32[4]) -> f32[8] {
      %r = f32[4]{0} parameter(0)
      %gather.3 = f32[8]{0} all-gather(%r), channel_id=1, replica_groups={{0,1}}, dimensions={0}
      ROOT %d = f32[8]{0} custom-call(%gather.3), custom_call_target="AsyncCollectiveDone"
    }

    ENTRY %main (x: f32[4]) -> f32[8] {
      %x = f32[4]{0} parameter(0)
      %start = (f32[4]{0}, f32[8]{0}) fusion(%x), kind=kCustom, calls=%begin
      %work = f32[8]{0} fusion(%x), kind=kOutput, calls=%overlap, backend_config={"estimated_cycles":"CYCLES"}
      %done = f32[8]{0:S(1)} fusion(%x), kind=kCustom, calls=%end
      ROOT %sum = f32[8]{0} all-reduce(%done), channel_id=2, replica_groups={{0,1}}, to_apply=%begin
    }
"""


@pytest.mark.parametrize(("cycles", "seconds"), [(3, 10 + 5), (30, 30 + 5)])
def test_collectives_that_overlap_with_computation(cycles, seconds):
    """An all-gather of 10 s overlaps with `cycles` of work; an all-reduce of 5 s follows both."""
    text = textwrap.dedent(SCHEDULE).replace("CYCLES", str(cycles))
    wire_seconds = {"all-gather": 10.0, "all-reduce": 5.0}
    result = cost(text, {"fsdp": 2}, lambda opcode, *_: wire_seconds[opcode])
    assert result.collectives == {
        ("all-gather", ("fsdp",), False): [1, 4 * 4],
        ("all-reduce", ("fsdp",), False): [1, 8 * 4],
    }
    assert (result.cycles, result.wire_seconds, result.seconds) == (cycles, 15.0, seconds)


# What the compiler makes of the gradient of parameters that FSDP splits, on two slices of 2x2: it is
# summed inside each slice, and then over the slices by their hosts, in ATTRIBUTES.
TWO_SLICES = """\
    HloModule two_slices

    ENTRY %main (x: f32[8]) -> f32[4] {
      %x = f32[8]{0} parameter(0)
      %token = token[] after-all()
      %part = f32[4]{0} reduce-scatter(%x), channel_id=4, replica_groups={{0,2},{1,3}}, dimensions={0}, to_apply=%other
      %send = (f32[4]{0}, u32[]{:S(2)}, token[]) send(%part, %token), channel_id=4, ATTRIBUTES
      %recv = (f32[4]{0}, u32[]{:S(2)}, token[]) recv(%token), channel_id=1, ATTRIBUTES
      %sent = token[] send-done(%send), channel_id=4, is_host_transfer=true
      %work = f32[4]{0} fusion(%x), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"CYCLES"}
      %gather = f32[8]{0} all-gather(%part), channel_id=5, replica_groups={{0,1},{2,3}}, dimensions={0}
      %done = (f32[4]{0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
      ROOT %sum = f32[4]{0} get-tuple-element(%done), index=0
    }

    %other (p: f32[8]) -> f32[4] {
      %p = f32[8]{0} parameter(0)
      ROOT %s = f32[4]{0} slice(%p), slice={[0:4]}
    }
"""
HOST_TRANSFER = (
    'is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
)


@pytest.mark.parametrize(("cycles", "seconds"), [(3, 2 + 10), (30, 2 + 30 + 2)])
def test_collectives_between_slices(cycles, seconds):
    """One of 10 s overlaps with work and with collectives inside a slice, of 2 s each."""
    text = textwrap.dedent(TWO_SLICES).replace("ATTRIBUTES", HOST_TRANSFER)
    text = text.replace("CYCLES", str(cycles))
    seconds_by_link = {True: 10.0, False: 2.0}
    result = cost(
        text,
        {"data": 4, "fsdp": 2, "tensor": 1},
        lambda opcode, axes, bytes_sent, crosses: seconds_by_link[crosses],
        num_slices=2,
    )
    assert result.collectives == {
        ("reduce-scatter", ("data",), False): [1, 8 * 4 // 2],
        ("all-reduce", ("data",), True): [1, 4 * 4],
        ("all-gather", ("fsdp",), False): [1, 4 * 4],
    }
    assert (result.wire_seconds, result.seconds) == (14.0, seconds)


def test_memory_traffic_of_slices_and_of_on_chip_memory():
    """Arrays in on-chip memory, S(1), don't count; an array read in slices counts as the slice."""
    text = textwrap.dedent("""\
        HloModule memory

        %slice (p: f32[6,8], i: s32[]) -> f32[1,8] {
          %p = f32[6,8]{1,0} parameter(0)
          %i = s32[] parameter(1)
          ROOT %s = f32[1,8]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,8}
        }

        ENTRY %main (x: f32[6,8], n: s32[]) -> f32[1,8] {
          %x = f32[6,8]{1,0} parameter(0)
          %n = s32[]{:S(6)} parameter(1)
          %row = f32[1,8]{1,0:T(8,128)S(1)} fusion(%x, %n), kind=kLoop, calls=%slice
          ROOT %y = f32[1,8]{1,0} negate(%row)
        }
    """)
    assert cost(text, {"data": 1}).memory_bytes == 8 * 4 + 8 * 4


def test_products_written_as_convolutions():
    """As in TPU programs. Padding and dilation don't count."""
    for left, right, result, text, expected in (
        # Patches: (32, 224, 224, 3) in 14 x 14 -> (32, 16, 16, 80)
        (
            "bf16[32,224,224,3]{3,2,1,0}",
            "bf16[14,14,3,80]{3,2,1,0}",
            "bf16[32,16,16,80]{3,2,1,0}",
            "window={size=14x14 stride=14x14}, dim_labels=b01f_01io->b01f",
            2 * 32 * 16 * 16 * 80 * 14 * 14 * 3,
        ),
        # One product for each of 4 heads: every position of the window meets a single head.
        (
            "bf16[4,8,5]{2,1,0}",
            "bf16[4,8,6]{2,1,0}",
            "bf16[4,5,6]{2,1,0}",
            "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0fb_0io->0bf",
            2 * 4 * 5 * 6 * 8,
        ),
    ):
        entry = textwrap.dedent(f"""\
            HloModule products

            ENTRY %main (a: x, b: x) -> x {{
              %a = {left} parameter(0)
              %b = {right} parameter(1)
              ROOT %c = {result} convolution(%a, %b), {text}
            }}
        """)
        assert cost(entry, {"data": 1}).flops == expected
