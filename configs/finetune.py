r"""Fine-tunes published weights as the paper did: 384 px, SGD, 500 to 20,000 steps of 512 images.

python train.py --config=configs/finetune.py:model=B/16,dataset=cifar10 \
    --config.init_from=gs://vit_models/imagenet21k/ViT-B_16.npz

Keys: model=, a published size; dataset=, one of those below or a folder of
<split>/<class>/*.jpg|png; steps=; sweep trains without a part of the training split and evaluates
on that part, to choose a rate with. And in place of the paper's recipe:
  probe              trains the head alone
  layer_decay=0.75   the layers learn the slower the nearer they are to the input
  adamw              AdamW at 2e-5, for short runs (steps=1000)
Without weights the run tells where the published ones are. Try it without any: quick.

Published, in % of the test images right (arXiv:2010.11929, table 5; pre-trained on ImageNet-21k;
not measured with this code):
                     B/16   B/32   L/16   L/32   H/14
  cifar10           98.95  98.79  99.16  99.13  99.27
  cifar100          91.67  91.97  93.44  93.04  93.82
  pets              94.43  93.02  94.73  93.09  94.82
  flowers           99.38  99.11  99.61  99.19  99.51
  imagenet          83.97  81.28  85.15  80.99  85.13
Google's code reproduced, with the files of gs://vit_models/imagenet21k and no dropout
(github.com/google-research/vision_transformer, README):
                     B/16   B/32   L/16   L/32   R50+B/16
  cifar10           99.02  98.88  99.13  99.06  98.72
  cifar100          92.06  92.31  92.91  93.29  90.88
  imagenet          84.53  81.66  84.47  81.89  83.72
"""

from configs import common

# TFDS name, training and test split, the sweep's part for training, steps, warm-up, and the rates
# that the paper tried (its table 4). Warm-up: Google's code, and for the short ones big_vision's
# configs/transfer.py; the paper has none.
RATES = (0.001, 0.003, 0.01, 0.03)
DATASETS = {
    "cifar10": ("cifar10", "train", "test", 98, 10_000, 500, RATES),
    "cifar100": ("cifar100", "train", "test", 98, 10_000, 500, RATES),
    "pets": ("oxford_iiit_pet", "train", "test", 90, 500, 100, RATES),
    "flowers": ("oxford_flowers102", "train", "test", 90, 500, 100, RATES),
    "imagenet": ("imagenet2012", "train", "validation", 99, 20_000, 500, (*RATES[1:], 0.06)),
}
FOLDER = ("train", "val", 90, 500, 100, RATES)

BUCKET = "gs://vit_models"
# Under BUCKET/imagenet21k: the paper's, pre-trained on ImageNet-21k.
PAPER = {
    "B/16": "ViT-B_16",
    "B/32": "ViT-B_32",
    "L/16": "ViT-L_16",
    "L/32": "ViT-L_32",
    "H/14": "ViT-H_14",
    "R50+B/16": "R50+ViT-B_16",
}
# Under BUCKET/augreg: the best of AugReg's for ImageNet-21k by its own evaluation, as the README of
# Google's code lists them.
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
    known = DATASETS.get(options.dataset, (options.dataset, *FOLDER))
    name, train_split, eval_split, percent, steps, warmup, rates = known
    config = common.get_config()
    config.model.variant = options.model
    config.image_size = 378 if options.model.endswith("/14") else 384  # a multiple of the patch
    config.init_from_required = True

    config.dataset.update(name=name, train_split=train_split, eval_split=eval_split)
    if options.sweep:
        config.dataset.train_split = f"{train_split}[:{percent}%]"
        config.dataset.eval_split = f"{train_split}[{percent}%:]"
    config.augment.eval_crop = 1.0  # the whole shorter side (Google's code squeezes to a square)

    config.batch_size = 512
    config.total_steps = options.steps or steps
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=0.0)
    config.schedule.base_lr = rates[-1]  # --config.schedule.base_lr= for the others of the sweep
    config.schedule.warmup_steps = min(warmup, config.total_steps // 5)

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
        config.init_from_required = False  # nothing published is of that size
        common.quick(config)
    return config


def where_weights_are(model: str, command: str) -> str:
    """What a run without weights is told. command: how it was started."""
    files = [f"{BUCKET}/imagenet21k/{PAPER[model]}.npz"] if model in PAPER else []
    files += [f"{BUCKET}/augreg/{AUGREG[model]}.npz"] if model in AUGREG else []
    published = " and ".join(files)
    if not files:
        sizes = ", ".join(sorted({*PAPER, *AUGREG}))
        published = f"none for {model} (but for {sizes}, under {BUCKET})"
    return (
        "Fine-tuning starts from weights: set --config.init_from=PATH to a published file, a run, "
        f"or hf:owner/name. Published by Google: {published}; gs://vit_models is "
        "https://storage.googleapis.com/vit_models to a browser. So:\n"
        f"{command} --config.init_from={files[0] if files else 'PATH'}"
    )
