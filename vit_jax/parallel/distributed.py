"""Joins several processes into one program, and synchronizes them."""

import contextlib
import os
import socket
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.errors import UserError, first_line
from vit_jax.storage.waiting import if_longer_than

JOIN_SECONDS = 300  # how long processes wait for each other at the start
SILENT_SECONDS = 10  # until a process that waits says so

# The variables that cluster managers set for each process, and that JAX reads.
MANAGERS = {
    "Slurm": (
        *("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES"),
        *("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ),
    "Open MPI": ("OMPI_MCA_orte_hnp_uri",),
    "GKE": ("KUBERNETES_SERVICE_HOST", "TPU_WORKER_HOSTNAMES"),
    "Cloud TPU Multislice": ("MEGASCALE_COORDINATOR_ADDRESS",),
}
MODES = ("auto", "on", "off")


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = 100,
    preemptible: bool = True,
    mode: str = "auto",
) -> None:
    """Joins the other processes of the program, if there are any.

    Without an address JAX asks the cluster manager, if it recognizes one (Cloud TPU, GKE, Slurm,
    Open MPI). Must be called before JAX computes anything. Process 0 waits JOIN_SECONDS for the
    others; then JAX aborts it.

    Args:
        coordinator_address: host:port of process 0.
        num_processes: the number of processes.
        process_id: the index of this process, from 0.
        heartbeat_seconds: how long a process may be silent before the others stop.
        preemptible: whether the program handles preemption notices (`Preemption`); SIGTERM then
            counts as one, and doesn't end the program.
        mode: "on": there must be a cluster manager, or the first three arguments; "off": this
            process is alone, whatever is around it; "auto": it is if JAX recognizes no cluster
            manager.

    Raises:
        UserError: only some of the first three arguments are given, process 0 can't be reached,
            the mode doesn't fit, or JAX has no device.
    """
    given = dict(
        coordinator_address=coordinator_address, num_processes=num_processes, process_id=process_id
    )
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(
            "--coordinator_address, --num_processes and --process_id go together: "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        )
    if mode == "off":
        if not missing:
            raise UserError(
                "--distributed=off doesn't go with --coordinator_address: leave one out"
            )
        check_devices()
        return
    jax.config.update("jax_enable_preemption_service", preemptible)
    with say_if_waiting(coordinator_address, num_processes, process_id):
        if not missing:
            check_coordinator(coordinator_address, num_processes, process_id)
        join(given, heartbeat_seconds, required=mode == "on" or not missing)
    check_devices()


@contextlib.contextmanager
def say_if_waiting(address: str | None, num_processes: int | None, process_id: int | None):
    """Prints a line to stderr if the block, which waits for other processes, takes long."""
    whom = f"process 0 at {address}" if process_id else "the other processes"
    name = "This process" if process_id is None else f"Process {process_id} of {num_processes}"
    line = f"{name} is waiting for {whom}, for up to {JOIN_SECONDS} s"
    with if_longer_than(SILENT_SECONDS, print, line, file=sys.stderr, flush=True):
        yield


def cluster_manager() -> str | None:
    """Returns the cluster manager that this process's environment tells of; None: none."""
    for name, variables in MANAGERS.items():
        if all(variable in os.environ for variable in variables):
            return name
    return None


def join(given: dict, heartbeat_seconds: int, required: bool) -> None:
    """Joins the other processes; see `start`, of which `given` is the first three arguments.

    JAX itself looks for a cluster, and knows more ways than MANAGERS, such as the metadata of a
    Cloud TPU VM. Only the environment tells whether it is an error that it finds none.
    """
    manager = cluster_manager()
    try:
        jax.distributed.initialize(
            **given,
            heartbeat_timeout_seconds=heartbeat_seconds,
            initialization_timeout=JOIN_SECONDS,
        )
    except ValueError as error:
        if given["coordinator_address"] or manager:
            where = f" under {manager}" if manager else ""
            raise UserError(f"The processes can't join{where}: {first_line(error)}") from None
        if required:
            raise UserError(
                "--distributed=on, but JAX recognizes no cluster manager around this process "
                f"({first_line(error)}): start it with one, or give --coordinator_address, "
                "--num_processes and --process_id"
            ) from None
    except RuntimeError as error:
        address, process = given["coordinator_address"], given["process_id"]
        who = "This process" if process is None else f"Process {process}"
        raise UserError(
            f"{who} can't join {address or 'the others'}: {first_line(error)}"
        ) from None


def check_devices() -> None:
    """Raises UserError if JAX has no device, such as with JAX_PLATFORMS=cuda on a CPU.

    Or if they are of several hosts, as those of a TPU slice are, whose processes haven't joined.
    """
    try:
        jax.devices()
        if jax.process_count() > 1 and not jax.distributed.is_initialized():
            raise UserError(
                f"The devices are those of {jax.process_count()} hosts, whose processes haven't "
                "joined: start with --distributed=on on every host"
            )
    except (RuntimeError, AssertionError) as error:
        if jax.distributed.is_initialized():  # the other processes, or the network
            raise
        reason = first_line(error) if str(error) else "its plugin for them isn't installed"
        wanted = jax.config.jax_platforms
        remedy = f"unset JAX_PLATFORMS, which is {wanted!r}, or " if wanted else ""
        raise UserError(
            f"JAX finds no devices ({reason}): {remedy}install JAX for the devices (see "
            "docs.jax.dev/en/latest/installation.html)"
        ) from None


def check_coordinator(address: str, num_processes: int, process_id: int) -> None:
    """Raises UserError if process 0 doesn't answer, where JAX would abort without an exception."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator_address is {address!r}; it must be host:port, with a port from 1 to "
            "65535"
        )
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id is {process_id}; with --num_processes={num_processes} it must be "
            f"between 0 and {num_processes - 1}"
        )
    deadline = time.monotonic() + JOIN_SECONDS
    while process_id > 0:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except (OSError, OverflowError) as error:  # process 0 may not be listening yet
            if time.monotonic() > deadline:
                raise UserError(
                    f"Process {process_id} can't join {address} ({error}): is process 0 running, "
                    "and is this its address?"
                ) from None
            time.sleep(0.5)


def barrier(name: str) -> None:
    """Waits until all processes have called it with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(value: int) -> int:
    """Returns process 0's value; all processes must call it."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.array(value)))


def any_process(flag: bool) -> bool:
    """Returns whether the flag is true in any process; all processes must call it."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())
