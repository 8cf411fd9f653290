"""Leases: one holder at a time, on a disk and in a bucket; a dead holder's lease can be taken."""

import subprocess
import sys
import time

import pytest
from whole_runs import ROOT

from vit_jax.storage import lease

HOLD = (
    "import sys, time; from vit_jax.storage import lease; held = lease.acquire(sys.argv[1]); "
    "print('held', flush=True); time.sleep(100)"
)


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    if request.param == "disk":
        return str(tmp_path)
    request.getfixturevalue("bucket")
    return "gs://bar/run"


@pytest.fixture
def impatient(monkeypatch):
    """Holders renew a lease every 0.2 s, and are taken for dead after 1 s."""
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)


def test_a_second_program_is_refused_by_name_until_the_first_is_killed(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    start = time.monotonic()
    with pytest.raises(lease.Taken, match=rf"trains in .*process {process.pid} on .*, since 20"):
        lease.acquire(folder)
    process.kill()
    process.wait()
    lease.acquire(folder).release()
    assert time.monotonic() - start < lease.LEASE_SECONDS / 2  # a process here is known to be dead


def test_a_released_lease_can_be_taken(folder):
    for _ in range(2):
        held = lease.acquire(folder)
        held.check()
        with pytest.raises(lease.Taken):
            lease.acquire(folder)
        held.release()


def test_a_holder_elsewhere_is_watched_for_signs_of_life(bucket, impatient, monkeypatch):
    monkeypatch.setattr(lease, "this_process", lambda: {**here, "host": "node7", "system": "other"})
    here = {"process": 4711, "since": "2026-01-01T00:00:00+00:00", "started": "1"}
    held = lease.acquire("gs://bar/run")
    with pytest.raises(lease.Taken, match="process 4711 on node7, since 2026-01-01"):
        lease.acquire("gs://bar/run")
    held.released.set()  # it is dead, and its object stays
    lease.acquire("gs://bar/run").release()
    assert bucket.names() == []


def test_a_holder_that_was_suspended_notices_that_it_lost_the_lease(bucket, impatient):
    suspended = lease.acquire("gs://bar/run")
    suspended.released.set()
    bucket.objects.clear()  # as another program sees it after LEASE_SECONDS
    other = lease.acquire("gs://bar/run")
    suspended.released.clear()
    suspended.renewed -= 10
    with pytest.raises(lease.Taken, match="trains in gs://bar/run: process"):
        suspended.check()
    suspended.release()
    assert bucket.names() == ["run/.lock"]
    other.check()
    other.release()


def test_a_lost_answer_does_not_lose_the_lease(bucket):
    held = lease.acquire("gs://bar/run")
    written = held.store.write(lease.NAME, held.content()).result()  # the answer got lost
    assert written.generation != held.generation
    held.renew()
    assert not held.is_lost
    held.release()
    assert bucket.names() == []


def test_a_lost_answer_to_the_first_request_does_not_refuse_the_program_itself(
    bucket, impatient, monkeypatch
):
    """The client repeats the request, whose condition then fails."""
    write = bucket.write

    def written_twice(name, content, query):
        write(name, content, query)
        return write(name, content, query)

    monkeypatch.setattr(bucket, "write", written_twice)
    held = lease.acquire("gs://bar/run")
    monkeypatch.setattr(bucket, "write", write)
    held.renew()
    held.check()
    held.release()
    assert bucket.names() == []


def test_a_lease_that_was_removed_by_hand_is_written_again(bucket, impatient):
    held = lease.acquire("gs://bar/run")
    bucket.objects.clear()
    held.renew()
    held.check()
    assert bucket.names() == ["run/.lock"]
    held.release()


def test_an_outage_does_not_lose_the_lease(bucket, impatient):
    held = lease.acquire("gs://bar/run")
    bucket.faults.is_gone = True
    time.sleep(1)
    bucket.faults.is_gone = False
    held.renewed -= 10
    held.check()
    held.release()


def test_a_damaged_lease_can_be_taken(folder, bucket, tmp_path, impatient):
    bucket.write("run/.lock", b"\xff", {})
    (tmp_path / lease.NAME).write_bytes(b"\xff")
    lease.acquire(folder).release()
