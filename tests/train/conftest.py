import pytest

import train.config


@pytest.fixture(autouse=True)
def _trust_test_classes(monkeypatch):
    """Runs of this folder's method can be written and read back."""
    monkeypatch.setattr(train.config, "PACKAGES", (*train.config.PACKAGES, "tests."))
