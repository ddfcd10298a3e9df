"""Offline, seeded, one thread."""

import os

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", TQDM_DISABLE="1")

import pytest
import torch

from tests.tiny import tiny_batch, tiny_policy

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def policy():
    return tiny_policy()


@pytest.fixture
def batch():
    return tiny_batch()
