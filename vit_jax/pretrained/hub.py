"""Reads weights of timm and transformers, with the settings in the JSON files beside them."""

import importlib
import logging
import numbers
import re
import tempfile

import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath

from vit_jax.checks import SQUEEZE, size_pair
from vit_jax.errors import UserError, first_line
from vit_jax.paths import CLS, REG, is_known
from vit_jax.pretrained import architecture, formats
from vit_jax.storage.files import read_json_object

logger = logging.getLogger("vit_jax")

TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_tanh")
# `eval_method` -> Pillow's number in preprocessor_config.json; timm has the same names.
RESAMPLE_CODES = {"bilinear": 2, "bicubic": 3}

TIMM_POOLS = {"token": "cls", "avg": "gap", "map": "map", "": "none"}

# What the models of transformers compute, by model_type, as far as config.json may leave it out:
# `pools`: of a model with a head for classes, and of one without (None: isn't supported).
FAMILIES = {
    "vit": dict(layer_norm_eps=1e-12, activation="gelu", pools=("cls", "cls")),
    "deit": dict(layer_norm_eps=1e-12, activation="gelu", pools=("cls", "cls"), embed_reg=True),
    "vit_mae": dict(layer_norm_eps=1e-12, activation="gelu", pools=(None, "none")),
    "ijepa": dict(layer_norm_eps=1e-12, activation="gelu", pools=("gap", "none")),
    "dinov2": dict(layer_norm_eps=1e-6, activation="gelu", pools=("cls_gap", "cls")),
    "dinov2_with_registers": dict(layer_norm_eps=1e-6, activation="gelu", pools=("cls_gap", "cls")),
    "dinov3_vit": dict(
        layer_norm_eps=1e-5,
        activation="gelu",
        pools=("cls", "cls"),
        posemb="none",
        rope="axial",
        rope_grid="centered",
    ),
    "clip_vision_model": dict(
        layer_norm_eps=1e-5, activation="quick_gelu", pools=(None, "cls"), pool_norm="after"
    ),
    "siglip_vision_model": dict(
        layer_norm_eps=1e-6, activation="gelu_pytorch_tanh", pools=(None, "map")
    ),
}

# Arguments of timm's models that are read, that show in the parameters, or that only concern
# training; others may change what a model computes.
TIMM_ARGUMENTS = (
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth"),
    *("num_heads", "mlp_ratio", "qkv_bias", "qk_norm", "proj_bias", "init_values", "class_token"),
    *("pos_embed", "no_embed_class", "reg_tokens", "num_reg_tokens", "pre_norm", "fc_norm"),
    *("use_fc_norm", "final_norm", "act_layer", "dynamic_img_size", "dynamic_img_pad"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "weight_init", "fix_init", "head_init_scale", "qkv_fused", "swiglu_mlp"),
    *("scale_mlp", "use_abs_pos_emb", "use_rot_pos_emb", "use_pre_transformer_norm"),
    *("use_post_transformer_norm", "rope_type", "rope_grid_indexing", "rope_temperature"),
    *("rope_rotate_half", "ref_feat_shape", "attn_type", "rope_shift_coords"),
    *("rope_jitter_coords", "rope_rescale_coords", "scale_mlp_norm"),
)

# Types in .safetensors files that safetensors doesn't convert to NumPy's.
FLOAT8 = {"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2}

# Sizes in config.json -> fields of the model, which the tensors determine.
HF_SIZES = {"hidden_size": "width", "num_hidden_layers": "depth", "intermediate_size": "mlp_dim"}
TIMM_SIZES = {"embed_dim": "width", "depth": "depth"}

JSON_TYPES = {
    str: "a string",
    int: "a whole number",
    (int, float): "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


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
            f"{path} has model.safetensors but no config.json: give the path of the file instead"
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


LFS_POINTER = b"version https://git-lfs"


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


def convert(path: str, tensors, config: dict, processor: dict, num_heads: int | None) -> dict:
    """Converts tensors of timm or transformers, and their settings, to fields of `Weights`.

    Args:
        path: for messages.
        tensors: the state dict.
        config, processor: config.json and preprocessor_config.json; {} if missing.
        num_heads: used if the config doesn't specify it; None: the published size's.

    Raises:
        UserError: a model that this code doesn't have, parts that it doesn't have, or an
            impossible setting.
    """
    model_type = get_setting(config, path, "model_type", str, "vit")
    vision = get_setting(config, path, "vision_config", dict, {})
    if vision and f"{model_type}_vision_model" in FAMILIES:  # an image-and-text model
        model_type = f"{model_type}_vision_model"
        config = {"image_size": 224, **vision, "model_type": model_type}
    compared = [] if model_type in formats.WITH_OTHER_PARTS else tensors
    if model_type not in FAMILIES or architecture.recognize_other_model(compared):
        raise UserError(f"{path} can't be read: {describe_contents(tensors, config)}")
    prefix = formats.HF_PREFIXES.get(model_type, f"{model_type}.")
    for kernel, convert_tensors in (
        ("embeddings.patch_embeddings.projection.weight", convert_hf),
        ("embeddings.patch_embeddings.weight", convert_hf),
        ("embeddings.patch_embedding.weight", convert_hf),
        ("patch_embed.proj.weight", convert_timm),
    ):
        for name in (kernel, f"{prefix}{kernel}"):
            if name in tensors and tensors[name].ndim == 4:
                width = len(tensors[name])
                read = convert_tensors(path, tensors, width, config, processor, num_heads)
                check_explained(path, read["params"])
                return read
    raise UserError(f"{path} holds no Vision Transformer: {describe_contents(tensors, config)}")


def check_explained(path: str, params) -> None:
    """Raises UserError naming the parameters that no field of the model explains."""
    unknown = [
        re.sub(r"/(kernel|scale)$", ".weight", name) for name in params if not is_known(name)
    ]
    if unknown := sorted({re.sub(r"\b\d+\b", "*", name).replace("/", ".") for name in unknown}):
        listed = ", ".join(unknown[:MAX_UNKNOWN])
        more = f" and {len(unknown) - MAX_UNKNOWN} more" if len(unknown) > MAX_UNKNOWN else ""
        raise UserError(f"{path} has parts that no field of the model explains: {listed}{more}")


MAX_UNKNOWN = 6  # parameters in a message


def convert_hf(path: str, tensors, width: int, config: dict, processor: dict, num_heads) -> dict:
    """Converts a model of transformers."""
    model_type = get_setting(config, path, "model_type", str, "vit")
    family = FAMILIES[model_type]
    num_heads = get_setting(config, path, "num_attention_heads", int, num_heads)
    fields = {"pool_norm": "before", "norm": "pre", "posemb": "learned", **family}
    activation, pools = fields.pop("activation"), fields.pop("pools")
    has_head = any("classifier." in name for name in tensors)
    fields["pool"] = pools[0] if has_head else pools[1]
    if fields["pool"] is None:
        raise UserError(f"{path} can't be read: {describe_contents(tensors, config)}")
    if fields["pool"] == "map" and not any(name.endswith("head.probe") for name in tensors):
        fields["pool"] = "none"
    eps = get_setting(config, path, "layer_norm_eps", (int, float), fields["layer_norm_eps"])
    fields["layer_norm_eps"] = eps
    if not any(".gate_proj." in name or ".weights_in." in name for name in tensors):
        hidden_act = get_setting(config, path, "hidden_act", str, activation)
        fields["gelu"] = gelu_field(path, hidden_act)
    if "num_attention_heads" in config:
        fields["num_heads"] = num_heads
    if model_type == "dinov3_vit":
        fields["rope_temperature"] = hf_rope_temperature(path, config)
    if get_setting(config, path, "pooler_act", str, "tanh") != "tanh":
        # Only a tanh layer is a representation layer.
        tensors = {name: value for name, value in tensors.items() if "pooler." not in name}
    multi_label = config.get("problem_type") == "multi_label_classification"
    check_rescaling(path, processor)
    normalizes = get_setting(processor, path, "do_normalize", bool, True)
    params = formats.from_hf(tensors, resolve_num_heads(path, num_heads, width), model_type)
    if params.get(REG) is not None and not params[REG].shape[1]:
        del params[REG]
    check_sizes(path, config, HF_SIZES, params)
    num_reg = params[REG].shape[1] if REG in params else 0
    return dict(
        params=params,
        fields=fields,
        prefix_rows=(1 + num_reg * fields.get("embed_reg", False),),
        mean=get_numbers(processor, path, "image_mean") if normalizes else (0.0,),
        std=get_numbers(processor, path, "image_std") if normalizes else (1.0,),
        image_size=get_size(config, path, "image_size"),
        eval_crop=processor_crop(path, processor) if processor else None,
        eval_method=processor_method(path, processor) if processor else None,
        class_names=class_names(get_setting(config, path, "id2label", dict, {})),
        loss="sigmoid" if multi_label else None,
    )


def hf_rope_temperature(path: str, config: dict) -> float:
    """Returns the field `rope_temperature` of a DINOv3 of transformers."""
    parameters = get_setting(config, path, "rope_parameters", dict, {})
    kind = get_setting(parameters, path, "rope_type", str, "default")
    if kind != "default":
        raise UserError(f"{path}: its rotary positions are {kind!r}, which isn't supported")
    theta = get_setting(config, path, "rope_theta", (int, float), 100.0)
    return float(get_setting(parameters, path, "rope_theta", (int, float), theta))


def convert_timm(path: str, tensors, width: int, config: dict, processor: dict, num_heads) -> dict:
    """Converts timm's `VisionTransformer` or `Eva`."""
    arguments = get_setting(config, path, "model_args", dict, {})
    pretrained = get_setting(config, path, "pretrained_cfg", dict, config)
    name = get_setting(config, path, "architecture", str, "")
    check_timm(path, tensors, name, arguments)
    known = architecture.timm_fields(name)
    num_heads = known.get("num_heads") if num_heads is None else num_heads
    num_heads = get_setting(arguments, path, "num_heads", int, num_heads)
    fields = {
        "layer_norm_eps": 1e-6,
        "norm": "pre",
        **known,
        "posemb": "learned" if "pos_embed" in tensors else "none",
        "pool": timm_pool(path, tensors, config, arguments),
        "pool_norm": "after" if "fc_norm.weight" in tensors else "before",
    }
    if formats.has_swiglu(tensors):
        activation = get_setting(arguments, path, "act_layer", str, "silu")
        if activation not in ("silu", "swish"):
            raise UserError(f"{path}: its gated MLPs have {activation!r}; only 'silu' is supported")
    else:
        activation = {"tanh": "gelu_tanh", "quick": "quick_gelu"}.get(known.get("gelu"), "gelu")
        activation = get_setting(arguments, path, "act_layer", str, activation)
        fields["gelu"] = gelu_field(path, activation)
    if num_heads is not None and ("num_heads" in arguments or "num_heads" in known):
        fields["num_heads"] = num_heads
    default = fields.pop("no_embed_class", None)
    no_embed_class = get_setting(arguments, path, "no_embed_class", bool, default)
    num_heads = resolve_num_heads(path, num_heads, width)
    image_size = get_size(arguments, path, "img_size")
    if image_size is None:
        input_size = get_setting(pretrained, path, "input_size", list, [])
        image_size = tuple(input_size[1:]) or None
    names = config.get("label_names") or pretrained.get("label_names")
    params = formats.from_timm(tensors, num_heads, timm_rope(path, name, arguments, fields))
    check_sizes(path, arguments, TIMM_SIZES, params)
    num_rows = sum(params[name].shape[1] for name in (CLS, REG) if name in params)
    return dict(
        params=params,
        # timm's default is a row, but its FlexiViT models have none and don't say so.
        prefix_rows=(num_rows, 0) if no_embed_class is None else (num_rows * (not no_embed_class),),
        fields=fields,
        mean=get_numbers(pretrained, path, "mean"),
        std=get_numbers(pretrained, path, "std"),
        image_size=image_size,
        eval_crop=timm_crop(path, pretrained) if pretrained else None,
        eval_method=timm_method(path, pretrained) if pretrained else None,
        class_names=tuple(map(str, names)) if isinstance(names, list) else None,
    )


def check_timm(path: str, tensors, name: str, arguments: dict) -> None:
    """Raises UserError for a model of timm that this code doesn't have, with its reason."""
    for pattern, reason in architecture.OTHER_ARCHITECTURES:
        if re.search(pattern, name):
            raise UserError(f"{path} can't be read: timm's {name} {reason}, which isn't supported")
    if "norm.weight" not in tensors and "fc_norm.weight" not in tensors:
        raise UserError(f"{path} can't be read: it has no norm after its blocks")
    is_eva = any(".gamma_1" in n or ".q_bias" in n or ".fc1_g." in n for n in tensors)
    if is_eva and not name:
        raise UserError(
            f"{path} looks like an EVA-02 or another model with rotary positions, which its "
            "parameters don't show: give the folder, with config.json"
        )
    for argument, value in arguments.items():
        if argument not in TIMM_ARGUMENTS and value not in (None, False):
            raise UserError(
                f"{path} can't be read: its model_args have {argument}={value!r}, which isn't "
                "supported"
            )


def timm_rope(path: str, name: str, arguments: dict, fields: dict) -> str | None:
    """Completes the fields of rotary positions; returns the layout for `formats.from_timm`."""
    if "use_rot_pos_emb" in arguments and not arguments["use_rot_pos_emb"]:
        for field in ("rope", "rope_temperature", "rope_grid"):
            fields.pop(field, None)
    elif arguments.get("use_rot_pos_emb"):
        kinds = {"cat": "axial", "dinov3": "axial", "mixed": "mixed"}
        kind = get_setting(arguments, path, "rope_type", str, "cat")
        if kind not in kinds:
            raise UserError(f"{path}: its rope_type is {kind!r}, which isn't supported")
        fields |= {"rope": kinds[kind], "rope_temperature": 1e4, "rope_grid": "index"}
        if kind == "dinov3":
            fields["rope_grid"] = "centered"
    if "rope" not in fields:
        return None
    temperature = fields["rope_temperature"]
    temperature = get_setting(arguments, path, "rope_temperature", (int, float), temperature)
    fields["rope_temperature"] = float(temperature)
    if (grid := get_size(arguments, path, "ref_feat_shape")) is not None:
        fields["rope_grid"] = grid
    is_half = "dinov3" in name or "lingbot" in name
    if get_setting(arguments, path, "rope_rotate_half", bool, is_half):
        return "half"
    if fields["rope"] == "mixed":
        return "pairs_mixed"
    indexing = "xy" if re.search(r"_rope_(ape_)?\d", name) else "ij"
    indexing = get_setting(arguments, path, "rope_grid_indexing", str, indexing)
    return "pairs_xy" if indexing == "xy" else "pairs"


def check_sizes(path: str, settings: dict, names: dict[str, str], params) -> None:
    """Raises UserError if config.json belongs to a model of another size than the tensors do."""
    stored = architecture.infer_fields({name: value.shape for name, value in params.items()})
    patch_size = get_size(settings, path, "patch_size")
    if stored and patch_size not in (None, size_pair("patch_size", stored["patch_size"])):
        raise UserError(
            f"{path}: config.json says patch_size {settings['patch_size']}, but the patches of the "
            f"tensors are of {stored['patch_size']} pixels"
        )
    for name, field in names.items():
        declared = get_setting(settings, path, name, int)
        if stored and declared not in (None, stored[field]):
            raise UserError(
                f"{path}: config.json says {name} {declared}, but the tensors have "
                f"{stored[field]}: the two files belong to different models, or one is incomplete"
            )


def check_rescaling(path: str, processor: dict) -> None:
    """Raises UserError unless pixels are scaled to [0, 1] before they are normalized."""
    factor = get_setting(processor, path, "rescale_factor", (int, float), 1 / 255)
    if not get_setting(processor, path, "do_rescale", bool, True) or abs(factor * 255 - 1) > 1e-3:
        raise UserError(
            f"{path}: preprocessor_config.json doesn't scale pixels by 1/255, which isn't supported"
        )


def timm_pool(path: str, tensors, config: dict, arguments: dict) -> str:
    """Returns the field `pool`, from timm's config or, without one, from the tensors."""
    has_class_token = "cls_token" in tensors
    default = "token" if has_class_token and "fc_norm.weight" not in tensors else "avg"
    default = "map" if "attn_pool.latent" in tensors else default
    pool = get_setting(config, path, "global_pool", str, default)
    pool = get_setting(arguments, path, "global_pool", str, pool)
    if pool not in TIMM_POOLS:
        raise UserError(f"{path}: its model pools by {pool!r}, which isn't supported")
    return TIMM_POOLS[pool]


def timm_crop(path: str, settings: dict) -> float | str:
    """Returns the `eval_crop` of timm's pretrained_cfg; the defaults are timm's."""
    share = get_setting(settings, path, "crop_pct", (int, float)) or 0.875
    mode = get_setting(settings, path, "crop_mode", str, "center")
    if mode not in ("center", "squash"):
        warn_unsupported(path, "crop_mode", mode, "center")
    if mode == "squash" and share != 1.0:  # a crop of what was squeezed
        warn_unsupported(path, "crop_pct of images that are squashed", share, 1.0)
    return SQUEEZE if mode == "squash" else share


def timm_method(path: str, settings: dict) -> str:
    """Returns the `eval_method` of timm's pretrained_cfg; the default is timm's."""
    method = get_setting(settings, path, "interpolation", str, "bicubic")
    if method in RESAMPLE_CODES:
        return method
    return warn_unsupported(path, "interpolation", method, "bicubic")


def processor_crop(path: str, processor: dict) -> float | str:
    """Returns the `eval_crop` of a processor: the share of the shorter side, or SQUEEZE.

    If images are squeezed and then cropped, they are only cropped here.
    """
    crop, resized = processor.get("crop_size"), processor.get("size")
    if not processor.get("do_center_crop") or not crop or not resized:
        keeps_proportions = isinstance(resized, dict) and "shortest_edge" in resized
        return 1.0 if keeps_proportions else SQUEEZE
    sides = []
    for size in (crop, resized):
        side = min(size.values(), default=None) if isinstance(size, dict) else size
        if not isinstance(side, int) or side < 1:
            raise UserError(
                f"{path}: size is {resized} and crop_size {crop}; both must be in pixels, above 0"
            )
        sides.append(side)
    return min(sides[0] / sides[1], 1.0)


def processor_method(path: str, processor: dict) -> str:
    """Returns the `eval_method` of a processor; the default is that of ViTImageProcessor."""
    code = get_setting(processor, path, "resample", int, RESAMPLE_CODES["bilinear"])
    for method, known in RESAMPLE_CODES.items():
        if code == known:
            return method
    return warn_unsupported(path, "resample", code, "bilinear")


def warn_unsupported(path: str, name: str, value, used):
    """Logs a warning that a setting of evaluation isn't supported; returns what is used instead."""
    logger.warning(f"{path}: {name} is {value!r}, which isn't supported: evaluation uses {used!r}")
    return used


def class_names(id2label: dict) -> tuple[str, ...] | None:
    """Returns the names in the order of the labels; None for transformers' placeholders."""
    names = {int(label): str(name) for label, name in id2label.items() if str(label).isdigit()}
    if all(name == f"LABEL_{label}" for label, name in names.items()):
        return None
    return tuple(names.get(label, f"class {label}") for label in range(max(names) + 1))


def gelu_field(path: str, activation: str) -> str:
    """Returns the field `gelu` for the name of an activation."""
    if activation in TANH_GELUS:
        return "tanh"
    if activation == "quick_gelu":
        return "quick"
    if activation != "gelu":
        raise UserError(
            f"{path}: its model has the activation {activation!r}; only 'gelu', 'quick_gelu' and "
            f"{', '.join(map(repr, TANH_GELUS))} are supported"
        )
    return "exact"


def resolve_num_heads(path: str, num_heads: int | None, width: int) -> int:
    """Returns `num_heads` if given, or else that of the published size with this width."""
    if num_heads is None:
        num_heads = architecture.published_num_heads(width)
        if num_heads is None:
            raise UserError(
                f"{path} doesn't specify the number of attention heads, and no published size has "
                f"width {width}: give num_heads (--num_heads)"
            )
    if not isinstance(num_heads, numbers.Integral) or num_heads < 1 or width % num_heads:
        raise UserError(f"num_heads is {num_heads}; it must divide the width of {path}, {width}")
    return num_heads


def get_setting(settings: dict, path, name: str, kind, default=None):
    """Returns a setting from a JSON file, or `default` if it is missing or null.

    Raises:
        UserError: a value that isn't of the type (or types) `kind`.
    """
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise UserError(f"{path}: {name} is {value!r}; it must be {JSON_TYPES[kind]}")
    return value


def get_numbers(settings: dict, path, name: str) -> tuple[float, ...] | None:
    """Returns a setting that is a number, or a list with a number per channel."""
    values = settings.get(name)
    if values is None:
        return None
    per_channel = values if isinstance(values, list) else [values]
    if not per_channel or not all(isinstance(value, (int, float)) for value in per_channel):
        raise UserError(f"{path}: {name} is {values!r}; it must be a number, or one per channel")
    return tuple(map(float, per_channel))


def get_size(settings: dict, path, name: str) -> tuple[int, int] | None:
    """Returns a setting that is the side of a square, or a list of height and width."""
    value = settings.get(name)
    return None if value is None else size_pair(f"{path}: {name}", value)


def describe_contents(names, config: dict) -> str:
    """Returns what a message says of parameters that aren't a Vision Transformer's."""
    declared = config.get("architectures")
    declared = declared or [config.get("architecture") or config.get("model_type")]
    parts = []
    if isinstance(declared, list) and declared[0]:
        parts.append(f"its config.json says {declared[0]}")
    if model := architecture.recognize_other_model(names):
        parts.append(f"it looks like {model}")
    return ", and ".join(parts) or f"its parameters are {', '.join(sorted(names)[:3])}, ..."
