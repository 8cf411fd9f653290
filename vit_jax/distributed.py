"""Several processes as one program."""

import socket
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.errors import UserError, first_line

JOIN_SECONDS = 300  # that processes wait for each other as they start
NO_CLUSTER = "coordinator_address should be defined"  # what JAX says where it recognises none


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = 100,
    preemptible: bool = True,
) -> None:
    """Joins the other processes of the program; alone where there are none.

    Given nothing, the cluster manager is asked, where JAX recognises one (Cloud TPU, GKE, Slurm,
    Open MPI). To be called before JAX computes anything. Process 0 waits for the others for
    JOIN_SECONDS; if they don't come, JAX ends it.

    Args:
        coordinator_address: host:port of process 0, the same for all.
        num_processes, process_id: how many there are, and which this is, from 0.
        heartbeat_seconds: how long a process may be silent before the others stop.
        preemptible: whether the program will look for notices (`Preemption`); SIGTERM is one
            then, and doesn't end it.

    Raises:
        UserError: some of the three without the others, or no process 0 there to join.
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
    if not missing:
        check_coordinator(coordinator_address, num_processes, process_id)
    jax.config.update("jax_enable_preemption_service", preemptible)
    try:
        jax.distributed.initialize(
            **given,
            heartbeat_timeout_seconds=heartbeat_seconds,
            initialization_timeout=JOIN_SECONDS,
        )
    except ValueError as error:
        if missing and NO_CLUSTER in str(error):
            return
        raise UserError(f"The processes can't join: {error}") from None
    except RuntimeError as error:
        reason = first_line(error)
        raise UserError(
            f"Process {process_id} can't join {coordinator_address}: {reason}"
        ) from None


def check_coordinator(address: str, num_processes: int, process_id: int) -> None:
    """Raises UserError where process 0 doesn't answer: JAX would abort without an exception."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator_address={address} isn't host:port")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id} isn't one of {num_processes}, counted from 0")
    deadline = time.monotonic() + JOIN_SECONDS
    while process_id > 0:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except (OSError, OverflowError) as error:  # not there yet, or never
            if time.monotonic() > deadline:
                raise UserError(
                    f"Process {process_id} can't join {address} ({error}): is process 0 running "
                    "there, and is the address right?"
                ) from None
            time.sleep(0.5)


def barrier(what: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def anywhere(flag: bool) -> bool:
    """Whether it is so for any process. To be asked by all."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())
