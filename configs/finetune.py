r"""Fine-tunes published weights as in the paper: 384 px, SGD, 500 to 20,000 steps of 512 images.

python train.py --config=configs/finetune.py:model=B/16,dataset=cifar10 \
    --config.init_from=gs://vit_models/imagenet21k/ViT-B_16.npz

Keys: model, a published size; dataset, one of those below or a folder of
<split>/<class>/*.jpg|png; steps, the number of steps; sweep, which holds out a part of the training
split to evaluate on, for choosing a learning rate; quick, to try it without weights. Instead of the
paper's recipe:
  probe              trains only the head
  layer_decay=0.75   lowers the learning rate of each layer toward the input
  adamw              AdamW with learning rate 2e-5, for short runs (steps=1000)
Without weights, the run prints where to find published ones.

To sweep the learning rate, set --config.schedule.base_lr. The paper tried 0.001, 0.003, 0.01 and
0.03, and on ImageNet 0.003, 0.01, 0.03 and 0.06 (Table 4).

Published accuracies on the test split, in % (arXiv:2010.11929, Table 5; pre-trained on
ImageNet-21k; not measured with this code):
                     B/16   B/32   L/16   L/32   H/14
  cifar10           98.95  98.79  99.16  99.13  99.27
  cifar100          91.67  91.97  93.44  93.04  93.82
  pets              94.43  93.02  94.73  93.09  94.82
  flowers           99.38  99.11  99.61  99.19  99.51
  imagenet          83.97  81.28  85.15  80.99  85.13
Accuracies of Google's code with the files in gs://vit_models/imagenet21k and no dropout
(github.com/google-research/vision_transformer, README):
                     B/16   B/32   L/16   L/32   R50+B/16
  cifar10           99.02  98.88  99.13  99.06  98.72
  cifar100          92.06  92.31  92.91  93.29  90.88
  imagenet          84.53  81.66  84.47  81.89  83.72
"""

from configs import common

# warmup_steps: from Google's code, and for short runs from big_vision's configs/transfer.py; the
# paper mentions none. sweep_percent: the part of the training split that a sweep trains on.
SHORT = dict(steps=500, warmup_steps=100, sweep_percent=90)
CIFAR = dict(steps=10_000, warmup_steps=500, sweep_percent=98)
DATASETS = {
    "cifar10": CIFAR | dict(name="cifar10", eval_split="test"),
    "cifar100": CIFAR | dict(name="cifar100", eval_split="test"),
    "pets": SHORT | dict(name="oxford_iiit_pet", eval_split="test"),
    "flowers": SHORT | dict(name="oxford_flowers102", eval_split="test"),
    "imagenet": dict(
        name="imagenet2012",
        eval_split="validation",
        steps=20_000,
        warmup_steps=500,
        sweep_percent=99,
    ),
}

# The learning rate in Google's code (vit_jax/configs/common.py and augreg.py), with exceptions.
BASE_LR = 0.03
EXCEPTIONS = {
    "cifar10": {"B/16": 0.01},  # vit_jax/configs/vit.py
    # Fine-tuned from AUGREG below at 384 px; the README has their names, which end in
    # "imagenet2012-steps_20k-lr_0.01-res_384". The names of the other sizes have "lr_0.03".
    "imagenet": {"S/32": 0.01, "B/32": 0.01, "L/16": 0.01, "R26+S/32": 0.01, "R50+L/32": 0.01},
}

BUCKET = "gs://vit_models"
# In BUCKET/imagenet21k: the paper's models, pre-trained on ImageNet-21k.
PAPER = {
    "B/16": "ViT-B_16",
    "B/32": "ViT-B_32",
    "L/16": "ViT-L_16",
    "L/32": "ViT-L_32",
    "H/14": "ViT-H_14",
    "R50+B/16": "R50+ViT-B_16",
}
# In BUCKET/augreg: AugReg's best models on ImageNet-21k itself, as listed in the README of
# Google's code.
AUGREG = {
    "Ti/16": "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
    "S/32": "S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0",
    "S/16": "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0",
    "B/32": "B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0",
    "B/16": "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0",
    "L/16": "L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0",
    "R+Ti/16": "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
    "R26+S/32": "R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0",
    "R50+L/32": "R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1",
}


def get_config(arg=None):
    options = common.parse_arg(
        arg,
        model="B/16",
        dataset="cifar10",
        steps=0,
        sweep=False,
        probe=False,
        layer_decay=0.0,
        adamw=False,
    )
    if options.steps < 0:
        raise ValueError(f"key 'steps' is {options.steps}; it must be at least 1")
    folder = SHORT | dict(name=options.dataset, eval_split="val")
    dataset = DATASETS.get(options.dataset, folder)
    config = common.get_config()
    config.model.variant = options.model
    # Must be a multiple of the patch size.
    config.image_size = 378 if options.model.endswith("/14") else 384
    config.init_from_required = True
    config.init_from_hint = where_to_find_weights(options.model)

    config.dataset.update(name=dataset["name"], eval_split=dataset["eval_split"])
    if options.sweep:
        config.dataset.train_split = f"train[:{dataset['sweep_percent']}%]"
        config.dataset.eval_split = f"train[{dataset['sweep_percent']}%:]"
    # As in Google's code (vit_jax/input_pipeline.py), with which the accuracies below the paper's
    # were measured.
    config.augment.update(eval_crop="squeeze", eval_method="bilinear_aliased")

    config.batch_size = 512
    config.total_steps = options.steps or dataset["steps"]
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=0.0)
    exceptions = {} if options.quick else EXCEPTIONS.get(options.dataset, {})  # quick: on digits
    config.schedule.base_lr = exceptions.get(options.model, BASE_LR)
    config.schedule.warmup_steps = min(dataset["warmup_steps"], config.total_steps // 5)

    if options.probe:
        config.optimizer.frozen = ("(?!head)",)
    if options.layer_decay:
        config.optimizer.layer_decay = options.layer_decay
    if options.adamw:
        config.optimizer.update(name="adamw", weight_decay=0.01)
        config.schedule.base_lr = 2e-5

    config.log_every_steps = 50
    config.eval_every_steps = max(config.total_steps // 5, 1)
    if options.quick:
        common.quick(config)
    return config


def where_to_find_weights(model: str) -> str:
    """Returns the error message for a run without weights to start from."""
    files = [f"{BUCKET}/imagenet21k/{PAPER[model]}.npz"] if model in PAPER else []
    files += [f"{BUCKET}/augreg/{AUGREG[model]}.npz"] if model in AUGREG else []
    published = " and ".join(files)
    if not files:
        sizes = ", ".join(sorted({*PAPER, *AUGREG}))
        published = f"none for {model}, only for {sizes} in {BUCKET}"
    example = files[0] if files else "PATH"
    return (
        f"Fine-tuning starts from weights: add --config.init_from={example} (or a run's folder, "
        f"or hf:owner/name). Published by Google: {published} (in a browser, "
        "https://storage.googleapis.com/vit_models)"
    )
