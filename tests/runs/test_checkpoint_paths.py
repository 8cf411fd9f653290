"""A checkpoint's name, "best", "latest" or a step, wherever one is named."""

import json
import shutil

import numpy as np
import pytest
from orbax.checkpoint import StandardCheckpointer
from published import random_params, write_run
from whole_runs import quick_config

import predict
import vit_jax
from vit_jax import checkpoint, models, pretrained
from vit_jax.errors import UserError
from vit_jax.inference import export
from vit_jax.pretrained import convert
from vit_jax.runs.checkpoint_paths import at_step, parse_run_path, parse_step


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the digits with random checkpoints: step 20, the best, and step 60, the latest."""
    config = quick_config(num_classes=10)
    model = models.from_config(config)
    best, latest = (random_params(model, (16, 16), channels=1, seed=seed) for seed in (0, 1))
    workdir = write_run(tmp_path_factory.mktemp("runs") / "run", config, params=latest)
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(workdir / "checkpoints" / "20" / "params", best)
    for step, accuracy in ((20, 0.9), (60, 0.8)):
        folder = workdir / "checkpoints" / str(step) / "metrics"
        folder.mkdir()
        (folder / "metrics").write_text(json.dumps({"accuracy": accuracy}))
    return workdir


def bias(params):
    return np.asarray(params["head"]["bias"])


@pytest.mark.slow
def test_every_reader_takes_a_name(run, tmp_path, capsys):
    """In Python, in the path and as the flag --step."""
    expected = {step: bias(checkpoint.restore_params(run, step)[1]) for step in (20, 60)}
    assert (expected[20] != expected[60]).any()
    model = models.from_config(quick_config(num_classes=10))
    for name, step in (("best", 20), ("latest", 60), ("20", 20)):
        path, flag = run / "checkpoints" / name, ["--step", name]
        config = quick_config(init_from=str(path), num_classes=10)
        target = tmp_path / f"{name}.npz"
        assert convert.main([str(run), str(target), "--format=google", *flag]) == 0
        parser = export.argparse.ArgumentParser()
        export.add_model_flags(parser)  # of the server too
        for params in (
            checkpoint.restore_params(run, name)[1],
            vit_jax.Classifier.load(path).params,
            predict.load(run, None, None, step=name).params,
            predict.load(None, None, str(run), step=name).params,
            pretrained.from_config(config, model, (16, 16, 1)),
            export.load(parser.parse_args([str(run), *flag])).params,
            pretrained.load(target, model, (16, 16)),
        ):
            np.testing.assert_array_equal(bias(params), expected[step])


def test_paths_into_a_run(run, tmp_path):
    folder = run / "checkpoints"
    for path, expected in (
        (run, (run, None, None)),
        (folder / "20", (run, 20, None)),
        (folder / "best", (run, "best", None)),
        (folder / "latest" / "ema_params", (run, "latest", "ema_params")),
        (folder / "20" / "params", (run, 20, "params")),
        (run / "best", None),
        (folder / "worst", None),
    ):
        assert parse_run_path(path) == expected
    (tmp_path / "checkpoints" / "best").mkdir(parents=True)  # of another program
    assert parse_run_path(tmp_path / "checkpoints" / "best") is None


def test_mistakes_are_named(run, tmp_path, capsys):
    for step in ("bset", "-1", "1.5", "", True, -1):
        with pytest.raises(UserError, match="it must be a step, 'best' or 'latest'"):
            parse_step(step)
    for path in (run / "checkpoints" / "20", tmp_path / "w.npz"):
        with pytest.raises(UserError, match=f"--step is best, but {path} is not a run's folder"):
            at_step(path, "best")
    assert convert.main([str(run), str(tmp_path / "a.npz"), "--format=google", "--step=7"]) == 2
    assert "No checkpoint of step 7" in capsys.readouterr().err
    with pytest.raises(UserError, match="--step is best: it needs --workdir"):
        predict.load(None, quick_config(init_from=str(run)), None, step="best")
    copy = shutil.copytree(run, tmp_path / "copy")
    for step in ("20", "60"):
        shutil.rmtree(copy / "checkpoints" / step / "metrics")
    with pytest.raises(UserError, match="was evaluated, so none is the best"):
        checkpoint.restore_params(copy, "best")
