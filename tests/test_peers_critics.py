"""Second oracle: torchrl's own losses of implicit Q-learning. Skipped where it is not installed.

pip install --no-deps torchrl==0.14.1 tensordict==0.14.3 pyvers orjson
"""

import pytest
import torch

from skillbank.models.critics import Critic

pytestmark = pytest.mark.peers
objectives = pytest.importorskip("torchrl.objectives", reason="torchrl is not installed")


class Joined(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, observation, action):
        return self.head(torch.cat([observation, action], -1))


def theirs(critic, heads):
    from tensordict.nn import TensorDictModule
    from tensordict.nn.distributions import NormalParamExtractor
    from torchrl.modules import IndependentNormal, ProbabilisticActor, ValueOperator

    head = torch.nn.Sequential(torch.nn.Linear(3, 4), NormalParamExtractor()).double()
    actor = ProbabilisticActor(
        TensorDictModule(head, in_keys=["observation"], out_keys=["loc", "scale"]), in_keys=["loc", "scale"], distribution_class=IndependentNormal
    )
    q = [ValueOperator(Joined(each), in_keys=["observation", "action"]) for each in heads]
    v = ValueOperator(critic.net["v"], in_keys=["observation"])
    loss = objectives.IQLLoss(actor, q, v, loss_function="l2", temperature=critic.beta, expectile=critic.expectile, reduction="none")
    loss.make_value_estimator(gamma=critic.discount)
    return loss, actor


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.filterwarnings("ignore")  # of torchrl and tensordict about themselves
def test_implicit_q_learning(seed):
    from tensordict import TensorDict

    torch.manual_seed(seed)
    # theirs keeps the discount in single precision, where this one is exact
    critic = Critic(3, 2, hidden=[8, 8], expectile=0.8, discount=0.9375, beta=3.0).double().eval()
    with torch.no_grad():
        for p in critic.target.parameters():
            p.add_(0.3 * torch.randn_like(p))
    rows = 32
    observation, following, action = torch.randn(rows, 3).double(), torch.randn(rows, 3).double(), torch.rand(rows, 2).double() * 2 - 1
    reward, ended = torch.randn(rows).double(), torch.rand(rows) < 0.3
    batch = {"observation": observation, "action": action[:, None], "next_observation": following, "reward": reward, "mask": 1 - ended.double()}
    after = {"observation": following, "reward": reward[:, None], "done": ended[:, None], "terminated": ended[:, None]}
    peers = TensorDict({"observation": observation, "action": action, "next": after}, rows)
    slow, actor = theirs(critic, critic.target.heads)
    value = slow.value_loss(peers.clone())[0]
    q = theirs(critic, critic.net["q"].heads)[0].qvalue_loss(peers.clone())[0]
    torch.testing.assert_close(critic.losses(batch), value + q / 2, rtol=1e-9, atol=1e-12)  # theirs is the sum over the two Q
    weighted = slow.actor_loss(peers.clone())[0]
    chances = actor.get_dist(peers.clone()).log_prob(action)
    torch.testing.assert_close(-critic.weights(observation, action) * chances, weighted, rtol=1e-9, atol=1e-12)
