"""`config.evals`: what may be in it, and runs with several evaluations."""

import functools
import io
import json
import types

import datasets
import jax
import numpy as np
import PIL.Image
import pytest
import whole_runs
from conftest import apply, init, tiny_model
from ml_collections import ConfigDict
from whole_runs import quick_config, rows, stop_at

import evaluate
import input_pipeline
import train
from vit_jax.errors import Preempted, UserError
from vit_jax.evaluation import evals
from vit_jax.inference.images import evaluation_view
from vit_jax.parallel import sharding
from vit_jax.parallel.preemption import Preemption


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("knn", "config.evals is 'knn'; it must be a dictionary"),
        ({"knn": "knn"}, "config.evals.knn is 'knn'; it must be a dictionary"),
        ({"val": {}}, "config.evals has 'val'; a name must not be 'train' or 'val'"),
        ({"a/b": {}}, "config.evals has 'a/b'"),
        ({"a": {"kind": "nn"}}, "config.evals.a.kind is 'nn'; it must be 'accuracy', 'fewshot'"),
        ({"a": {"shots": (1,)}}, "config.evals.a has 'shots'; 'accuracy' takes kind, name"),
        ({"a": {"kind": "fewshot", "shots": 5}}, "a.shots is 5; it must be numbers, such as"),
        ({"a": {"kind": "fewshot", "shots": (0,)}}, "a.shots is 0; it must be a whole number >= 1"),
        ({"a": {"kind": "fewshot", "l2": -1}}, "a.l2 is -1; it must be a number >= 0"),
        ({"a": {"kind": "knn", "neighbors": True}}, "a.neighbors is True; it must be a whole"),
        ({"a": {"split": 3}}, "a.split is 3; it must be text"),
        ({"a": {"every_steps": -1}}, "a.every_steps is -1"),
        ({"a": {"eval_crop": 2.0}}, "a.eval_crop is 2.0; it must be .* <= 1, or 'squeeze'"),
        ({"a": {"eval_method": "box"}}, "a.eval_method is 'box'; it must be 'bilinear', 'bicubic'"),
        ({"a": {"kind": "knn", "layer": 3}}, "a.layer is 3; the model has 2 blocks"),
    ],
)
def test_mistakes_are_named(entries, message, tiny_config):
    tiny_config.evals = entries
    with pytest.raises(UserError, match=message):
        evals.check(tiny_config, depth=2)


def test_each_has_its_own_preprocessing(plain, image_folder):
    """What an entry leaves out is the run's; batches that are kept aren't shared."""
    plain.dataset.update(name=str(image_folder), eval_split="val")
    plain.augment.eval_crop = 0.5
    plain.evals = {
        "same": {},
        "area": {"eval_method": "area"},
        "squeezed": {"eval_crop": "squeeze", "eval_method": "bilinear_aliased"},
    }
    recorded = ConfigDict(json.loads(plain.to_json_best_effort()))  # where the crop is a number
    setup = types.SimpleNamespace(
        config=recorded,
        class_names=("cat", "dog"),
        open_batches=input_pipeline.open_eval_batches,
        mesh=None,
    )
    created = evals.create(evals.parse(recorded), setup, None)
    source = created["same"].batches.source
    for _ in range(2):
        for name, view in (
            ("same", (0.5, "bilinear")),
            ("area", (0.5, "area")),
            ("squeezed", ("squeeze", "bilinear_aliased")),
        ):
            batch = next(iter(created[name].batches))
            encoded, _ = source.fetch(next(iter(source.in_order(0, 1)))[1])
            with PIL.Image.open(io.BytesIO(encoded.numpy())) as image:
                expected = evaluation_view(image, (16, 16), 3, *view).astype(int)
            assert np.abs(batch["images"][0] - expected).max() <= 3, name  # of two JPEG decoders
            assert sum(1 for _ in created[name].batches) == 2


EVALS = {
    "few": {"kind": "fewshot", "shots": (1, 2), "seeds": 2, "every_steps": 20},
    "near": {"kind": "knn", "neighbors": 3, "train_examples": 200, "every_steps": 0},
    "part": {"split": "test[:40]"},
}


@pytest.mark.slow
def test_a_run_stopped_in_an_evaluation(on_one_device, tmp_path, monkeypatch):
    """Each has its own rate, and is of the average and of the parameters; none is lost."""
    config = quick_config(total_steps=40, eval_every_steps=40, ema_decay=0.9, evals=EVALS)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = train.train(config, whole)
    groups = {}
    for row in rows(whole):
        names = {name.partition("/")[0] for name in row if "/" in name} - {"train"}
        groups.setdefault(row["step"], set()).update(names)
    everything = {"val", "few", "near", "part"}
    assert groups[20] == {"few", "few_raw"}
    assert groups[40] == everything | {f"{name}_raw" for name in everything}

    with monkeypatch.context() as patch:
        patch.setattr(Preemption, "sync", stop_at(20 + 3))
        with pytest.raises(Preempted, match="Stopped after step 20, saved"):
            train.train(config, stopped)
    assert train.train(config, stopped) == result
    whole_runs.assert_same_run(stopped, whole)

    target = evaluate.open_run(whole, "best")
    again = evaluate.evaluate(target)
    last = {name: value for row in rows(whole) if row["step"] == 40 for name, value in row.items()}
    assert again.evals.keys() == {"val_raw"} | EVALS.keys() | {f"{name}_raw" for name in EVALS}
    for name, values in again.evals.items():
        values.pop("ece", None)  # only evaluate.py has it
        assert values == pytest.approx({key: last[f"{name}/{key}"] for key in values}, rel=1e-5)


def test_sets_of_labels(tiny_config, tmp_path, one_device):
    """Any label of the set is right, and images without labels don't count."""
    builder = datasets.LabelSets(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    tiny_config.evals = {"real": {"name": str(builder.data_dir), "split": "validation"}}
    tiny_config.num_classes = 3
    model = tiny_model(num_classes=3, depth=1)
    params = init(model, np.zeros((1, 32, 32, 3)))["params"]
    params = jax.device_put(params, sharding.state_sharding(params, one_device))
    setup = evals.Setup(
        config=tiny_config,
        model=model,
        class_names=("a", "b", "c"),
        params_shapes=sharding.shapes_of(params),
        batch_shape=(8, 32, 32, 3),
        open_batches=functools.partial(input_pipeline.open_eval_batches, batch_size=8),
    )
    (evaluator,) = evals.create(evals.parse(tiny_config), setup, eval_step=None).values()
    batches = list(evaluator.batches)
    images = np.concatenate([batch["images"] for batch in batches])[:13]
    labels = np.concatenate([batch["labels"] for batch in batches])[:13]
    assert sorted((labels >= 0).sum(axis=1).tolist()) == [0] * 4 + [1] * 3 + [2] * 3 + [3] * 3
    predicted = np.asarray(apply(model, {"params": params}, images / 127.5 - 1)).argmax(axis=1)
    hits = [p in row for p, row in zip(predicted, labels.tolist(), strict=True) if row[0] >= 0]
    assert evaluator(params, lambda: False) == {"accuracy": pytest.approx(np.mean(hits))}
    tiny_config.dataset.update(name=str(builder.data_dir), train_split="validation")
    with pytest.raises(UserError, match="has sets of labels, which only an entry of config.evals"):
        input_pipeline.open_splits(tiny_config.dataset)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "knn", "neighbors": 5000}, "config.evals.a: neighbors is 5000, and there are"),
        ({"kind": "fewshot", "shots": (1, 1000)}, "1000 shots of 10 classes are 10000 training"),
        ({"kind": "probe", "train_examples": 5}, "There are 5 training examples of 10 classes"),
        ({"kind": "knn", "train_split": "train+test"}, "355 of the 355 examples of .* are also in"),
    ],
)
def test_too_few_examples_are_found_at_the_start(entry, message, on_one_device, tmp_path):
    with pytest.raises(UserError, match=message):
        train.train(quick_config(evals={"a": entry}), tmp_path)
