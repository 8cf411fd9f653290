"""Reads and writes .npz and .safetensors files, and folders with JSON files beside them."""

import importlib
import json
import tempfile
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from vit_jax.errors import UserError, first_line
from vit_jax.pretrained.codebases.settings import get_setting
from vit_jax.storage.files import atomic_path, read_json_object, write_atomically

# Types in .safetensors files that safetensors doesn't convert to NumPy's.
FLOAT8 = {"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2}

LFS_POINTER = b"version https://git-lfs"


def fetch(path: str) -> str:
    """Downloads `hf:owner/name` and returns its folder; returns other paths unchanged."""
    if not path.startswith("hf:"):
        return path
    try:
        hub = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError:
        raise UserError(f"{path} needs huggingface_hub: pip install huggingface_hub") from None
    files = ["config.json", "preprocessor_config.json", "model*.safetensors*"]
    try:
        return hub.snapshot_download(path.removeprefix("hf:"), allow_patterns=files)
    except Exception as error:  # many kinds, of the network, the name or access
        raise UserError(f"{path} can't be downloaded: {first_line(error)}") from None


def read_folder(path: epath.Path) -> tuple[dict[str, np.ndarray], dict, dict]:
    """Reads the tensors, config.json and preprocessor_config.json ({} if missing) in a folder."""
    index_path, whole = path / "model.safetensors.index.json", path / "model.safetensors"
    if not whole.exists() and not index_path.exists():
        found = "none"
        if (path / "pytorch_model.bin").exists():
            found = "only pytorch_model.bin, a pickle, which is never read"
        elif any(path.glob("model-*.safetensors")):
            found = "parts of it without model.safetensors.index.json: download that too"
        hint = "a run's folder has checkpoints/"
        if path.name == "checkpoints":
            hint = f"is it a run's? Give the run, {path.parent}, or a checkpoint, {path}/STEP"
        raise UserError(
            f"{path} holds no weights: expected model.safetensors, found {found} ({hint})"
        )
    if not (path / "config.json").exists():
        raise UserError(
            f"{path} has model.safetensors but no config.json: download that too or, if the model "
            "has no rotary positions, give the path of the file instead"
        )
    config, processor = (
        read_json_object(path / name) if (path / name).exists() else {}
        for name in ("config.json", "preprocessor_config.json")
    )
    if whole.exists():
        return read_safetensors(whole), config, processor
    shards = get_setting(read_json_object(index_path), index_path, "weight_map", dict, {}).values()
    if not shards:
        raise UserError(f"{index_path} lists no files in weight_map: download it again")
    tensors = {}
    for name in sorted(set(shards)):
        if not (path / str(name)).exists():
            raise UserError(f"{path} lacks {name}, a part of its weights")
        tensors |= read_safetensors(path / name)
    return tensors, config, processor


def read_safetensors(path: epath.Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a .safetensors file, in the precision they are stored in."""
    with tempfile.TemporaryDirectory() as folder:
        local = path
        if "://" in str(path):  # safetensors opens only local files
            local = path.copy(epath.Path(folder) / path.name)
        try:
            return read_tensors(path, local)
        except safetensors.SafetensorError as error:
            with path.open("rb") as file:
                check_downloaded(path, file.read(len(LFS_POINTER)))
            raise UserError(f"{path} is damaged: {error}") from None


def check_downloaded(path, start: bytes) -> None:
    """Raises UserError if a file, which starts with these bytes, only points to the weights."""
    if start.startswith(LFS_POINTER):
        raise UserError(
            f"{path} is a Git LFS pointer instead of the weights: run `git lfs pull` in its "
            "repository, or download the file itself"
        )


def read_tensors(path, local) -> dict[str, np.ndarray]:
    """Reads the tensors of the local copy of `path`, with the types that NumPy doesn't know."""
    with safetensors.safe_open(local, framework="numpy") as file:
        names = file.keys()
        types = {name: file.get_slice(name).get_dtype() for name in names}
        for name, kind in types.items():
            if kind.startswith(("F4", "F6", "F8")) and kind not in FLOAT8:
                raise UserError(
                    f"{path}: {name} is of type {kind}, which isn't supported: save the weights as "
                    "F32, F16, BF16, F8_E4M3 or F8_E5M2"
                )
        tensors = {n: file.get_tensor(n) for n, kind in types.items() if kind not in FLOAT8}
    if len(tensors) < len(types):  # safetensors returns these only as bytes
        for name, stored in safetensors.deserialize(epath.Path(local).read_bytes()):
            if kind := FLOAT8.get(stored["dtype"]):
                tensors[name] = np.frombuffer(stored["data"], kind).reshape(stored["shape"])
    return tensors


def read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    """Reads the arrays of an .npz file, of any precision; unpickles nothing."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise UserError(f"{path} is damaged: {error}") from None
        raise UserError(
            f"{path} holds pickled objects, which are never read; it must hold arrays: {error}"
        ) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    for name, value in arrays.items():
        if not isinstance(value, np.ndarray):
            raise UserError(
                f"{path} is a zip file with {name}, which is no array: PyTorch pickles are never "
                "read; save the weights as .safetensors"
            )
        if value.dtype == np.dtype("V2"):  # bfloat16, which NumPy doesn't know
            arrays[name] = value.view(jnp.bfloat16)
    return arrays


def write_arrays(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays)


def write_files(folder: epath.Path, files: dict) -> None:
    """Writes {name: JSON object, or tensors} to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if name.endswith(".json"):
            content = json.dumps(content, indent=2) + "\n"
        else:
            tensors = {key: np.ascontiguousarray(value) for key, value in content.items()}
            content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
        write_atomically(folder / name, content)
