"""PyTorch's state dicts: a codebase's names for this code's parameters, and PyTorch's layouts.

Parameters are flat dicts, name -> array. This code's have the names in `vit_jax/paths.py`, with
unstacked blocks. D: width, H: heads, d: D / H.
"""

import collections
import dataclasses
import re

import numpy as np

from vit_jax.errors import UserError
from vit_jax.paths import CLS, KEY, MASK_TOKEN, OUT, POSEMB, QUERY, REG, VALUE, in_block, num_blocks

Flat = dict[str, np.ndarray]

TORCH_KINDS = {"kernel": "weight", "scale": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class StateDictNames:
    """How a PyTorch codebase names its parameters: its names -> this code's.

    Attributes:
        codebase: for messages.
        tensors: parameters that aren't the weight or bias of a module. Names in blocks have {} for
            the block's index. Leading axes of size 1 may be missing.
        modules: modules with a weight and a bias, outside the blocks.
        block: the prefix of a block, with {} for its index.
        block_modules: the modules of a block. A module that corresponds to several of this code's
            has their outputs one after the other.
        num_axes: of tensors that lack leading axes of size 1.
    """

    codebase: str
    tensors: dict[str, str]
    modules: dict[str, str | tuple[str, ...]]
    block: str
    block_modules: dict[str, str | tuple[str, ...]]
    num_axes: dict[str, int] = dataclasses.field(default_factory=dict)

    def all_tensors(self, depth: int) -> dict[str, str]:
        """Returns {its tensor: this code's parameter} of a model with `depth` blocks."""
        tensors = {}
        for name, target in self.tensors.items():
            if "{}" in name:
                tensors |= {name.format(i): in_block(i, target) for i in range(depth)}
            else:
                tensors[name] = target
        return tensors

    def all_modules(self, depth: int) -> dict[str, tuple[str, ...]]:
        """Returns {its module: this code's modules} of a model with `depth` blocks."""
        modules = {name: as_tuple(targets) for name, targets in self.modules.items()}
        for i in range(depth):
            for name, targets in self.block_modules.items():
                targets = tuple(in_block(i, target) for target in as_tuple(targets))
                modules[f"{self.block.format(i)}.{name}"] = targets
        return modules


def from_state_dict(stored: Flat, names: StateDictNames, num_heads: int) -> Flat:
    """Converts a PyTorch state dict; parameters without a counterpart keep their names."""
    block = re.compile(re.escape(names.block).replace(r"\{\}", r"(\d+)") + r"\.")
    depth = 1 + max((int(m[1]) for m in map(block.match, stored) if m), default=-1)
    modules, tensors = names.all_modules(depth), names.all_tensors(depth)
    params = {}
    for name, value in stored.items():
        if name in tensors:
            is_table = tensors[name] in (CLS, REG, POSEMB, MASK_TOKEN)
            missing = 3 - value.ndim if is_table else 0
            params[tensors[name]] = value.reshape(*[1] * missing, *value.shape)
            continue
        module, _, kind = name.rpartition(".")
        targets = modules.get(module, (module,))
        if value.ndim == 0 or len(value) % len(targets):
            targets = (module,)
        parts = np.split(value, len(targets)) if len(targets) > 1 else [value]
        for target, part in zip(targets, parts, strict=True):
            params |= from_torch(target, kind, part, num_heads)
    return params


def to_state_dict(params: Flat, names: StateDictNames) -> Flat:
    """Converts to a PyTorch state dict.

    Raises:
        UserError: a parameter that the codebase has no name for.
    """
    depth = num_blocks(params)
    tensors = {target: name for name, target in names.all_tensors(depth).items()}
    modules = {}  # this code's module -> the codebase's, and its place among several
    for name, targets in names.all_modules(depth).items():
        modules |= {target: (name, place) for place, target in enumerate(targets)}
    parts = collections.defaultdict(dict)  # name in the state dict -> place -> array
    unnamed = []
    for name, value in params.items():
        module, _, kind = name.rpartition("/")
        slot, place = tensors.get(name), 0
        if slot in names.num_axes:
            value = value.reshape(value.shape[-names.num_axes[slot] :])
        if module in modules and kind in TORCH_KINDS:
            theirs, place = modules[module]
            slot, value = f"{theirs}.{TORCH_KINDS[kind]}", to_torch(module, kind, value)
        if slot is None or place in parts[slot]:
            unnamed.append(name)
        else:
            parts[slot][place] = value
    check_all_named(unnamed, names.codebase)
    return {
        name: np.concatenate([arrays[place] for place in sorted(arrays)])
        for name, arrays in parts.items()
    }


def check_all_named(unnamed: list[str], codebase: str) -> None:
    """Raises UserError if there are parameters that a codebase has no name for."""
    if unnamed:
        more = f" (and {len(unnamed) - 1} more)" if len(unnamed) > 1 else ""
        raise UserError(
            f"{unnamed[0]}{more}: {codebase} has no such parameter, so the model can't be saved "
            "in its format"
        )


def from_torch(module: str, kind: str, value, num_heads: int) -> Flat:
    """Converts one weight or bias of PyTorch; `module` is this code's name of its module."""
    if kind == "weight" and value.ndim == 1:
        return {f"{module}/scale": value}
    if kind == "weight":
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    # If the heads don't divide the width, the shape stays, and loading reports it.
    if module.endswith((QUERY, KEY, VALUE)) and value.shape[-1] % num_heads == 0:
        value = value.reshape(*value.shape[:-1], num_heads, -1)  # (D, D) -> (D, H, d)
    elif module.endswith(OUT) and kind == "weight" and len(value) % num_heads == 0:
        value = value.reshape(num_heads, -1, value.shape[-1])  # (D, D) -> (H, d, D)
    return {f"{module}/{'kernel' if kind == 'weight' else kind}": value}


def to_torch(module: str, kind: str, value) -> np.ndarray:
    """Converts one kernel, scale or bias to PyTorch's layout."""
    if kind == "scale":
        return value
    if kind == "bias":
        return value.reshape(-1)
    if value.ndim == 4:  # a convolution
        return value.transpose(3, 2, 0, 1)
    if module.endswith(OUT):  # (H, d, D) -> (D, D)
        return value.reshape(-1, value.shape[-1]).T
    return value.reshape(value.shape[0], -1).T


def add_key_biases(params: Flat) -> None:
    """Adds zeros, in place, where only queries and values have biases: of EVA and DINOv3."""
    for i in range(num_blocks(params)):
        query, key = (in_block(i, f"{part}/bias") for part in (QUERY, KEY))
        if query in params and f"{in_block(i, KEY)}/kernel" in params and key not in params:
            params[key] = np.zeros_like(params[query])


def as_tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)
