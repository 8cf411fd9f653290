"""What is checked before a run's first step."""

import types

import jax
import pytest

from vit_jax.errors import UserError
from vit_jax.parallel import distributed, memory
from vit_jax.training.program import (
    AUTO_REMAT,
    AUTO_REMAT_OF_SCAN,
    USABLE_SHARE,
    Program,
    program_bytes,
)


@pytest.mark.slow
def test_as_little_is_recomputed_as_fits(one_device, tiny_config):
    """remat="auto" keeps all activations, or those between blocks, and resumes with the same."""
    tiny_config.batch_size = 64
    tiny_config.model.update(depth=4, scan=True)
    sizes = {}
    for remat in AUTO_REMAT_OF_SCAN:
        tiny_config.model.remat = remat
        sizes[remat] = program_bytes(Program(tiny_config, (32, 32, 3), one_device).train_step)
    assert sizes["none"] > sizes["full"]
    tiny_config.model.remat = "auto"
    for remat, size in sizes.items():
        available = int(size / USABLE_SHARE) + 1
        program = Program(tiny_config, (32, 32, 3), one_device, memory_bytes=available)
        assert program.train_step is not None
        assert program.remat == remat
    program = Program(tiny_config, (32, 32, 3), one_device, memory_bytes=1000)
    assert program.train_step is not None  # `check_memory` refuses it
    assert program.remat == "full"
    tiny_config.model.scan = False
    for recorded, policies in (
        (None, AUTO_REMAT),
        ("none", AUTO_REMAT),
        ("full", ("full",)),
        ("dots_saveable", ("dots_saveable", "full")),
    ):
        program = Program(tiny_config, (32, 32, 3), one_device, recorded_remat=recorded)
        assert program.policies_to_try() == policies


def test_a_step_that_cannot_be_compiled_does_not_fit(one_device, tiny_config, monkeypatch):
    """Also if the device doesn't tell its memory."""

    def compile_train_step(remat):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    program = Program(tiny_config, (32, 32, 3), one_device)
    monkeypatch.setattr(program, "compile_train_step", compile_train_step)
    monkeypatch.setattr(memory, "bytes_per_device", lambda: None)
    assert program.compile_if_it_fits("none") is None


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
