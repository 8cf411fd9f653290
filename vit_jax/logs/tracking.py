"""A run's metrics on Weights & Biases, if `config.wandb` names a project."""

import importlib.util
import logging
import pathlib
import secrets

import jax

from vit_jax.errors import UserError, first_line
from vit_jax.storage.files import write_atomically
from vit_jax.storage.mirror import Mirror

logger = logging.getLogger("vit_jax")


def check(config) -> None:
    """Raises UserError if `config.wandb` is set and the package isn't installed."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config.wandb is {config.wandb!r}, and the package isn't installed: pip install wandb"
        )


STEP = "global_step"


class Tracking:
    """Sends what TensorBoard gets to a run of Weights & Biases too.

    A resumed run goes on with the same run there, whose id is in <workdir>/wandb_id; rows that it
    repeats have the same numbers. With WANDB_MODE=offline in the environment, everything stays in
    <workdir>/wandb, for `wandb sync`.
    """

    def __init__(self, files: Mirror, first_step: int, config):
        """Starts, or resumes, the run of a folder.

        Args:
            files: the run's folder.
            first_step: the step that the run starts or resumes at.
            config: the run's configuration; `config.wandb` is the project.

        Raises:
            UserError: a new run of one process, and Weights & Biases refuses or can't be reached.
        """
        import wandb

        folder = files.folder
        try:
            self.run = wandb.init(
                project=config.wandb,
                dir=folder,
                id=run_id(folder, is_new=first_step == 0),
                name=files.remote.name,
                resume="allow",
                config=config.to_dict(),
                settings=wandb.Settings(console="off", silent=True),
            )
            self.run.define_metric("*", step_metric=STEP)
        except Exception as error:  # of many kinds
            problem = (
                f"config.wandb is {config.wandb!r}, but Weights & Biases can't be used "
                f"({first_line(error)}): run `wandb login`, or set WANDB_MODE=offline"
            )
            if first_step == 0 and jax.process_count() == 1:
                raise UserError(problem) from None
            self.run = None
            logger.error(problem)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Sends values of a step; an error ends the tracking, not the run."""
        self.call(lambda run: run.log({STEP: step, **values}))

    def close(self) -> None:
        """Sends what is left."""
        self.call(lambda run: run.finish())

    def call(self, action) -> None:
        if self.run is None:
            return
        try:
            action(self.run)
        except Exception as error:  # of many kinds
            self.run = None
            logger.error(
                f"Weights & Biases can't be reached ({first_line(error)}): its curves end here. "
                "The run continues, and metrics.jsonl has all numbers"
            )


def run_id(folder: pathlib.Path, is_new: bool) -> str:
    """Returns the id of a folder's run; a run that starts anew gets a new one."""
    path = folder / "wandb_id"
    if is_new or not path.exists():
        write_atomically(path, secrets.token_hex(4))
    return path.read_text().strip()
