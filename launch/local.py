"""Runs a script as several processes on this machine, joined over CPU collectives.

    python launch/local.py --num_processes=4 train.py --config=configs/digits.py:quick

Simulates a pod on one machine. If a process fails, the others are killed after
--grace seconds. The exit code is the first one that isn't 0.
"""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_processes", type=count, default=2)
    parser.add_argument("--devices", type=count, default=1, help="virtual CPU devices per process")
    parser.add_argument(
        "--grace",
        type=float,
        default=60.0,
        help="seconds until the other processes are killed after one has failed",
    )
    parser.add_argument("script", help="train.py or evaluate.py, followed by its arguments")
    options, script_arguments = parser.parse_known_args()
    processes = start(options.num_processes, options.devices, [options.script, *script_arguments])

    def forward_signal(number, frame):
        for process in processes:
            process.send_signal(number)

    signal.signal(signal.SIGINT, forward_signal)
    signal.signal(signal.SIGTERM, forward_signal)
    return wait(processes, options.grace)


def count(text: str) -> int:
    """Returns the whole number, at least 1, that a flag is set to."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def start(num_processes: int, devices: int, command: list[str]) -> list[subprocess.Popen]:
    """Starts the processes, each with some virtual CPU devices."""
    script, *arguments = command
    address = f"localhost:{free_port()}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    return [
        subprocess.Popen(
            [
                sys.executable,
                ROOT / script,
                f"--coordinator_address={address}",
                f"--num_processes={num_processes}",
                f"--process_id={i}",
                *arguments,
            ],
            env=environment,
            start_new_session=True,  # Ctrl-C reaches them once, through forward_signal
        )
        for i in range(num_processes)
    ]


def wait(processes: list[subprocess.Popen], grace: float) -> int:
    """Waits for all processes, and kills those still running `grace` seconds after a failure.

    Returns:
        The first exit code that isn't 0; 0 if there is none.
    """
    deadline, code = None, 0
    while any(process.poll() is None for process in processes):
        failed = [i for i, p in enumerate(processes) if p.returncode not in (None, 0)]
        if failed and deadline is None:
            deadline, code = time.monotonic() + grace, processes[failed[0]].returncode
            if code < 0:
                name = signal.Signals(-code).name
                print(f"Process {failed[0]} was killed by {name}", file=sys.stderr, flush=True)
        if deadline and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    failed = [p.returncode for p in processes if p.returncode != 0]
    code = code or (failed[0] if failed else 0)
    return code if code >= 0 else 128 - code  # of a signal, as in shells


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
