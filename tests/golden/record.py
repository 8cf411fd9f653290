"""Records what timm and transformers compute, as cases of tests/golden/modern.

    pip install torch timm==1.0.31 transformers==5.23.0
    python tests/golden/record.py                       # all cases below
    python tests/golden/record.py hf_dinov3 hf_mae      # some
    python tests/golden/record.py --folder=/tmp/modern  # elsewhere, to compare

Replaces the files of these cases, and their rows in index.json; the others' stay. The models are
random, so with another version of PyTorch their parameters may differ, but not what is tested:
that this code computes the same from the same files.
"""

import argparse
import importlib
import json
import pathlib
import shutil
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import peer_models

# Sizes that make all of a case less than 100 kB; images are 4 x 4 or 4 x 6 patches.
TIMM = dict(embed_dim=32, depth=2, num_heads=4, mlp_ratio=1.5, patch_size=4, num_classes=5)
GATED = TIMM | dict(mlp_ratio=1.25)
HF = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, patch_size=4)
HF_MLP = HF | dict(intermediate_size=48)
DECODER = dict(decoder_hidden_size=8, decoder_intermediate_size=8, decoder_num_hidden_layers=1)
DECODER |= dict(decoder_num_attention_heads=2, mask_ratio=0.0)
SQUARE, WIDE, HIGH = (16, 16), (16, 24), (24, 16)

# Name -> the architecture of timm, or the class of transformers; its settings; the image size.
# Each is the only case with some field of this code's model.
CASES = {
    "timm_rope_axial": ("vit_small_patch16_rope_224", TIMM, WIDE),
    "timm_rope_mixed": ("vit_small_patch16_rope_mixed_224", TIMM, HIGH),
    "timm_rope_ape": ("vit_small_patch16_rope_ape_224", TIMM, SQUARE),  # learned positions too
    # Without a class token and biases of queries, keys and values.
    "timm_rope_reg1_gap": ("vit_mediumd_patch16_rope_reg1_gap_256", TIMM, WIDE),
    # Rotations by a grid of reference, a norm in the gated MLP, and no biases of keys.
    "timm_eva02": ("eva02_base_patch14_448", GATED, WIDE),
    "timm_eva02_packed": ("eva02_tiny_patch14_224", GATED, SQUARE),  # a gate beside its values
    "timm_dinov3": (
        "vit_small_plus_patch16_dinov3_qkvb",
        GATED | dict(global_pool="token"),
        HIGH,
    ),
    "timm_rmsnorm": ("test_vit4", TIMM, SQUARE),
    "hf_dinov3": ("DINOv3ViTModel", HF_MLP | dict(num_register_tokens=3), WIDE),
    # A head on the class token beside the mean of the patches, registers, and a gated MLP.
    "hf_dinov2_reg_classifier": (
        "Dinov2WithRegistersForImageClassification",
        HF | dict(mlp_ratio=1, use_swiglu_ffn=True, num_register_tokens=3, num_labels=5),
        SQUARE,
    ),
    "hf_ijepa": ("IJepaForImageClassification", HF_MLP | dict(num_labels=5), HIGH),
    "hf_mae": ("ViTMAEForPreTraining", HF_MLP | DECODER, SQUARE),
}
# Cases that are also recorded with images of another size, to which the source itself resizes its
# positions: one side grows, the other shrinks.
RESIZED = {"timm_rmsnorm": (28, 8), "hf_dinov2_reg_classifier": (28, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="names of cases; none: all")
    parser.add_argument("--folder", type=pathlib.Path, default=HERE / "modern")
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"unknown cases {', '.join(unknown)}; known are {', '.join(CASES)}")
    rows = {name: record(name, args.folder) for name in args.cases or CASES}
    path = args.folder / "index.json"
    stored = json.loads(path.read_text()) if path.exists() else []
    rows = {row["name"]: row for row in stored} | rows
    path.write_text(json.dumps(list(rows.values()), indent=1) + "\n")


def record(name: str, folder: pathlib.Path) -> dict:
    """Writes a case's weights and outputs; returns its row of index.json."""
    library = "timm" if name.startswith("timm_") else "transformers"
    kind = "timm" if library == "timm" else "hf"
    architecture, settings, size = CASES[name]
    settings = settings | {"img_size" if kind == "timm" else "image_size": one_or_pair(size)}
    weights, expected = f"{name}.{kind}", f"{name}.expected.npz"
    shutil.rmtree(folder / weights, ignore_errors=True)
    if kind == "timm":
        model = peer_models.create_timm(architecture, settings)
        peer_models.save_timm(model, folder / weights, settings)
    else:
        model = peer_models.create_hf(architecture, settings)
        model.save_pretrained(folder / weights)
    arrays = compute(model, size, 2)
    if name in RESIZED:
        resized = compute(model, RESIZED[name], 1)
        arrays |= {f"hires_{key}": value for key, value in resized.items()}
    np.savez(folder / expected, **arrays)
    paths = (folder / expected, *(folder / weights).iterdir())
    print(f"{name}: {sum(path.stat().st_size for path in paths) / 1000:.0f} kB")
    return {
        "name": name,
        "weights": weights,
        "expected": expected,
        "source": f"{library} {importlib.import_module(library).__version__}",
        "architecture": architecture,
        "image_size": one_or_pair(size),
        "kwargs": settings,
    }


def compute(model, size: tuple[int, int], num_images: int) -> dict[str, np.ndarray]:
    """Returns random images in [-1, 1], and what the model computes from them."""
    images = np.random.default_rng(0).uniform(-1, 1, (num_images, *size, 3)).astype(np.float32)
    return {"images": images, **peer_models.compute(model, images)}


def one_or_pair(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


if __name__ == "__main__":
    main()
