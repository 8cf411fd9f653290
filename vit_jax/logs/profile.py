"""Traces some steps of a run with JAX's profiler: `train.py --profile=FIRST:LAST`."""

import logging
import re
import shlex

import jax

from vit_jax.errors import UserError, first_line
from vit_jax.storage.mirror import Mirror

logger = logging.getLogger("vit_jax")


def parse_steps(text: str) -> range:
    """Returns the steps of FIRST:LAST, such as "10:15", both included; steps count from 1.

    Raises:
        ValueError: the text is anything else.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(match[1]), int(match[2]) + 1) if match else range(0)
    if not steps or steps[0] < 1:
        raise ValueError("it must be FIRST:LAST, two steps from 1 on, such as 10:15")
    return steps


def check(steps: range | None, total_steps: int) -> None:
    """Raises UserError if a run doesn't have all the steps to trace."""
    if steps and steps[-1] > total_steps:
        raise UserError(
            f"--profile is {steps[0]}:{steps[-1]}, but the run has {total_steps:,} steps: the last "
            f"step to trace must be at most {total_steps}"
        )


class Profile:
    """Writes a trace of some steps to <workdir>/profile, each process to a folder of its own.

    The device finishes its work before the trace starts and before it ends: the trace has these
    steps and no others. If it can't be written, that is logged and the run goes on.
    """

    def __init__(self, files: Mirror, steps: range | None, first_step: int):
        """Prepares a trace.

        Args:
            files: the run's folder.
            steps: the steps to trace; None: none.
            first_step: the step that the run starts or resumes at.
        """
        self.folder, self.remote = files.folder / "profile", files.remote / "profile"
        self.steps = range(max(steps[0], first_step + 1), steps[-1] + 1) if steps else range(0)
        self.step_event = None  # of the step being taken, while the trace is on
        if steps and not self.steps:
            logger.warning(
                f"No trace is written: the run resumes at step {first_step:,}, and --profile="
                f"{steps[0]}:{steps[-1]} is of earlier steps"
            )

    def before(self, step: int, state) -> None:
        """Starts the trace if `step`, about to be taken from `state`, is the first to trace."""
        if step not in self.steps:
            return
        if step == self.steps[0]:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # 1 records every call of a Python function
            folder = self.folder / f"process_{jax.process_index()}"
            try:
                jax.profiler.start_trace(
                    folder, create_perfetto_trace=True, profiler_options=options
                )
            except (OSError, RuntimeError, ValueError) as error:
                logger.error(f"No trace is written: {first_line(error)}")
                self.steps = range(0)
                return
        self.step_event = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self.step_event.__enter__()

    def after(self, step: int, state) -> None:
        """Ends the trace if `step`, which led to `state`, is the last to trace."""
        if step not in self.steps:
            return
        self.step_event.__exit__(None, None, None)
        if step == self.steps[-1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes the trace, if one was started; of fewer steps if the run stops before the last."""
        if self.step_event is None:
            return
        self.step_event = None
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError, ValueError) as error:
            logger.error(f"The trace can't be written to {self.remote}: {first_line(error)}")
            return
        logger.info(
            f"Trace of the steps from {self.steps[0]:,} on written. To open it: pip install xprof, "
            f"then xprof --logdir {shlex.quote(str(self.remote))}; or load its "
            "perfetto_trace.json.gz at https://ui.perfetto.dev"
        )
