"""The published sizes of the Vision Transformer, by the names the papers give them.

To add a size, give it a row in SIZES; it works with any patch size.
"""

from vit_jax.errors import UserError

# Ti to H: Table 1 of arXiv:2010.11929 and of arXiv:2012.12877; g, G and s: Table 2 of
# arXiv:2106.04560; SoViT: arXiv:2305.13035, section 4. mlp_dim is 4 x width unless given.
SIZES = {
    "Ti": dict(width=192, depth=12, num_heads=3),
    "S": dict(width=384, depth=12, num_heads=6),
    "B": dict(width=768, depth=12, num_heads=12),
    "L": dict(width=1024, depth=24, num_heads=16),
    "H": dict(width=1280, depth=32, num_heads=16),
    "g": dict(width=1408, depth=40, num_heads=16, mlp_dim=6144),
    "G": dict(width=1664, depth=48, num_heads=16, mlp_dim=8192),
    "s": dict(width=256, depth=6, num_heads=8),
    "SoViT-150m": dict(width=880, depth=18, num_heads=16, mlp_dim=2320),
    "SoViT-400m": dict(width=1152, depth=27, num_heads=16, mlp_dim=4304),
}

# Size, patch size (in features of the stem) and units of each stage of the stem, as in Google's
# configs/models.py; R50+B/32 and R50+L/16 as in section 4.1 of arXiv:2010.11929. A patch of
# R+Ti/16 covers 32 pixels, in Google's code too: its stem, the root alone, already has stride 4.
HYBRIDS = {
    "R+Ti/16": dict(size="Ti", patch_size=8, num_layers=()),
    "R26+S/32": dict(size="S", patch_size=1, num_layers=(2, 2, 2, 2)),
    "R26+B/32": dict(size="B", patch_size=1, num_layers=(2, 2, 2, 2)),
    "R50+B/32": dict(size="B", patch_size=1, num_layers=(3, 4, 6, 3)),
    "R50+B/16": dict(size="B", patch_size=1, num_layers=(3, 4, 9)),
    "R50+L/32": dict(size="L", patch_size=1, num_layers=(3, 4, 6, 3)),
    "R50+L/16": dict(size="L", patch_size=1, num_layers=(3, 4, 9)),
}

PUBLISHED = (
    *("Ti/16", "S/32", "S/16", "B/32", "B/28", "B/16", "B/8", "L/32", "L/16", "H/14", "g/14"),
    *("G/14", "s/28", "s/16", "SoViT-150m/14", "SoViT-400m/14"),
)
# Names in the text of arXiv:2305.13035, and big_vision's.
ALIASES = {
    "SoViT-150m": "SoViT-150m/14",
    "SoViT-400m": "SoViT-400m/14",
    "So400m/14": "SoViT-400m/14",
}


def fields(variant: str) -> dict:
    """Returns the module fields that a name such as "B/16" stands for.

    Args:
        variant: SIZE/PATCH, with any patch size in pixels ("S/14"), or a hybrid in HYBRIDS, or a
            name in ALIASES.

    Raises:
        UserError: an unknown name.
    """
    variant = ALIASES.get(variant, variant)
    if hybrid := HYBRIDS.get(variant):
        resnet = dict(num_layers=hybrid["num_layers"], width_factor=1)
        return size_fields(hybrid["size"]) | dict(patch_size=hybrid["patch_size"], resnet=resnet)
    size, _, patch_size = str(variant).rpartition("/")
    if size not in SIZES or not patch_size.isdecimal() or int(patch_size) < 1:
        raise UserError(
            f"Unknown variant {variant!r}: expected SIZE/PATCH with one of the sizes "
            f"{', '.join(SIZES)}; the published variants are {' '.join((*PUBLISHED, *HYBRIDS))}"
        )
    return size_fields(size) | dict(patch_size=int(patch_size))


def size_fields(size: str) -> dict:
    """Returns the fields of a row of SIZES, mlp_dim included."""
    return dict(mlp_dim=4 * SIZES[size]["width"]) | SIZES[size]
