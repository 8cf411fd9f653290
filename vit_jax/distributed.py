"""Several processes as one program."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.errors import UserError, first_line

NO_CLUSTER = "coordinator_address should be defined"  # what JAX says where it recognises none


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = 100,
) -> None:
    """Joins the other processes of the program; alone where there are none.

    Given nothing, the cluster manager is asked, where JAX recognises one (Cloud TPU, GKE, Slurm,
    Open MPI). To be called before JAX computes anything.

    Args:
        coordinator_address: host:port of process 0, the same for all.
        num_processes, process_id: how many there are, and which this is, from 0.
        heartbeat_seconds: how long a process may be silent before the others stop.

    Raises:
        UserError: some of the three without the others, or nobody there to join.
    """
    given = dict(
        coordinator_address=coordinator_address, num_processes=num_processes, process_id=process_id
    )
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(
            f"--coordinator_address, --num_processes and --process_id go together: "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        )
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=heartbeat_seconds)
    except ValueError as error:
        if missing and NO_CLUSTER in str(error):
            return
        raise UserError(f"The processes can't join: {error}") from None
    except RuntimeError as error:
        reason = first_line(error)
        raise UserError(
            f"Process {process_id} can't join {coordinator_address}: {reason}"
        ) from None


def barrier(what: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def anywhere(flag: bool) -> bool:
    """Whether it is so for any process. To be asked by all."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())
