"""How much memory there is for a device."""

import types

import jax

from vit_jax.parallel import memory


def test_memory_is_what_the_device_tells_or_a_share_of_the_machine(monkeypatch):
    shared = memory.bytes_per_device()
    assert 2**24 < shared < 2**44
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    assert memory.bytes_per_device() // jax.device_count() == shared
    for stats, expected in (({"bytes_limit": 5}, 5), ({}, None), (None, None)):
        device = types.SimpleNamespace(platform="gpu", memory_stats=lambda stats=stats: stats)
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        assert memory.bytes_per_device() == expected
