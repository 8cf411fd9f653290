"""Moves batches to the devices: which examples a process loads, and global arrays of them."""

import collections
from collections.abc import Iterable, Iterator
from concurrent import futures

import jax
import numpy as np
from jax.sharding import Mesh

from vit_jax.errors import UserError
from vit_jax.parallel.mesh import batch_sharding, num_shards

AHEAD = 2  # batches transferred ahead of the one in use


def process_rows(mesh: Mesh, batch_size: int) -> dict:
    """Returns which examples of each global batch this process loads.

    Processes whose devices hold the same examples (tensor parallelism across hosts) load the same
    ones. A process's rows aren't always contiguous: on a TPU slice the mesh follows the torus.

    Returns:
        Keyword arguments of `input_pipeline.train_batches`: `num_shares`, the number of distinct
        shares of a batch, at most one per process; `share_index`, the one that this process
        loads; `rows`, its indices into the global batch, int (batch_size / num_shares,).

    Raises:
        UserError: processes would share only some of their examples.
    """
    shards = num_shards(mesh)
    shards_of = collections.defaultdict(set)  # process -> the shards of a batch on its devices
    for device, (shard,) in batch_sharding(mesh).devices_indices_map((shards,)).items():
        shards_of[device.process_index].update(range(*shard.indices(shards)))
    shards_of = {process: tuple(sorted(ids)) for process, ids in shards_of.items()}
    shares = sorted(set(shards_of.values()))
    if sum(map(len, shares)) != shards or len(set(map(len, shares))) > 1:
        raise UserError(
            f"config.mesh.tensor {mesh.shape['tensor']} doesn't fit the processes: it must divide "
            "the number of devices per process, or be a multiple of it"
        )
    share = shards_of[jax.process_index()]
    shard_size = batch_size // shards
    rows = np.add.outer(np.array(share) * shard_size, np.arange(shard_size)).ravel()
    return dict(share_index=shares.index(share), num_shares=len(shares), rows=rows)


def to_devices(batches: Iterable[dict], mesh: Mesh, ahead: int = AHEAD) -> Iterator[dict]:
    """Turns this process's NumPy batches into global arrays, sharded over their first axis.

    A thread produces and transfers `ahead` batches while one is in use, so that the next one is
    handed over when it is ready, even if those after it are not.
    """
    sharding = batch_sharding(mesh)
    num_shares = process_rows(mesh, num_shards(mesh))["num_shares"]
    batches = iter(batches)

    def put(array):
        shape = (num_shares * len(array), *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    def put_next():
        batch = next(batches, None)
        return None if batch is None else jax.tree.map(put, batch)

    thread = futures.ThreadPoolExecutor(1, "to_devices")
    try:
        queue = collections.deque(thread.submit(put_next) for _ in range(1 + ahead))
        while (batch := queue.popleft().result()) is not None:
            yield batch
            queue.append(thread.submit(put_next))
    finally:
        batches = iter(())  # what is still queued then ends at once; also while Python shuts down
        thread.shutdown(wait=False)
