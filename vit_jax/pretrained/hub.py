"""timm's and transformers' weights, with what the JSON files beside them say."""

import importlib
import json
import re
import tempfile

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from vit_jax.errors import UserError, first_line
from vit_jax.pretrained import architecture, formats

TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_tanh")
# Those of timm 1.0.31's SigLIPs that compute the tanh GELU; their config doesn't say so.
TANH_SIGLIPS = r"(base_patch32|so400m_patch16|giantopt_patch16)_siglip|large_patch16_siglip\w*_512"

TIMM_POOLS = {"token": "cls", "avg": "gap", "map": "map"}


def fetched(path: str) -> str:
    """`hf:owner/name` -> the folder its files were fetched to; other paths as they are."""
    if not path.startswith("hf:"):
        return path
    try:
        hub = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError:
        raise UserError(f"{path} is fetched with huggingface_hub: pip install it first") from None
    files = ["config.json", "preprocessor_config.json", "model*.safetensors*"]
    try:
        return hub.snapshot_download(path.removeprefix("hf:"), allow_patterns=files)
    except Exception as error:  # of the network, the name, or access; it has many kinds
        raise UserError(f"{path} can't be fetched: {first_line(error)}") from None


def read_folder(path: epath.Path) -> tuple[dict[str, np.ndarray], dict, dict]:
    """The tensors in a folder, its config.json, and its preprocessor_config.json (or {})."""
    index, whole = path / "model.safetensors.index.json", path / "model.safetensors"
    if not whole.exists() and not index.exists():
        pickled = (path / "pytorch_model.bin").exists()
        found = "a pytorch_model.bin, a pickle, which isn't read" if pickled else "none"
        raise UserError(
            f"{path} holds no weights: expected a model.safetensors, found {found}; a run's folder "
            "has checkpoints/"
        )
    if not (path / "config.json").exists():
        raise UserError(f"{path} has a model.safetensors and no config.json: name the file itself")
    config, processor = (
        read_object(path / name) if (path / name).exists() else {}
        for name in ("config.json", "preprocessor_config.json")
    )
    if whole.exists():
        return read_safetensors(whole), config, processor
    names = setting(read_object(index), index, "weight_map", dict, {}).values()
    flat = {}
    for name in sorted(set(names)):
        if not (path / str(name)).exists():
            raise UserError(f"{path} lacks {name}, a part of its weights")
        flat |= read_safetensors(path / name)
    return flat, config, processor


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


def read_object(path: epath.Path) -> dict:
    """The JSON object in a file."""
    try:
        found = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not an object")
    return found


def converted(path: str, flat, config: dict, processor: dict, num_heads: int | None) -> dict:
    """The fields of `weights.Weights`, of timm's or transformers' tensors.

    num_heads: where the config doesn't tell; None: those of the published size.

    Raises:
        UserError: of another model than timm's `VisionTransformer` or transformers' ViT, or of one
            that there isn't here; a setting that can't be.
    """
    kind = setting(config, path, "model_type", str, "vit")
    what = architecture.looks_like(flat)
    if what or kind != "vit":
        raise UserError(f"{path} holds no model of ours: {what_it_is(flat, config)}")
    for kernel, convert in (
        ("embeddings.patch_embeddings.projection.weight", from_hf),
        ("patch_embed.proj.weight", from_timm),
    ):
        for name in (kernel, f"vit.{kernel}"):
            if name in flat and flat[name].ndim == 4:
                return convert(path, flat, len(flat[name]), config, processor, num_heads)
    raise UserError(f"{path} holds no Vision Transformer: {what_it_is(flat, config)}")


def from_hf(path: str, flat, width: int, config: dict, processor: dict, num_heads) -> dict:
    num_heads = setting(config, path, "num_attention_heads", int, num_heads)
    fields = {"pool": "cls", "pool_norm": "before", "norm": "pre", "posemb": "learned"}
    fields["layer_norm_eps"] = setting(config, path, "layer_norm_eps", (int, float), 1e-12)
    fields["gelu"] = gelu(path, setting(config, path, "hidden_act", str, "gelu"))
    if "num_attention_heads" in config:
        fields["num_heads"] = num_heads
    pooler = setting(config, path, "pooler_act", str, "tanh")
    if pooler != "tanh":  # no representation layer of ours
        flat = {name: value for name, value in flat.items() if "pooler." not in name}
    several = config.get("problem_type") == "multi_label_classification"
    normalized = setting(processor, path, "do_normalize", bool, True)
    return dict(
        params=formats.from_hf(flat, heads(path, num_heads, width)),
        fields=fields,
        mean=numbers(processor, path, "image_mean") if normalized else (0.0,),
        std=numbers(processor, path, "image_std") if normalized else (1.0,),
        image_size=size(config, path, "image_size"),
        keep=kept(path, processor) if processor else None,
        class_names=names_by_label(setting(config, path, "id2label", dict, {})),
        loss="sigmoid" if several else None,
    )


def from_timm(path: str, flat, width: int, config: dict, processor: dict, num_heads) -> dict:
    arguments = setting(config, path, "model_args", dict, {})
    pretrained = setting(config, path, "pretrained_cfg", dict, config)
    name = setting(config, path, "architecture", str, "")
    num_heads = setting(arguments, path, "num_heads", int, num_heads)
    activation = "gelu_tanh" if re.search(TANH_SIGLIPS, name) else "gelu"
    fields = {
        "layer_norm_eps": 1e-6,
        "norm": "pre",
        "posemb": "learned" if "pos_embed" in flat else "none",
        "pool": timm_pool(path, flat, config, arguments),
        "pool_norm": "after" if "fc_norm.weight" in flat else "before",
        "gelu": gelu(path, setting(arguments, path, "act_layer", str, activation)),
    }
    if "num_heads" in arguments:
        fields["num_heads"] = num_heads
    no_embed_class = setting(arguments, path, "no_embed_class", bool)
    image_size = size(arguments, path, "img_size")
    if image_size is None:
        image_size = tuple(setting(pretrained, path, "input_size", list, [])[1:]) or None
    names = config.get("label_names") or pretrained.get("label_names")
    return dict(
        params=formats.from_timm(flat, heads(path, num_heads, width), no_embed_class),
        fields=fields,
        mean=numbers(pretrained, path, "mean"),
        std=numbers(pretrained, path, "std"),
        image_size=image_size,
        keep=setting(pretrained, path, "crop_pct", (int, float)),
        class_names=tuple(map(str, names)) if isinstance(names, list) else None,
    )


def timm_pool(path: str, flat, config: dict, arguments: dict) -> str:
    """Our name for timm's pooling; told from the tensors where no config does."""
    has_class_token = "cls_token" in flat
    guessed = "token" if has_class_token and "fc_norm.weight" not in flat else "avg"
    guessed = "map" if "attn_pool.latent" in flat else guessed
    pool = setting(config, path, "global_pool", str, guessed)
    pool = setting(arguments, path, "global_pool", str, pool)
    if pool not in TIMM_POOLS or (has_class_token and pool != "token"):
        beside = " beside a class token" if has_class_token else ""
        raise UserError(f"{path} is of a model that pools by {pool!r}{beside}: there's none here")
    return TIMM_POOLS[pool]


def kept(path: str, processor: dict) -> float:
    """The part of the resized image's shorter side that transformers' processor keeps."""
    crop, resized = processor.get("crop_size"), processor.get("size")
    if not processor.get("do_center_crop") or not crop or not resized:
        return 1.0
    edges = []
    for value in (crop, resized):
        value = min(value.values(), default=None) if isinstance(value, dict) else value
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f"{path}: its processor resizes to {resized} and crops {crop}: no sizes"
            )
        edges.append(value)
    return min(edges[0] / edges[1], 1.0)


def names_by_label(id2label: dict) -> tuple[str, ...] | None:
    """The names in the labels' order; None where they are transformers' own for none."""
    names = {int(label): str(name) for label, name in id2label.items() if str(label).isdigit()}
    if all(name == f"LABEL_{label}" for label, name in names.items()):
        return None
    return tuple(names.get(label, f"class {label}") for label in range(max(names) + 1))


def gelu(path: str, activation: str) -> str:
    if activation in TANH_GELUS:
        return "tanh"
    if activation != "gelu":
        raise UserError(
            f"{path} is of a model with the activation {activation!r}: there's none here"
        )
    return "exact"


def heads(path: str, num_heads: int | None, width: int) -> int:
    """The number given, or that of the published size."""
    if num_heads is None:
        num_heads = architecture.likely_heads(width)
        if num_heads is None:
            raise UserError(
                f"{path} doesn't tell how many heads its {width} channels are: give num_heads"
            )
    # Where that can't be, the widths differ, and the shapes will tell.
    return num_heads if num_heads > 0 and width % num_heads == 0 else 1


def setting(config: dict, path, name: str, kind, default=None):
    """A setting of a JSON file, where it has it (null is none); UserError for another kind."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise UserError(f"{path}: the {name} beside it is {value!r}, which it can't be")
    return value


def numbers(config: dict, path, name: str) -> tuple[float, ...] | None:
    """One number, or one a channel."""
    values = setting(config, path, name, (int, float, list))
    if values is None:
        return None
    values = values if isinstance(values, list) else [values]
    if not values or not all(isinstance(value, (int, float)) for value in values):
        raise UserError(f"{path}: the {name} beside it is {values!r}, which it can't be")
    return tuple(map(float, values))


def size(config: dict, path, name: str) -> tuple[int, int] | None:
    """An edge, or (height, width)."""
    value = setting(config, path, name, (int, list))
    if value is None:
        return None
    sides = tuple(value) if isinstance(value, list) else (value, value)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"{path}: the {name} beside it is {value!r}, which it can't be")
    return sides


def what_it_is(flat, config: dict) -> str:
    """What else the parameters may be of, for a message."""
    named = config.get("architectures") or [config.get("architecture") or config.get("model_type")]
    words = [f"its config.json says {named[0]}"] if isinstance(named, list) and named[0] else []
    if what := architecture.looks_like(flat):
        words.append(f"it looks like {what}")
    return ", and ".join(words) or f"its parameters are {', '.join(sorted(flat)[:3])}, ..."
