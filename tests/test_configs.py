"""Presets, recipes and their arguments."""

import importlib
import pathlib

import pytest

import configuration
from configs import cifar10, common, finetune, vit_b16, vit_s16, vit_ti16
from vit_jax import models
from vit_jax.training import augment, schedules

PRESETS = sorted(
    path.stem
    for path in pathlib.Path(common.__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "common", "recipes")
)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_can_be_created_in_full_size(preset):
    module = importlib.import_module(f"configs.{preset}")
    config = module.get_config()
    config.num_classes = 1000
    configuration.check(config)
    assert f"--config=configs/{preset}.py" in module.__doc__, "its first lines say how to run it"


class TrainingSplit:
    """What `resolve` asks of a dataset."""

    name, num_classes, num_examples, class_names = "images", 10, 100_000, tuple("abcdefghij")
    exif, fingerprint = False, None


@pytest.mark.parametrize("recipe", common.RECIPES)
@pytest.mark.parametrize("quick", ["", ",quick"])
def test_recipes_can_be_resolved(recipe, quick):
    config = configuration.resolve(vit_s16.get_config(f"recipe={recipe}{quick}"), TrainingSplit())
    model = models.from_config(config)
    assert config.total_steps > 0
    assert config.model.representation_size == model.representation_size
    assert model.representation_size in (None, model.width)


def test_augreg_by_strength_and_by_size():
    config = vit_b16.get_config("recipe=augreg,aug=strong2,reg=0")
    assert config.augment.randaugment_layers == 2
    assert config.augment.randaugment_magnitude == 20
    assert config.augment.mixup_alpha == 0.8
    assert config.model.dropout_rate == config.model.stochastic_depth_rate == 0
    config = vit_b16.get_config("recipe=augreg")  # medium2, with dropout
    assert config.augment.mixup_alpha == 0.5
    assert config.model.dropout_rate == config.model.stochastic_depth_rate == 0.1
    config = vit_ti16.get_config("recipe=augreg")  # light1: RandAugment at magnitude 0
    assert (config.augment.randaugment_layers, config.augment.mixup_alpha) == (2, 0)
    assert config.model.dropout_rate == 0


def test_paper():
    config = vit_b16.get_config("recipe=paper")
    assert (config.schedule.base_lr, config.optimizer.weight_decay) == (3e-3, 0.3)
    assert (config.model.dropout_rate, config.batch_size, config.num_epochs) == (0.1, 4096, 300)


def test_plain():
    config = vit_s16.get_config("recipe=plain")
    assert (config.model.pool, config.model.posemb) == ("gap", "sincos2d")
    assert (config.batch_size, config.num_epochs) == (1024, 90)
    assert vit_s16.get_config("recipe=plain,epochs=300").num_epochs == 300


def test_deit():
    config = vit_s16.get_config("recipe=deit")
    assert config.augment.randaugment_magnitude == 9
    assert (config.augment.randaugment_kind, config.dataset.repeats) == ("timm", 3)
    assert (config.augment.crop_distribution, config.augment.resize_method) == ("area", "bicubic")
    assert (config.augment.mixup_alpha, config.augment.cutmix_alpha) == (0.8, 1.0)
    assert (config.augment.erasing_prob, config.augment.label_smoothing) == (0.25, 0.1)
    assert config.ema_decay == 0.99996


def test_deit3():
    """Progressive resolution: B at 192 px and then 224; S is fine-tuned at 384."""
    config = vit_b16.get_config("recipe=deit3")
    assert (config.image_size, config.batch_size, config.num_epochs) == (192, 2048, 800)
    assert (config.optimizer.name, config.schedule.base_lr) == ("lamb", 3e-3)
    assert config.model.stochastic_depth_rate == 0.2
    assert (config.augment.three_augment, config.augment.randaugment_layers) == (True, 0)
    config = vit_b16.get_config("recipe=deit3,finetune")
    assert (config.image_size, config.batch_size, config.num_epochs) == (224, 512, 20)
    assert (config.optimizer.name, config.loss, config.dataset.repeats) == ("adamw", "softmax", 1)
    assert config.init_from_required
    config = vit_s16.get_config("recipe=deit3,finetune,quick")
    assert (config.model.stochastic_depth_rate, config.init_from_required) == (0.0, False)
    config = vit_b16.get_config("recipe=deit3,dataset=imagenet21k")
    assert (config.loss, config.augment.crop, config.dataset.repeats) == ("softmax", "simple", 1)


def test_modern():
    """ViT-5's model with DeiT III's training, on ImageNet-21k too."""
    model = vit_b16.get_config("recipe=modern").model
    assert (model.norm_layer, model.qk_norm, model.qkv_bias) == ("rmsnorm", True, False)
    assert (model.reg_tokens, model.rope, model.posemb) == (4, "axial", "learned")
    assert (model.init_values, model.no_embed_class) == (1e-4, True)
    for dataset in ("imagenet2012", "imagenet21k"):
        ours, theirs = (
            vit_b16.get_config(f"recipe={recipe},dataset={dataset}").to_dict()
            for recipe in ("modern", "deit3")
        )
        assert ours.pop("model") != theirs.pop("model")
        assert ours == theirs


def test_recipes_take_the_crops_and_randaugment_that_they_were_run_with():
    """And the default is that of runs from before there was a choice."""
    for recipe, kind in (("augreg", "tensorflow"), ("plain", "tensorflow"), ("base", "pillow")):
        augmentation = vit_b16.get_config(f"recipe={recipe}").augment
        assert augmentation.randaugment_kind == kind
        assert augmentation.crop_distribution == "tensorflow"


def test_imagenet21k():
    config = vit_b16.get_config("dataset=imagenet21k")
    assert (config.loss, config.model.head_bias_init) == ("sigmoid", -10)
    assert config.dataset.name == "imagenet21k"


def test_augreg_on_imagenet21k():
    config = vit_b16.get_config("recipe=augreg,dataset=imagenet21k")
    assert (config.augment.randaugment_magnitude, config.augment.mixup_alpha) == (10, 0.2)
    assert config.model.dropout_rate == config.model.stochastic_depth_rate == 0
    assert config.model.representation_size is None
    assert config.model.head_bias_init == -10


def test_cifar10():
    assert cifar10.get_config().model.num_heads == 8
    assert cifar10.get_config("model=small").model.width is None
    config = cifar10.get_config("schedule=step")
    rate = schedules.create(config.schedule, 117_000)
    assert [float(rate(epoch * 391)) for epoch in (50, 150, 250)] == pytest.approx(
        [1e-3, 1e-4, 1e-5]
    )


@pytest.mark.parametrize("recipe", [*common.RECIPES, "quick"])
@pytest.mark.parametrize("quick", ["", ",quick"])
def test_recipes_make_a_model(recipe, quick):
    if recipe == "quick":
        config = cifar10.get_config("quick")
    else:
        config = vit_s16.get_config(f"recipe={recipe}{quick}")
    config.num_classes = 10
    models.from_config(config)
    augment.check(config.augment)


def test_fields_set_before_quick_are_shrunk():
    """A preset's own fields don't survive `quick`, which comes last."""
    for variant in ("H/14", "R50+B/16"):
        options = common.imagenet_options("quick")
        config = common.imagenet(variant, options)
        config.model.width = 2048
        config = common.quick(config)
        config.num_classes = 10
        assert models.from_config(config).width == 64


def test_representation_layers_have_the_width():
    config = vit_s16.get_config("recipe=paper")
    config.num_classes = 10
    assert models.from_config(config).representation_size == 384


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("recipe=augrag", "key 'recipe' is 'augrag'; it must be base, augreg"),
        ("recipe=augreg,aug=heavy", "key 'aug' is 'heavy'; it must be one of none, light1"),
        ("reg=much", "key 'reg' must be of type float, not 'much'"),
        ("recipes=deit", "unknown key 'recipes'.*Did you mean recipe"),
    ],
)
def test_mistakes_are_named(arg, message):
    with pytest.raises(ValueError, match=message):
        vit_b16.get_config(arg)


@pytest.mark.parametrize("dataset", finetune.DATASETS)
def test_finetuning_as_in_the_paper(dataset):
    config = finetune.get_config(f"model=B/16,dataset={dataset}")
    steps = {"imagenet": 20_000, "pets": 500, "flowers": 500}.get(dataset, 10_000)
    assert (config.total_steps, config.batch_size, config.image_size) == (steps, 512, 384)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.9, 0.0)
    assert (config.grad_clip_norm, config.schedule.name) == (1.0, "cosine")
    assert config.schedule.warmup_steps == (100 if steps == 500 else 500)
    assert config.model.head_bias_init == 0
    assert config.schedule.base_lr == (0.01 if dataset == "cifar10" else 0.03)
    sweep = finetune.get_config(f"dataset={dataset},sweep")
    assert sweep.dataset.eval_split.startswith(config.dataset.train_split + "[")
    # Every published size fits its preset's image size.
    for size in (*finetune.PAPER, *finetune.AUGREG):
        config = finetune.get_config(f"model={size},dataset={dataset}")
        config.num_classes = 10
        model = models.from_config(config)
        models.check_image(model, (config.image_size,) * 2)


def test_finetuning_at_the_published_learning_rates():
    """Names of AugReg's models on ImageNet at 384 px, as in the README of Google's code."""
    rates = {"Ti/16": 0.03, "S/32": 0.01, "S/16": 0.03, "B/32": 0.01, "B/16": 0.03, "L/16": 0.01}
    rates |= {"R+Ti/16": 0.03, "R26+S/32": 0.01, "R50+L/32": 0.01}
    assert rates.keys() == finetune.AUGREG.keys()
    for model, rate in rates.items():
        config = finetune.get_config(f"model={model},dataset=imagenet")
        assert config.schedule.base_lr == rate
    assert finetune.get_config("model=L/16,dataset=cifar10").schedule.base_lr == 0.03
    assert finetune.get_config("model=B/16,dataset=/data/birds").schedule.base_lr == 0.03


def test_variants_of_finetuning():
    assert finetune.get_config("probe").optimizer.frozen == ("(?!head)",)
    assert finetune.get_config("layer_decay=0.75").optimizer.layer_decay == 0.75
    short = finetune.get_config("adamw,steps=1000")
    assert (short.optimizer.name, short.schedule.base_lr, short.total_steps) == (
        "adamw",
        2e-5,
        1000,
    )
    assert short.schedule.warmup_steps == 200
    folder = finetune.get_config("dataset=/data/birds")
    assert (folder.dataset.name, folder.dataset.eval_split) == ("/data/birds", "val")


def test_finetuning_without_weights_says_where_to_find_them():
    text = finetune.get_config("model=B/16").init_from_hint
    assert "gs://vit_models/imagenet21k/ViT-B_16.npz" in text
    assert "gs://vit_models/augreg/B_16-i21k" in text
    assert "none for S/8" in finetune.where_to_find_weights("S/8")
    assert finetune.get_config().init_from_required


@pytest.mark.parametrize(
    ("preset", "arg", "message"),
    [
        (vit_s16, "aug=strong1", "key 'aug' is for recipe=augreg, not recipe=base"),
        (vit_s16, "recipe=deit,epochs=10", "key 'epochs' is for recipe=plain, not recipe=deit"),
        (vit_s16, "finetune", "key 'finetune' is for recipe=deit3, not recipe=base"),
        (vit_s16, "recipe=deit3,finetune,dataset=imagenet21k", "key 'finetune' is for ImageNet"),
        (
            vit_ti16,
            "recipe=deit3",
            "recipes deit3 and modern are for S/16, B/16, L/16, H/14, not for Ti/16",
        ),
        (vit_s16, "recipe=plain,epochs", "key 'epochs' needs a value: epochs=VALUE"),
        (finetune, "layer_decay,quick", "key 'layer_decay' needs a value"),
        (finetune, "steps=-5", "key 'steps' is -5; it must be at least 1"),
    ],
)
def test_keys_that_would_be_ignored_are_refused(preset, arg, message):
    with pytest.raises(ValueError, match=message):
        preset.get_config(arg)
