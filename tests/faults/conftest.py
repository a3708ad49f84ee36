"""What the tests of faults share."""

import jax
import pytest


@pytest.fixture
def one_device(monkeypatch):
    """From here on jax has one device, as `runs`' flags want it."""
    present = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda: present[:1])
