"""Keeps compiled programs in a run's folder, so that a restart doesn't compile again."""

import contextlib

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from vit_jax.parallel import distributed
from vit_jax.storage import files


@contextlib.contextmanager
def compilation_cache(workdir):
    """Caches what is compiled inside the block in <workdir>/compiled.

    If JAX_COMPILATION_CACHE_DIR is set, JAX's own cache is used instead.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        yield
        return
    folder = files.open_path(workdir) / "compiled"
    unfinished = folder / "unfinished"
    if jax.process_index() == 0:  # only process 0 writes
        if unfinished.exists():  # killed while compiling: a file may be cut off
            folder.rmtree()
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.write_text("")
    distributed.barrier("compilation cache checked")
    settings = {"jax_compilation_cache_dir": str(folder)}
    settings |= {"jax_persistent_cache_min_compile_time_secs": 0.0}  # cache small programs too
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        jax_cache.reset_cache()  # of an earlier run in the same process
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        jax_cache.reset_cache()
        if jax.process_index() == 0:
            unfinished.unlink(missing_ok=True)
