"""Settings of the whole test run."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic(tmp_path, monkeypatch):
    """Same random numbers in every test, and nothing written into the repository."""
    torch.manual_seed(0)
    # What `seed_everything` of another test left behind would seed the processes a test starts.
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.chdir(tmp_path)
