"""What is checked before a run's first step."""

import types

import pytest

from vit_jax.errors import UserError
from vit_jax.parallel import distributed, memory
from vit_jax.training.program import Program


def test_a_run_that_needs_more_memory_than_there_is_is_refused(
    one_device, tiny_config, monkeypatch
):
    program = Program(tiny_config, (32, 32, 3), one_device)
    for name, size in (("train_step", 3 * 2**30), ("eval_step", 2**30)):
        analysis = types.SimpleNamespace(temp_size_in_bytes=size)
        step = types.SimpleNamespace(memory_analysis=lambda analysis=analysis: analysis)
        vars(program)[name] = step  # instead of compiling
    for available, message in (
        (None, None),
        (4 * 2**30, None),
        (3 * 2**30, r"3\.0 GiB of temporaries .* 3\.0 GiB: raise config.accum_steps \(now 1\)"),
        (2**10, "a smaller model, or .*config.mesh.fsdp"),
    ):
        monkeypatch.setattr(memory, "bytes_per_device", lambda available=available: available)
        if message is None:
            program.check_memory()
        else:
            with pytest.raises(UserError, match=message):
                program.check_memory()
    monkeypatch.setattr(memory, "bytes_per_device", lambda: 4 * 2**30)
    monkeypatch.setattr(distributed, "any_process", lambda exceeds: True)
    with pytest.raises(UserError, match="Another process has less memory than the run needs"):
        program.check_memory()
