"""evaluate.py: the numbers of a run's checkpoints."""

import json
import re
import shutil

import forked
import pytest
from whole_runs import quick_config

import evaluate
import train
from vit_jax.errors import UserError
from vit_jax.parallel import mesh as meshes
from vit_jax.report import results


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
    """A run's folder, and the result of its training."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "create_mesh", lambda **_: one_device)
        config = quick_config(total_steps=20, ema_decay=0.9, eval_every_steps=10)
        return workdir, train.train(config, workdir)


def metrics(*args, **kwargs):
    result = evaluate.evaluate(evaluate.open_run(*args, **kwargs)).metrics
    return {name: value for name, value in result.items() if name != "ece"}


def test_evaluation_repeats_the_result_of_training(run, on_one_device):
    workdir, result = run
    assert metrics(workdir) == pytest.approx(result, rel=1e-6)
    others = evaluate.evaluate(evaluate.open_run(workdir)).evals
    assert others["val_raw"]["loss"] != pytest.approx(result["loss"], rel=1e-3)
    assert metrics(workdir, name="digits") == pytest.approx(result, rel=1e-6)
    training = metrics(workdir, step=20, split="train[:50]")
    assert training["loss"] != result["loss"]
    assert evaluate.open_run(workdir, "best").step in (10, 20)


def test_mistakes_are_named(run, tmp_path):
    workdir, _ = run
    with pytest.raises(UserError, match="no such folder"):
        evaluate.open_run(workdir, name=str(tmp_path / "photos"))
    with pytest.raises(UserError, match="No checkpoint of step 7"):
        evaluate.open_run(workdir, step=7)
    config = evaluate.open_run(workdir).config
    with pytest.raises(UserError, match="config.evals.fewshots.kind|'fewshots'"):
        evaluate.parse_evals("fewshots", config)
    with pytest.raises(UserError, match="--evals is '{1'; it must be names"):
        evaluate.parse_evals("{1", config)
    with pytest.raises(UserError, match="target is '.*'; it must be what `open_run"):
        evaluate.evaluate(str(workdir))
    with pytest.raises(UserError, match="config is 'configs/digits.py'; it must be a ConfigDict"):
        evaluate.open_weights("configs/digits.py")
    with pytest.raises(UserError, match="config.init_from is unset"):
        evaluate.open_weights(config)


def test_a_dataset_that_is_gone_is_mended_by_a_flag_that_is_named(run, tmp_path):
    copy = shutil.copytree(run[0], tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    config["dataset"]["name"] = str(tmp_path / "photos")
    (copy / "config.json").write_text(json.dumps(config))
    for args, message in (
        ([], "config.dataset.name is '.*photos', but there is no such folder; --dataset=... gives"),
        (["--dataset=/nowhere"], "(?m)^--dataset is '/nowhere', but there is no such folder$"),
        (["--config.dataset.eval_split=train"], "give --split instead of --config.dataset.eval_s"),
    ):
        result = forked.run_script("evaluate.py", f"--workdir={copy}", *args)
        assert result.returncode == 2
        assert re.search(message, result.stderr.strip()), result.stderr


def test_parameters_are_split_as_the_mesh_says(run, monkeypatch):
    workdir, result = run
    mesh = meshes.create_mesh(data=2, fsdp=2, tensor=2)
    monkeypatch.setattr(evaluate, "create_mesh", lambda **_: mesh)
    target = evaluate.open_run(workdir)
    kernel = target.params["Transformer"]["encoderblock_0"]["MlpBlock_0"]["Dense_0"]["kernel"]
    assert set(kernel.sharding.spec) == {"fsdp", "tensor"}
    assert evaluate.evaluate(target).metrics["loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_a_mesh_of_another_machine(run, caplog):
    config = evaluate.open_run(run[0]).config
    config.mesh = dict(data=5, fsdp=1, tensor=1)
    assert evaluate.mesh_of(config).shape == meshes.create_mesh().shape
    assert "Only batches are split over the devices instead" in caplog.text


@pytest.mark.slow
def test_report(run, on_one_device, tmp_path):
    workdir, _ = run
    target = evaluate.open_run(workdir)
    result = evaluate.evaluate(target, {}, reports_classes=True)
    predictions = result.predictions
    assert predictions.index.tolist() == list(range(355))
    for name, (low, high) in result.intervals.items():
        assert low < result.metrics[name] < high

    evaluate.write(target, result, tmp_path)
    contents = json.loads((tmp_path / "evaluation.json").read_text())
    assert contents["accuracy"] == result.metrics["accuracy"]
    right = [count for row, column, count in contents["confusion"] if row == column]
    assert sum(right) == predictions.correct.sum()
    assert list(contents["classes"]) == [str(digit) for digit in range(10)]
    confidences = [mistake["confidence"] for mistake in contents["mistakes"]]
    assert confidences == sorted(confidences, reverse=True)
    assert confidences[0] == predictions.confidence[~predictions.correct].max()
    for name in ("confusion.png", "mistakes.png", "attention.png", "calibration.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert any("calibration error" in line for line in results.table(result))
