"""How a run begins: anew, from its own last checkpoint, or as a branch of another run."""

import logging
from collections.abc import Collection

import ml_collections

from vit_jax.errors import UserError
from vit_jax.runs import branch, resuming, run_folder
from vit_jax.training.train_state import TrainState

logger = logging.getLogger("vit_jax")


class StartPoint:
    """Where a run starts: anew, from its own last checkpoint, or from another run's.

    Attributes:
        resumes: whether the run has checkpoints of its own.
        origin: the checkpoint of another run that a new branch leaves, or None.
        step: the step that the run started at the first time: 0, unless it is a branch.
    """

    def __init__(
        self, workdir, config: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict
    ):
        """Looks at the run's folder and, for a branch, at that of the other run.

        Args:
            workdir: the run's folder.
            config: the configuration as given.
            defaults: the default of every field.

        Raises:
            UserError: see `branch.find`.
        """
        self.workdir = workdir
        steps = run_folder.checkpoint_steps(workdir)
        self.resumes, self.newest = bool(steps), max(steps, default=None)
        self.origin = branch.find(config, workdir)
        self.step = branch.start_step(workdir, self.origin)
        self.given = resuming.fields_that_differ(config, defaults)
        self.changes = []  # that only --allow_changes allows
        self.description = ()  # what `record` recorded

    @property
    def is_new(self) -> bool:
        """Whether the run starts from random parameters, or from weights."""
        return not self.resumes and self.origin is None

    def recorded(self, group: str, field: str):
        """Returns a field of the run that this one goes on with, or None."""
        source = self.origin.workdir if self.origin else self.workdir
        return run_folder.recorded(source, group, field)

    def inherit(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
        """Returns the configuration with what the run that it goes on with has settled."""
        return branch.inherit(self.origin, self.workdir, config)

    def check(
        self,
        config: ml_collections.ConfigDict,
        train_set,
        shapes: TrainState,
        recover: bool = False,
        allowed: Collection[str] = (),
    ) -> None:
        """Checks that a configuration can go on from there; reads no array.

        Args:
            config: the configuration, resolved.
            train_set: the training split, a Source.
            shapes: the shapes of the state.
            recover, allowed: see `resuming.check_config`.

        Raises:
            UserError: see `branch.check_resumable` and `resuming.check_resumable`.
        """
        branch.check_resumable(self.origin, config, train_set, self.given, shapes)
        self.changes = resuming.check_resumable(
            self.workdir, config, train_set, self.given, recover, allowed
        )

    def check_step(self, step: int) -> None:
        """Checks that a run with another batch size resumes where `inherit` took it to.

        Raises:
            UserError: the newest checkpoint was corrupt, so that it is an earlier step.
        """
        is_batch_other = any(change["field"] == "batch_size" for change in self.changes)
        if is_batch_other and step != self.newest:
            raise UserError(
                f"The checkpoint of step {self.newest:,} is corrupt, and the batch size changes at "
                f"step {step:,} instead: start the same command again"
            )

    def record(
        self, config: ml_collections.ConfigDict, class_names: Collection[str], remat: str, step: int
    ) -> None:
        """Records the run in its folder, and logs what it goes on from; process 0 writes.

        Args:
            config, class_names, remat: see `run_folder.record`.
            step: the step that this start begins at.
        """
        if self.resumes:
            logger.info(f"Resuming at step {step:,} of {config.total_steps:,}")
        else:
            branch.record(self.workdir, self.origin, config, self.given)
        resuming.record_changes(self.workdir, step, self.changes)
        self.description = (config, class_names, remat)
        run_folder.record(self.workdir, *self.description)

    def record_if_deleted(self) -> None:
        """Records the run again if its folder was deleted; see `run_folder.record_if_deleted`."""
        run_folder.record_if_deleted(self.workdir, *self.description)
