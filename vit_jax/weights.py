"""Reading weights: Google's and big_vision's `.npz`, timm's and transformers' `.safetensors`, runs.

Which one a file is, its contents tell; `formats.py` has their names.
"""

import dataclasses
import importlib
import json
import tempfile
import zipfile

import flax
import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from vit_jax import architecture, checkpoint, formats, models
from vit_jax.errors import UserError

# Fields of a model that its parameters don't show.
UNSEEN = ("gelu", "layer_norm_eps", "norm", "pool", "pool_norm", "posemb", "num_heads")

TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_tanh")


@dataclasses.dataclass
class Weights:
    """What a file or a run holds.

    params: this code's names, flat, blocks one by one -> array. fields: of the model, as far as the
    file settles them beside the shapes. mean, std: of the pixels in [0, 1] that its images are
    normalised with; image_size: their (height, width); keep: the part of the resized image's
    shorter side that is seen; class_names; None: the file doesn't tell.
    """

    path: str
    params: dict[str, np.ndarray]
    fields: dict = dataclasses.field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: tuple[int, int] | None = None
    keep: float | None = None
    class_names: tuple[str, ...] | None = None
    loss: str | None = None  # of a run

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: value.shape for name, value in self.params.items()}

    @property
    def model_fields(self) -> dict:
        """Fields of the model these are of: those seen in the shapes, and those settled."""
        return architecture.fields(self.shapes) | self.fields


def read(path, num_heads: int | None = None) -> Weights:
    """Reads a file, a folder, a run, or `hf:owner/name`.

    Args:
        path: local or gs://; see `pretrained.load`.
        num_heads: for files that don't tell; None: those of the published size.

    Raises:
        UserError: nothing there, damaged, or of no Vision Transformer.
    """
    path = epath.Path(fetched(str(path)))
    if run := run_of(path):
        return read_run(str(path), *run)
    if not exists(path):
        raise UserError(f"There is no {path}")
    config, processor = {}, {}
    if path.is_dir():
        if not (path / "model.safetensors").exists() or not (path / "config.json").exists():
            raise UserError(f"{path} holds no config.json beside a model.safetensors")
        config, processor = (
            read_json(path / f"{n}.json") for n in ("config", "preprocessor_config")
        )
        path = path / "model.safetensors"
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"PK"):
        weights = Weights(str(path), formats.from_flax(read_npz(path)))
    elif start[8:] == b"{":
        weights = from_safetensors(path, config, processor, num_heads)
    else:
        raise UserError(f"{path} is neither an .npz nor a .safetensors file")
    if not architecture.fields(weights.shapes):
        raise UserError(f"{path} holds no Vision Transformer: {what_it_is(weights.params, config)}")
    return weights


def fetched(path: str) -> str:
    """`hf:owner/name` -> the folder its files were fetched to; other paths as they are."""
    if not path.startswith("hf:"):
        return path
    try:
        hub = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError:
        raise UserError(f"{path} is fetched with huggingface_hub: pip install it first") from None
    files = ["config.json", "preprocessor_config.json", "model.safetensors"]
    try:
        return hub.snapshot_download(path.removeprefix("hf:"), allow_patterns=files)
    except Exception as error:  # of the network, the name, or access; it has many kinds
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(f"{path} can't be fetched: {reason}") from None


def exists(path: epath.Path) -> bool:
    try:
        return path.exists()
    except Exception as error:  # each kind of storage has its own
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(f"{path} can't be reached: {reason}") from None


def run_of(path: epath.Path) -> tuple | None:
    """(workdir, step, item) that a path into a run's folder names; None: it's no such path."""
    if exists(path / "checkpoints"):
        return path, None, None
    item = None
    if path.name in ("params", "ema_params"):
        path, item = path.parent, path.name
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parent.parent, int(path.name), item
    return None


def read_run(path: str, workdir: epath.Path, step: int | None, item: str | None) -> Weights:
    config, params = checkpoint.restore_params(workdir, step, item)
    params = flax.traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    model = models.from_config(config)
    size = config.image_size
    return Weights(
        path,
        formats.from_flax(params),
        {name: getattr(model, name) for name in UNSEEN},
        tuple(config.augment.mean),
        tuple(config.augment.std),
        pair(size),
        config.augment.eval_crop,
        checkpoint.read_class_names(workdir),
        config.loss,
    )


def read_npz(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; nothing is unpickled."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except ValueError as error:
        raise UserError(f"{path} holds objects, not arrays, and isn't unpickled: {error}") from None


def read_json(path: epath.Path) -> dict:
    """The object in a file; {} where there is no file."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def read_safetensors(path: epath.Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file, of any precision."""
    with tempfile.TemporaryDirectory() as folder:
        here = path
        if "://" in str(path):  # the library opens local files alone
            here = path.copy(epath.Path(folder) / path.name)
        try:
            return safetensors.numpy.load_file(here)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from None


def from_safetensors(path, config: dict, processor: dict, num_heads: int | None) -> Weights:
    flat = read_safetensors(path)
    if any("patch_embeddings.projection" in name for name in flat):
        return from_hf(str(path), flat, config, processor, num_heads)
    if "patch_embed.proj.weight" in flat:
        return from_timm(str(path), flat, config, num_heads)
    raise UserError(f"{path} holds no Vision Transformer: {what_it_is(flat, config)}")


def from_hf(path: str, flat, config: dict, processor: dict, num_heads: int | None) -> Weights:
    kernel = next(v for name, v in flat.items() if name.endswith("projection.weight"))
    fields = {"pool": "cls", "pool_norm": "before", "norm": "pre"}
    fields["layer_norm_eps"] = config.get("layer_norm_eps", 1e-12)
    fields["gelu"] = gelu(path, config.get("hidden_act", "gelu"))
    if "num_attention_heads" in config:
        fields["num_heads"] = config["num_attention_heads"]
    flat = formats.from_hf(flat, heads(fields.get("num_heads", num_heads), len(kernel)))
    names = config.get("id2label") or {}
    names = tuple(names[i] for i in sorted(names, key=int))
    if all(name == f"LABEL_{i}" for i, name in enumerate(names)):  # transformers' for none
        names = None
    return Weights(
        path,
        flat,
        fields,
        numbers(processor.get("image_mean")),
        numbers(processor.get("image_std")),
        pair(config.get("image_size")),
        1.0 if processor else None,  # it resizes and crops nothing
        names,
    )


def from_timm(path: str, flat, config: dict, num_heads: int | None) -> Weights:
    arguments, pretrained = config.get("model_args", {}), config.get("pretrained_cfg", config)
    norm = "after" if "fc_norm.weight" in flat else "before"
    fields = {"layer_norm_eps": 1e-6, "pool_norm": norm, "norm": "pre", "pool": "gap"}
    if "cls_token" in flat or "attn_pool.latent" in flat:
        fields["pool"] = "map" if "attn_pool.latent" in flat else "cls"
    # Its SigLIPs compute either GELU, and their config doesn't say which.
    if "act_layer" in arguments or "siglip" not in config.get("architecture", ""):
        fields["gelu"] = gelu(path, arguments.get("act_layer") or "gelu")
    if "num_heads" in arguments:
        fields["num_heads"] = arguments["num_heads"]
    no_embed_class = arguments.get("no_embed_class", False) if config else None
    width = len(flat["patch_embed.proj.weight"])
    flat = formats.from_timm(flat, heads(fields.get("num_heads", num_heads), width), no_embed_class)
    names = config.get("label_names") or pretrained.get("label_names")
    size = arguments.get("img_size") or pretrained.get("input_size", (None,))[1:]
    return Weights(
        path,
        flat,
        fields,
        numbers(pretrained.get("mean")),
        numbers(pretrained.get("std")),
        pair(size),
        pretrained.get("crop_pct"),
        tuple(names) if isinstance(names, list) else None,
    )


def gelu(path: str, activation: str) -> str:
    if activation in TANH_GELUS:
        return "tanh"
    if activation != "gelu":
        raise UserError(
            f"{path} is of a model with the activation {activation!r}, which isn't here"
        )
    return "exact"


def heads(num_heads: int | None, width: int) -> int:
    """The number given, where it can be; else that of the published size."""
    if num_heads and width % num_heads == 0:
        return num_heads
    return architecture.likely_heads(width)


def numbers(values) -> tuple[float, ...] | None:
    return tuple(map(float, values)) if values else None


def pair(size) -> tuple[int, int] | None:
    """An edge, or (height, width), as JSON has it."""
    if not size:
        return None
    return (size, size) if isinstance(size, int) else tuple(size)


def what_it_is(flat, config: dict) -> str:
    """What else the parameters may be of, for a message."""
    named = config.get("architectures") or [config.get("architecture")]
    if named[0]:
        return f"its config.json says {named[0]}"
    if what := architecture.looks_like(flat):
        return f"it looks like {what}"
    return f"its parameters are {', '.join(sorted(flat)[:3])}, ..."
