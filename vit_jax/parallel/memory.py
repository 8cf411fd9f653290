"""How much memory there is for a device."""

import os

import jax


def bytes_per_device() -> int | None:
    """Returns the memory of one of this machine's devices, in bytes; None if it isn't known.

    CPU devices share the machine's memory.
    """
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        return (devices[0].memory_stats() or {}).get("bytes_limit")
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
