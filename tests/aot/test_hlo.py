"""Parsing the text of compiled programs."""

import textwrap

import pytest

from vit_jax.aot import hlo
from vit_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, ", [0, 2]),
        ("replica_groups=[2,4]<=[8], ", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), ", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, ", [0, 1, 4, 5]),
        ("source_target_pairs={{0,4},{4,0}}, ", [0, 4]),
        ("replica_groups={}, ", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_device_groups_are_read_from_every_notation(text, expected):
    assert hlo.device_group(text, 8) == expected


LOOP = """\
    HloModule loop

    %condition (p: (s32[], f32[4])) -> pred[] {
      %p = (s32[], f32[4]{0}) parameter(0)
      %i = s32[] get-tuple-element(%p), index=0
      %limit = s32[] constant(12)
      ROOT %less = pred[] compare(%i, %limit), direction=LT
    }

    %body (q: (s32[], f32[4])) -> (s32[], f32[4]) {
      %q = (s32[], f32[4]{0}) parameter(0)
      %j = s32[] get-tuple-element(%q), index=0
      %step = s32[] constant(3)
      %next = s32[] INCREMENT(%j, %step)
      %x = f32[4]{0} get-tuple-element(%q), index=1
      ROOT %result = (s32[], f32[4]{0}) tuple(%next, %x)
    }

    ENTRY %main (a: (s32[], f32[4])) -> (s32[], f32[4]) {
      %a = (s32[], f32[4]{0}) parameter(0)
      ROOT %loop = (s32[], f32[4]{0}) while(%a), condition=%condition, body=%body
    }
"""


def test_trip_count_is_read_from_the_loop_or_refused():
    text = textwrap.dedent(LOOP)
    module = hlo.Module(text.replace("INCREMENT", "add"))
    loop = module.computations[module.entry]["loop"]
    assert module.trip_count(loop) == 12 // 3
    module = hlo.Module(text.replace("INCREMENT", "multiply"))
    with pytest.raises(UserError, match="iterations of the loop loop can't be read"):
        module.trip_count(loop)
