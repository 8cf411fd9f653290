"""Metrics on Weights & Biases, in its offline mode."""

import contextlib
import importlib.util
import json
import struct
import time

import pytest

from vit_jax.errors import UserError
from vit_jax.logs import run_log, tracking
from vit_jax.storage.mirror import Mirror

wandb = pytest.importorskip("wandb")


def sent(workdir) -> list[list]:
    """What each start of a run would send: its id, then (step, metrics) of each row."""
    from wandb.proto import wandb_internal_pb2

    starts = []
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        sent, records, deadline = [], [], time.monotonic() + 60
        while not records or not records[-1].HasField("exit"):  # its own process still writes
            assert time.monotonic() < deadline
            time.sleep(0.1)
            data = log_records(path.read_bytes())
            records = [wandb_internal_pb2.Record.FromString(record) for record in data]
        for record in records:
            if record.HasField("run"):
                sent.append(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                row = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
                metrics = {name: value for name, value in row.items() if "/" in name}
                sent.append((row["global_step"], metrics))
        starts.append(sent)
    return starts


def log_records(data: bytes):
    """Yields the records of a short log in LevelDB's format, after a header of 7 bytes."""
    start = 7
    while start + 7 < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, start)
        if kind != 1 or start + 7 + length > len(data):  # unfinished
            return
        yield data[start + 7 : start + 7 + length]
        start += 7 + length


def test_a_resumed_run_goes_on_in_the_same_run(tmp_path, tiny_config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tiny_config.wandb = "tests"
    for step in (1, 2):
        with contextlib.closing(run_log.RunLog(Mirror(tmp_path), step - 1, tiny_config)) as log:
            log.write(step, "train", {"loss": 1.0 / step})
    first, second = sent(tmp_path)
    assert first[0] == second[0] == (tmp_path / "wandb_id").read_text()
    assert first[1] == (1, {"train/loss": 1.0})
    assert second[1] == (2, {"train/loss": 0.5})


def test_nothing_is_sent_unless_asked(tmp_path, tiny_config):
    with contextlib.closing(run_log.RunLog(Mirror(tmp_path), 0, tiny_config)) as log:
        log.write(1, "train", {"loss": 1.0})
    assert not list(tmp_path.glob("wandb*"))


def test_a_missing_package_is_named(tiny_config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tiny_config.wandb = "tests"
    with pytest.raises(UserError, match="isn't installed: pip install wandb"):
        tracking.check(tiny_config)
