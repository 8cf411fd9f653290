"""The published sizes of the Vision Transformer, by the names the papers give them."""

import re

from vit_jax.errors import UserError

# Ti to H: Table 1 of arXiv:2010.11929 and of arXiv:2012.12877; g and G: Table 2 of
# arXiv:2106.04560.
SIZES = {
    "Ti": dict(width=192, depth=12, mlp_dim=768, num_heads=3),
    "S": dict(width=384, depth=12, mlp_dim=1536, num_heads=6),
    "B": dict(width=768, depth=12, mlp_dim=3072, num_heads=12),
    "L": dict(width=1024, depth=24, mlp_dim=4096, num_heads=16),
    "H": dict(width=1280, depth=32, mlp_dim=5120, num_heads=16),
    "g": dict(width=1408, depth=40, mlp_dim=6144, num_heads=16),
    "G": dict(width=1664, depth=48, mlp_dim=8192, num_heads=16),
}

# Patch (in features of the stem) and units of the stem's stages, as in Google's configs/models.py.
# The patch of R+Ti/16 spans 32 pixels, there as here: the root alone already strides by four.
HYBRIDS = {
    "R+Ti/16": (8, ()),
    "R26+S/32": (1, (2, 2, 2, 2)),
    "R26+B/32": (1, (2, 2, 2, 2)),
    "R50+B/16": (1, (3, 4, 9)),
    "R50+L/32": (1, (3, 4, 6, 3)),
}

PUBLISHED = ("Ti/16", "S/32", "S/16", "B/32", "B/16", "B/8", "L/32", "L/16", "H/14", "g/14", "G/14")


def fields(variant: str) -> dict:
    """The module fields a name such as "B/16" stands for: a size and a patch edge in pixels.

    Any patch goes with any size ("S/14"); hybrids are those of HYBRIDS. Raises UserError for
    another name.
    """
    if variant in HYBRIDS:
        patch_size, num_layers = HYBRIDS[variant]
        size = variant.partition("+")[2].partition("/")[0]
        resnet = dict(num_layers=num_layers, width_factor=1)
        return dict(SIZES[size], patch_size=patch_size, resnet=resnet)
    match = re.fullmatch(r"([A-Za-z]+)/([1-9]\d*)", str(variant))
    if not match or match[1] not in SIZES:
        raise UserError(
            f"Unknown variant {variant!r}: expected SIZE/PATCH with a size of "
            f"{', '.join(SIZES)}; published are {' '.join((*PUBLISHED, *HYBRIDS))}"
        )
    return dict(SIZES[match[1]], patch_size=int(match[2]))
