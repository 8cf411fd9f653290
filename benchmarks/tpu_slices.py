"""The README's table of TPU slices: what each size needs and does, by the TPU's compiler.

    pip install "jax[tpu]"
    python -m benchmarks.tpu_slices [SIZE...]

Each size at batch 4096 on the smallest v5e slice that it fits without accumulation, and on 256
chips. From H/14 on, the state is split over 16 chips, or as many as there are. Needs no TPU, and
about twenty minutes on two cores.
"""

import sys

from configs import vit_b16, vit_h14, vit_l16, vit_s16, vit_ti16
from vit_jax.aot import compile_for, topology
from vit_jax.runs import run_log

SLICES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
PRESETS = {
    "Ti/16": vit_ti16,
    "S/16": vit_s16,
    "B/16": vit_b16,
    "L/16": vit_l16,
    "H/14": vit_h14,
    "g/14": vit_h14,
    "G/14": vit_h14,
}
GIB = 2**30


def main():
    topology.without_accelerator()
    run_log.start_logging()
    print("| size | slice | chips | memory | images/s | a chip | MFU | communication |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for size in sys.argv[1:] or PRESETS:
        reports = (report(size, sides) for sides in SLICES)
        smallest = next(filter(None, reports), None)
        if smallest is None:
            print(f"| {size} | doesn't fit {SLICES[-1]} | | | | | | |", flush=True)
            continue
        print(row(size, smallest), flush=True)
        if smallest["slice"] != f"v5e:{SLICES[-1]}":
            print(row(size, report(size, SLICES[-1])), flush=True)


def report(size: str, sides: str) -> dict | None:
    """Of one size on one slice; None where it doesn't fit."""
    tpu = topology.Slice(f"v5e:{sides}")
    config = PRESETS[size].get_config()
    config.model.variant = size
    config.num_classes, config.total_steps = 1000, compile_for.ANY_STEPS
    if PRESETS[size] is vit_h14:
        config.mesh.fsdp = min(16, len(tpu.devices))
    _, found = compile_for.compiled(config, tpu)
    return found if found["fits"] else None


def row(size: str, found: dict) -> str:
    values = found["predicted"]
    return (
        f"| {size} | {found['slice']} | {found['devices']} | "
        f"{found['train_step']['total_bytes'] / GIB:.1f} GiB | "
        f"{values['images_per_second']:,.0f} | {values['images_per_second_per_chip']:,.0f} | "
        f"{values['mfu']:.1%} | {values['communication_share']:.1%} |"
    )


if __name__ == "__main__":
    main()
