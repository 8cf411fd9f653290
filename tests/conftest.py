"""Eight virtual CPU devices, and fixtures that several test files share."""

import atexit
import os
import shutil
import tempfile

# JAX reads these when it starts; processes started by tests inherit them.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the time, and half as long without most optimizations.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["TF_USE_LEGACY_KERAS"] = "1"  # TensorFlow then doesn't import Keras, for 2 s
os.environ.pop("PYTHONUNBUFFERED", None)  # output to a pipe is buffered, as on most machines
# Test workers, and the runs they start, share compiled programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vit_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import functools
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

pytest.register_assert_rewrite("batches", "datasets", "published", "whole_runs")
import datasets
import whole_runs
from bucket_server import BucketServer

from configs import common
from vit_jax import models
from vit_jax.parallel import mesh as meshes

GOLDEN = pathlib.Path(__file__).parent / "golden"

TINY = dict(patch_size=8, width=32, depth=2, num_heads=4, mlp_dim=64)


@pytest.fixture(scope="session")
def one_device():
    """A mesh over a single device."""
    return meshes.create_mesh(devices=jax.devices()[:1])


@pytest.fixture
def on_one_device(one_device):
    """Runs use a single device: programs for eight take longer to compile."""
    with whole_runs.one_device_only(one_device):
        yield


@pytest.fixture
def tiny_config():
    """The configuration of a model that compiles in a second or two."""
    config = common.get_config()
    config.update(batch_size=8, total_steps=24, image_size=32, dtype="float32", num_classes=10)
    config.model.update(variant="Ti/16", **TINY)
    config.schedule.warmup_steps = 4
    config.mesh.data = 1
    return config


@pytest.fixture
def data_config(tiny_config):
    """Small batches of small images, shuffled through a small buffer."""
    tiny_config.batch_size = 8
    tiny_config.image_size = 16
    tiny_config.dataset.update(shuffle_buffer=10, in_memory_mb=0)
    return tiny_config


@pytest.fixture
def plain(data_config):
    """No augmentation but resizing, so that pixels identify their example."""
    data_config.augment.update(crop="none", flip=False)
    return data_config


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    datasets.make_image_folder(root)
    return root


@pytest.fixture(scope="session")
def tfds_folders(tmp_path_factory):
    return datasets.make_tfds_folders(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def weights_file(tmp_path):
    """Writes flat parameters as an .npz."""

    def write(flat):
        np.savez(tmp_path / "w.npz", **flat)
        return tmp_path / "w.npz"

    return write


def tiny_model(**fields):
    """A two-layer model for 32-pixel images."""
    return models.create("Ti/16", **{"num_classes": 10, **TINY, **fields})


def init(model, images):
    """Random variables of a model for images of this shape; computes and compiles nothing."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    return {"params": randomized(shapes["params"])}


@functools.partial(jax.jit, static_argnums=0, static_argnames=("train", "capture"))
def apply(model, variables, images, **options):
    """`model.apply`, compiled: faster than compiling each of its operations."""
    return model.apply(variables, images, **options)


def randomized(params, seed: int = 0):
    """Returns the tree with every leaf drawn at random: zeros would hide mistakes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0.0, 0.2, leaf.shape).astype(np.float32), params)


@pytest.fixture(scope="session")
def running_bucket_server():
    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip("gcsfs isn't installed")
    with BucketServer() as server:
        yield server


@pytest.fixture
def bucket(running_bucket_server, monkeypatch):
    """A server whose bucket gs://bar is empty, and that this process and its children use."""
    server = running_bucket_server
    server.clear()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server
