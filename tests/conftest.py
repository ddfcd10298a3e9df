"""Offline, seeded, one thread."""

import os

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", TQDM_DISABLE="1")
os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU, as numpy; read when Triton is imported, which torch does as well

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from tests.commands import Commands
from tests.tiny import tiny_batch, tiny_policy
from tests.walkers import Short

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    os.environ["SKILLBANK_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def policy():
    return tiny_policy()


@pytest.fixture
def batch():
    return tiny_batch()


@pytest.fixture
def registered():
    Short.seen = []
    made = {"Short-v0": Short, "Wide-v0": Short, "Choice-v0": Short, "Open-v0": Short}
    wide = {"action_space": Box(-np.inf, np.inf, (2,))}, {"action_space": Discrete(3)}
    classes = [Short, type("Wide", (Short,), wide[0]), type("Choice", (Short,), wide[1]), Short]
    for (name, _), each in zip(made.items(), classes, strict=True):
        gymnasium.register(name, entry_point=each, max_episode_steps=None if name == "Open-v0" else 50, order_enforce=False)
    yield
    for name in made:
        del gymnasium.registry[name]


@pytest.fixture(scope="module")
def command():
    """`command(folder, "train", ...)` runs train.py or compose.py as a terminal would."""
    commands = Commands()
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub in this process, which huggingface_hub asks from now on."""
    from huggingface_hub import constants

    from tests.hub import serving

    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        yield hub
