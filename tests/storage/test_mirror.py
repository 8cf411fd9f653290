"""Folders to append to, whose files are uploaded if the folder is in a bucket."""

import time
import types

import pytest

from vit_jax.errors import UserError
from vit_jax.storage import mirror
from vit_jax.storage.mirror import Mirror, check_out, written_folder


def test_a_folder_on_a_disk_is_written_in_place(tmp_path):
    files = Mirror(tmp_path)
    assert files.folder == tmp_path
    assert files.upload()


def test_files_go_on_where_the_bucket_has_them(bucket):
    for text in ("one\n", "two\n"):
        files = Mirror("gs://bar/run", existing=["train.log", "other"])
        with (files.folder / "train.log").open("a") as file:
            file.write(text)
        files.close()
        assert not files.folder.exists()
    assert bucket.read("run/train.log") == b"one\ntwo\n"
    assert bucket.names() == ["run/train.log"]


def test_only_changed_files_are_uploaded(bucket):
    files = Mirror("gs://bar/run")
    (files.folder / "profile").mkdir()
    (files.folder / "profile" / "a").write_text("a")
    (files.folder / "wandb").mkdir()
    (files.folder / "wandb" / "kept elsewhere").write_text("b")
    files.upload()
    assert bucket.names() == ["run/profile/a"]
    generation = bucket.objects["run/profile/a"].generation
    files.upload()
    assert bucket.objects["run/profile/a"].generation == generation
    (files.folder / "profile" / "a").write_text("ab")
    files.close()
    assert bucket.names() == ["run/profile/a", "run/wandb/kept elsewhere"]
    assert bucket.read("run/profile/a") == b"ab"


def test_nothing_is_uploaded_once_another_program_has_the_folder(bucket):
    lock = types.SimpleNamespace(is_lost=False)
    files = Mirror("gs://bar/run", lock=lock)
    (files.folder / "metrics.jsonl").write_text("a")
    assert files.upload()
    lock.is_lost = True
    (files.folder / "metrics.jsonl").write_text("stale")
    files.close()
    assert bucket.read("run/metrics.jsonl") == b"a"


def test_changes_are_uploaded_regularly(bucket, monkeypatch):
    monkeypatch.setattr(mirror, "UPLOAD_SECONDS", 0.05)
    files = Mirror("gs://bar/run")
    (files.folder / "train.log").write_text("a")
    deadline = time.monotonic() + 60  # the client is imported first
    while "run/train.log" not in bucket.names() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert bucket.read("run/train.log") == b"a"
    files.close()


def test_an_outage_is_logged_once_and_made_up_for(bucket, caplog):
    files = Mirror("gs://bar/run")
    (files.folder / "train.log").write_text("a")
    bucket.faults.denied = 403
    with caplog.at_level("INFO", logger="vit_jax"):
        assert not files.upload()
        assert not files.upload()
        bucket.faults.denied = 0
        assert files.upload()
    messages = [record.getMessage() for record in caplog.records if record.name == "vit_jax"]
    assert len(messages) == 2
    assert "The logs in gs://bar/run can't be written: the account may not" in messages[0]
    assert bucket.read("run/train.log") == b"a"


def test_what_cannot_be_uploaded_stays_on_this_machine(bucket, caplog):
    files = Mirror("gs://bar/run")
    (files.folder / "train.log").write_text("a")
    bucket.faults.denied = 403
    files.close()
    assert str(files.folder) in caplog.text
    assert (files.folder / "train.log").read_text() == "a"


def test_written_folder_is_complete_or_an_error(bucket, tmp_path):
    for folder in (tmp_path / "new", "gs://bar/new"):
        with written_folder(folder) as local:
            (local / "inside").mkdir()
            (local / "inside" / "a.txt").write_text("a")
    assert (tmp_path / "new" / "inside" / "a.txt").read_text() == "a"
    assert bucket.read("new/inside/a.txt") == b"a"
    bucket.faults.read_only = True
    with (
        pytest.raises(UserError, match="gs://bar/new can't be used: the account may not"),
        written_folder("gs://bar/new") as local,
    ):
        (local / "a.txt").write_text("a")


def test_a_folder_that_cannot_be_written_is_found_before(bucket, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    bucket.faults.read_only = True
    for folder, message in (
        (tmp_path / "a.txt", r"a.txt is a file\): give another folder, by --out"),
        (tmp_path / "a.txt" / "out", "a.txt is a file"),
        ("/proc/out/new", "can't be written \\(.+\\): give another folder"),
        ("gs://bar/out", "gs://bar/out can't be used: the account may not"),
    ):
        with pytest.raises(UserError, match=message):
            check_out(folder)
    check_out(tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
