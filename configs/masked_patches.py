r"""Learns without labels: masked patch prediction, the paper's own experiment with ViT-B/16.

python train.py --config=configs/masked_patches.py
python train.py --config=configs/masked_patches.py:dataset=imagenet21k

As in arXiv:2010.11929, section 4.6 and appendix B.1.2: half of the patch embeddings are corrupted,
and the mean color of each corrupted patch is predicted, one of 512; 1M steps of 4096 images with
Adam at 2e-4. Keys: variant, the model's size; dataset, a TFDS name or a folder; quick. With
dataset=digits, it is the model of configs/digits.py that is trained.

The paper pre-trained on JFT-300M, and reports 79.9% on ImageNet after fine-tuning: 2% above
training from scratch, 4% behind supervised pre-training. It saw diminishing returns after 100k
steps, and similar gains from pre-training on ImageNet itself. Not measured with this code.
Then fine-tune, with this run as --config.init_from: configs/finetune.py, docs/self_supervised.md.
Try it without ImageNet: --config=configs/masked_patches.py:quick
"""

from configs import common, digits, recipes


def get_config(arg=None):
    options = common.parse_arg(arg, variant="B/16", dataset="imagenet2012")
    if options.dataset == "digits" and not options.quick:
        if options.variant != "B/16":
            raise ValueError(
                "key 'variant' is not for dataset=digits, which has a model of its own"
            )
        return on_digits()
    config = common.get_config()
    config.objective = "masked_patches"
    config.masked_patches.target = "mean_color"  # or "downsized", "pixels", the paper's others

    config.total_steps = 1_000_000
    config.batch_size = 4096
    config.image_size = 224
    config.dataset.name = options.dataset
    if options.dataset == "imagenet21k":
        recipes.imagenet21k_splits(config)

    config.model.variant = options.variant

    config.optimizer.name = "adam"
    config.optimizer.weight_decay = 0.0  # the paper mentions none for this experiment
    config.schedule.base_lr = 2e-4
    config.schedule.warmup_steps = 10_000

    config.eval_every_steps = 10_000
    config.best_metric = "loss"
    return common.quick(config) if options.quick else config


def on_digits():
    """Returns what docs/self_supervised.md trains: digits.py's model, by predicting its patches.

    There are only 4 patches, of 4x4 pixels, so that their mean tells little. All 16 pixels are
    predicted, in 3 bits: the images are gray, so each is one of 8 classes instead of 512.
    """
    config = digits.get_config()
    config.objective = "masked_patches"
    config.masked_patches.target = "downsized"
    config.augment.label_smoothing = 0.0
    config.best_metric = "loss"
    return config
