"""A run's metrics on Weights & Biases, if `config.wandb` names a project."""

import importlib.util
import logging
import pathlib
import secrets

from vit_jax.errors import UserError, first_line
from vit_jax.files import write_atomically

logger = logging.getLogger("vit_jax")


def check(config) -> None:
    """Raises UserError if `config.wandb` is set and the package isn't installed."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config.wandb is {config.wandb!r}, and the package isn't installed: pip install wandb"
        )


class Tracking:
    """Sends what TensorBoard gets to a run of Weights & Biases too.

    A resumed run goes on with the same run there, whose id is in <workdir>/wandb_id. Rows that it
    repeats are dropped there: they have the same numbers. With WANDB_MODE=offline in the
    environment, everything stays in <workdir>/wandb, for `wandb sync`.
    """

    def __init__(self, workdir, config):
        """Starts, or resumes, the run of a folder.

        Args:
            workdir: the run's folder.
            config: the run's configuration; `config.wandb` is the project.

        Raises:
            UserError: Weights & Biases refuses, or can't be reached.
        """
        import wandb

        folder = pathlib.Path(workdir)
        try:
            self.run = wandb.init(
                project=config.wandb,
                dir=folder,
                id=run_id(folder),
                name=folder.resolve().name,
                resume="allow",
                config=config.to_dict(),
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:  # of many kinds
            raise UserError(
                f"config.wandb is {config.wandb!r}, but Weights & Biases can't be used "
                f"({first_line(error)}): run `wandb login`, or set WANDB_MODE=offline"
            ) from None

    def add(self, step: int, values: dict[str, float]) -> None:
        """Sends values of a step; an error ends the tracking, not the run."""
        self.call(lambda run: run.log(values, step=step))

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


def run_id(folder: pathlib.Path) -> str:
    """Returns the id of a folder's run, made when it is first needed."""
    path = folder / "wandb_id"
    if not path.exists():
        write_atomically(path, secrets.token_hex(4))
    return path.read_text().strip()
