"""Settings of the whole test run."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic(tmp_path, monkeypatch):
    """Same random numbers in every test, and nothing written into the repository."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
