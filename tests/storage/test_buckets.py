"""Paths in buckets: what is refused, by name, and what is repeated."""

import subprocess
import sys

import pytest
from whole_runs import ROOT

from vit_jax.errors import UserError
from vit_jax.storage import buckets, files


@pytest.mark.parametrize("path", ["gs://", "gs:///run", "http://bar/run", "az://bar/run"])
def test_other_kinds_of_storage_are_refused(path):
    with pytest.raises(UserError, match=r"must be a folder, or gs://BUCKET/FOLDER"):
        files.open_path(path)


def test_a_missing_client_is_named(monkeypatch):
    monkeypatch.setattr(buckets, "CLIENT", "no_such_client")
    with pytest.raises(UserError, match=r"in a bucket, .*pip install no_such_client"):
        files.open_path("gs://bar/run")


@pytest.mark.parametrize(
    ("faults", "path", "message"),
    [
        ({}, "gs://foo/run", "gs://foo/run can't be used: there is no such bucket"),
        ({"denied": 401}, "gs://bar/run", "credentials are missing or wrong: run `gcloud auth"),
        ({"denied": 403}, "gs://bar/run", "the account may not read and write"),
        ({"read_only": True}, "gs://bar/run", "the account may not read and write"),
    ],
)
def test_a_bucket_that_cannot_be_written_is_refused(bucket, faults, path, message):
    vars(bucket.faults).update(faults)
    with pytest.raises(UserError, match=message):
        buckets.check_writable(files.open_path(path))


def test_nothing_is_left_behind(bucket):
    buckets.check_writable(files.open_path("gs://bar/run"))
    assert bucket.names() == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["error_every", "drop_every"])
def test_requests_that_fail_are_repeated_which_is_said_once(bucket, fault, caplog, monkeypatch):
    folder = files.open_path("gs://bar/run")
    monkeypatch.setattr(buckets.RetriesHandler, "is_first", True)
    for handler in buckets.logging.getLogger("gcsfs").handlers:
        vars(handler).pop("is_first", None)
    setattr(bucket.faults, fault, 4)
    for i in range(4):
        files.write_atomically(folder / f"{i}.txt", str(i))
        assert (folder / f"{i}.txt").read_text() == str(i)
    assert bucket.num_faults > 1
    said = caplog.text.count("the request is repeated")
    assert said == 1 or (fault == "drop_every" and said == 0)  # aiohttp may repeat it by itself


def test_a_folder_is_moved(bucket):
    folder = files.open_path("gs://bar/run/checkpoints/1")
    for name in ("commit_success.txt", "params/a", "params/b/c"):
        (folder / name).write_text(name)
    files.move_folder(folder, files.open_path("gs://bar/run/corrupt_checkpoints/1"))
    moved = ["run/corrupt_checkpoints/1/params/a", "run/corrupt_checkpoints/1/params/b/c"]
    assert bucket.names() == moved


def test_a_writer_in_another_process_is_seen_at_once(bucket):
    folder = files.open_path("gs://bar/run")
    assert not (folder / "seen").exists()
    code = "from vit_jax.storage.files import open_path; open_path('gs://bar/run/seen').touch()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert (folder / "seen").exists()
    assert [path.name for path in folder.iterdir()] == ["seen"]
