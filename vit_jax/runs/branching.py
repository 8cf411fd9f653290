"""Starting a run from the whole state of another: a branch, such as one of many cooldowns."""

from vit_jax.errors import UserError
from vit_jax.runs import resuming, run_folder


def check(config) -> None:
    """Raises UserError if `config.branch_from` doesn't name a checkpoint, or beside `init_from`."""
    path = config.get("branch_from")
    if path is None:
        return
    parse(path)
    if config.init_from:
        raise UserError(
            "config.init_from and config.branch_from are both set: a branch goes on with the other "
            "run's parameters, so leave out init_from"
        )


def parse(path: str) -> tuple[str, int]:
    """Returns the run's folder and the step of RUN/checkpoints/STEP."""
    parent, _, step = path.rstrip("/").rpartition("/")
    run, _, name = parent.rpartition("/")
    if not run or name != "checkpoints" or not step.isdecimal():
        raise UserError(f"config.branch_from is {path!r}; it must be RUN/checkpoints/STEP")
    return run, int(step)


def check_config(config, path: str) -> None:
    """Checks that a new run can go on from a checkpoint.

    Raises:
        UserError: there is no such checkpoint; the run wouldn't end after it; or more than the
            length, the schedule and what a resumed run may change differs.
    """
    run, step = parse(path)
    trunk = run_folder.require_config(run)
    steps = run_folder.checkpoint_steps(run)
    if step not in steps:
        raise UserError(
            f"config.branch_from is {path!r}, but {run} has checkpoints of the steps "
            f"{steps or 'none'} only: set keep_every_steps in that run"
        )
    if config.total_steps <= step:
        raise UserError(
            f"config.total_steps is {config.total_steps:,}; a branch from step {step:,} must be "
            "longer"
        )
    old, new = resuming.as_flat_dict(trunk), resuming.as_flat_dict(config)
    may_differ = (*resuming.MAY_CHANGE, *resuming.LENGTH, "branch_from", "init_from")
    changed = [
        f"{field}: {old[field]!r} -> {new.get(field)!r}"
        for field in resuming.fields_that_differ(trunk, config)
        if field in old and not resuming.is_in(field, may_differ)
    ]
    if changed:
        raise UserError(
            f"{run} has another configuration than its branch ({'; '.join(changed)}): only "
            "total_steps, num_epochs and the schedule may differ"
        )
