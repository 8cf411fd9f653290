"""Compiles every model size for TPU slices, and prints the table in docs/pods.md.

    pip install -r requirements-compile.txt
    python -m benchmarks.tpu_slices [SIZE...]

Each size trains with batch 4096 on the smallest v5e slice that it fits without accumulation, and on
256 chips. From H/14 on the state is split over 16 chips, or all if there are fewer. No TPU is
needed. On two cores the sizes up to L/16 take twenty minutes; each larger one takes half an hour.
"""

import sys

from configs import vit_b16, vit_h14, vit_l16, vit_s16, vit_ti16
from vit_jax.aot import compile_for, topology
from vit_jax.logs import run_log

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
    topology.use_cpu()
    run_log.start_logging()
    print("| size | slice | chips | memory | images/s | per chip | MFU | communication |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for size in sys.argv[1:] or PRESETS:
        reports = (create_report(size, sides) for sides in SLICES)
        smallest = next((report for report in reports if report["fits"]), None)
        if smallest is None:
            print(f"| {size} | doesn't fit {SLICES[-1]} | | | | | | |", flush=True)
            continue
        print(table_row(size, smallest), flush=True)
        if smallest["slice"] != f"v5e:{SLICES[-1]}":
            print(table_row(size, create_report(size, SLICES[-1])), flush=True)


def create_report(size: str, sides: str) -> dict:
    """Compiles one model size for one v5e slice; returns `compile_report.create_report`'s."""
    tpu = topology.Slice(f"v5e:{sides}")
    config = PRESETS[size].get_config()
    config.model.variant = size
    config.num_classes, config.total_steps = 1000, compile_for.ANY_STEPS
    if PRESETS[size] is vit_h14:
        config.mesh.fsdp = min(16, len(tpu.devices))
    image_shape = (config.image_size, config.image_size, config.dataset.channels)
    _, report = compile_for.compile_program(config, image_shape, tpu)
    return report


def table_row(size: str, report: dict) -> str:
    predicted = report["predicted"]
    return (
        f"| {size} | {report['slice']} | {report['devices']} | "
        f"{report['train_step']['total_bytes'] / GIB:.1f} GiB | "
        f"{predicted['images_per_second']:,.0f} | "
        f"{predicted['images_per_second_per_chip']:,.0f} | "
        f"{predicted['mfu']:.1%} | {predicted['communication_share']:.1%} |"
    )


if __name__ == "__main__":
    main()
