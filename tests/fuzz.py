"""Starts train.py with one field of the configuration drawn at random, up to the first step.

    python tests/fuzz.py --seed=0 --draws=300

Every start must either be refused, by one line and exit code 2, or accept a value that makes sense:
`unfit` tells which don't. With flags of train.py this file is train.py itself, but stops before
compiling.
"""

import argparse
import itertools
import json
import math
import pathlib
import random
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

ACCEPTED = "Accepted: "
HUGE = 10**9

NUMBERS = ("-1", "-1000000", "0", "0.0", "-0.5", "1.5", "1e30", "-1e30", "nan", "inf", "-inf")
VALUES = {
    int: (*NUMBERS, "2147483647", "2147483648", str(10**20), "x", "True", "None", "(1,)"),
    float: (*NUMBERS, "1.0", "2.0", "5", "x", "None", "(0.5,)"),
    bool: ("maybe", "2", "None", "-1"),
    str: ("nonsense", "", "None", "5", "../x", "a b", "é", "train[", "(1,)"),
    tuple: ("()", "(nan,)", "(-1.0,)", "(0.0,)", "('a',)", "(1,2,3,4)", "5", "x", "((),)", "None"),
}
VALUES[type(None)] = tuple(dict.fromkeys(itertools.chain(*VALUES.values())))

# Fields for which a negative number is a valid value.
MAY_BE_NEGATIVE = ("mesh.data", "mesh.fsdp", "mesh.tensor", "model.head_bias_init")
MAY_BE_HUGE = (
    *(
        "dataset.in_memory_mb",
        "dataset.eval_cache_mb",
        "dataset.shuffle_buffer",
        "grad_clip_norm",
        "seed",
    ),
    *("model.head_bias_init", "log_every_steps", "eval_every_steps", "checkpoint_every_steps"),
    *("keep_every_steps", "schedule.timescale", "schedule.decay_steps", "schedule.cooldown_steps"),
    *("augment.mixup_alpha", "augment.cutmix_alpha", "total_steps"),
)
MAY_NOT_BE_ZERO = (
    *("num_epochs", "total_steps", "batch_size", "accum_steps", "image_size", "augment.std"),
    *("augment.crop_keep", "augment.eval_crop", "augment.crop_area", "augment.erasing_area"),
    *("model.width", "model.depth", "model.num_heads", "model.mlp_dim", "model.patch_size"),
    *("model.layer_norm_eps", "optimizer.eps", "optimizer.layer_decay", "schedule.timescale"),
    *("schedule.decay_factor", "dataset.channels", "dataset.shuffle_buffer"),
    *("masked_patches.bits", "masked_patches.share"),
    *("dataset.repeats", "augment.crop_beta"),
)


def fields() -> dict:
    """Returns the default of every field, by its name."""
    from configs import common

    def flatten(config, prefix=""):
        for name, value in config.items():
            if hasattr(value, "items"):
                yield from flatten(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return dict(flatten(common.get_config()))


def draw(seed: int, number: int) -> tuple[str, str]:
    """Returns the field of a draw and the value that it gets, as text."""
    rng = random.Random(f"{seed}/{number}")
    field, default = rng.choice(sorted(fields().items()))
    kinds = VALUES if rng.random() < 0.2 else [type(default)]  # a value of another type
    return field, rng.choice(VALUES[rng.choice(list(kinds))])


def start(field: str, text: str, workdir) -> str | None:
    """Starts a run with a field set; returns what is wrong with how it went, if anything is."""
    import forked

    flags = ("--config=configs/digits.py:quick", f"--config.{field}={text}")
    result = forked.Script("tests/fuzz.py", *flags, f"--workdir={workdir}").finish(timeout=120)
    lines = (result.stdout + result.stderr).strip().splitlines()
    if result.returncode == 2:
        is_named = lines and (field.split(".")[-1] in lines[-1] or text in lines[-1])
        is_one_line = len(result.stderr.strip().splitlines()) == 1
        return None if is_named and is_one_line else "\n".join(lines)
    if result.returncode == 0 and lines[-1].startswith(ACCEPTED):
        value = json.loads(lines[-1].removeprefix(ACCEPTED))
        return unfit(field, value)
    return "\n".join(lines[-30:])


def unfit(field: str, value) -> str | None:
    """Returns why a run must not have this value of a field; None: it may."""
    if isinstance(value, list):
        return next(filter(None, (unfit(field, part) for part in value)), None)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    reasons = (
        (not math.isfinite(value), "isn't finite"),
        (value < 0 and field not in MAY_BE_NEGATIVE, "is negative"),
        (abs(value) > HUGE and field not in MAY_BE_HUGE, "is huge"),
        (value == 0 and field in MAY_NOT_BE_ZERO, "is zero"),
    )
    return next(
        (f"{value!r} was accepted, and {reason}" for holds, reason in reasons if holds), None
    )


def stop_before_compiling(program) -> None:
    """Loads the first batches and traces both steps, instead of compiling them."""
    import jax

    import input_pipeline
    from vit_jax.parallel import sharding

    config = program.config
    if config.batch_size * math.prod(program.image_shape) < 1e8:  # the memory check is for others
        train_set, eval_set = input_pipeline.open_splits(config.dataset)
        next(input_pipeline.train_batches(train_set, config))
        next(input_pipeline.eval_batches(eval_set, config))
        sharding.compile_for_shapes = lambda step, *shapes, **_: jax.eval_shape(step, *shapes)
        program.compile_if_it_fits = program.compile_train_step
        _ = program.train_step, program.eval_step
    (field,) = [arg for arg in sys.argv[1:] if arg.startswith("--config.")]
    value = config
    for name in field.removeprefix("--config.").split("=")[0].split("."):
        value = value[name]
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    print(ACCEPTED + json.dumps(value))
    raise SystemExit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--draws", type=int, default=300)
    args = parser.parse_args()
    print(f"Seed {args.seed}")
    failures = 0
    for number in range(args.draws):
        field, text = draw(args.seed, number)
        with tempfile.TemporaryDirectory() as workdir:
            if wrong := start(field, text, workdir):
                failures += 1
                print(f"{number}: --config.{field}={text}\n{wrong}\n")
    print(f"{args.draws - failures} of {args.draws} starts were refused in one line, or valid")
    return 1 if failures else 0


if __name__ == "__main__":
    if any(arg.startswith("--config") for arg in sys.argv):
        import command_line
        import train

        train.Program.compile = stop_before_compiling
        command_line.run(train.main, trains=True)
    else:
        sys.exit(main())
