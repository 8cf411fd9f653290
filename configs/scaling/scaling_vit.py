r"""One run per model gives many durations: the study of "Scaling Vision Transformers".

python -m vit_jax.scaling run configs/scaling/scaling_vit.py --root=DIR --dry_run

Each model trains once, at a learning rate that falls as 1 / sqrt(step); from its checkpoints,
cooldowns to 0 end after 20,000 to 4 million steps of 4,096 images (arXiv:2106.04560, section
3.5). As in the paper's appendix, a cooldown takes 10,000 steps of the three shortest durations and
50,000 of the others. `start` is the first part of the run, whose checkpoints are kept more often,
and `trunk` the rest.

What the paper found, on 3 billion images of JFT-3B, which isn't public (`data=NAME`; default:
ImageNet-21k): the error follows a saturating power law of compute C in TPUv3 core-days,
  10-shot     0.12 + 0.63 (C + 0.52)^-0.32
  fine-tuned  0.09 + 0.26 (C + 0.01)^-0.35
and larger models need fewer images for the same error. ImageNet accuracy in %, after 20,000 and
after 4 million steps (G/14: 5 million):
              Ti/16  S/32  S/16  B/32  B/16  L/16  g/14  G/14
  10-shot      23.6  26.3  36.5  35.2  45.7  49.7
               52.1  59.1  67.6  70.6  76.8  81.5  84.3  84.9
  fine-tuned   55.6  59.3  67.5  66.7  73.4  75.5
               77.6  79.9  84.0  84.1  86.6  88.5        90.45
docs/scaling.md fits laws to all of these. Nothing of this was measured with this code. Try it on
digits: ...scaling_vit.py:quick"""

from configs import common, vit_g14

MODELS = ("Ti/16", "S/32", "S/16", "B/32", "B/16", "L/16", "g/14", "G/14")
# Where cooldowns begin, and how many steps they take.
EARLY = {10_000: 10_000, 20_000: 10_000, 50_000: 10_000, 70_000: 50_000}
LATE = dict.fromkeys((350_000, 1_150_000, 1_950_000, 3_950_000), 50_000)


def get_config(arg=None):
    options = common.parse_arg(arg, model="B/16", data="imagenet21k")
    config = vit_g14.get_config(f"model={options.model},dataset={options.data}")
    config.batch_size = 4096
    config.total_steps = max(LATE)
    config.schedule.cooldown_steps = 0
    config.checkpoint_every_steps = config.eval_every_steps = 10_000
    config.keep_every_steps = 50_000
    fewshot = {"kind": "fewshot", "shots": (10,), "every_steps": 50_000}
    elsewhere = {"name": "imagenet2012", "train_split": "train", "split": "validation"}
    config.evals = {"fewshot": fewshot if options.quick else fewshot | elsewhere}
    if options.quick:
        common.quick(config)
        config.keep_every_steps = 20
    return config


def get_study(arg=None):
    quick = common.parse_arg(arg, model="", data="").quick
    models = MODELS[:1] if quick else MODELS
    early, late = ({20: 6}, {40: 8}) if quick else (EARLY, LATE)
    start = {"total_steps": max(early), "keep_every_steps": min(early)}
    return {
        "collect": ("fewshot/accuracy_10shot", "val/accuracy"),
        "stages": {
            "start": {"axes": {":model": models}, "set": start},
            "early": cooldowns("start", early),
            "trunk": {
                "after": "start",
                "inherit": (":model",),
                "set": {**branch(max(early)), "total_steps": max(late)},
            },
            "late": cooldowns("trunk", late),
        },
    }


def cooldowns(stage, steps):
    """Returns a stage with a cooldown from each of some checkpoints of another stage's runs."""
    durations = {
        str(begin + count): {
            **branch(begin),
            "total_steps": begin + count,
            "schedule.cooldown_steps": count,
        }
        for begin, count in steps.items()
    }
    return {"after": stage, "inherit": (":model",), "axes": {"steps": durations}}


def branch(step):
    """Returns the fields of a run that goes on from a checkpoint of the one that it is after."""
    return {"init_from": f"{{parent}}/checkpoints/{step}", "init_mode": "continue"}
