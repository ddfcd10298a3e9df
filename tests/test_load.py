"""From a bank to a model that predicts, bit by bit what the live objects predict."""

import peft
import pytest
import torch

import skillbank as sb
from skillbank.load import build, skills_on_base
from skillbank.mixture import Mixture
from skillbank.runtime.plan import START, plan_gated
from tests.tiny import close, random_skill, tiny_batch, tiny_policy

MODEL = {
    "_target_": "skillbank.models.diffusion.DiffusionPolicy",
    "observation_dim": 5,
    "action_dim": 3,
    "width": 16,
    "blocks": 2,
    "time_dim": 8,
    "time_hidden": [8, 8],
}
GATE = {"_target_": "skillbank.gate.MLPGate", "context_dim": 5, "skills": 2, "hidden": [8]}


def random_gate():
    torch.manual_seed(11)
    gate = build(GATE)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return gate


def fill(bank):
    bank.put(sb.Base(MODEL, tiny_policy().state_dict()), "base")
    for rank, name in ((2, "one"), (3, "two")):
        bank.put(random_skill(tiny_policy().net, rank=rank, seed=rank), name, card={"base": "base"})
    bank.put(sb.Composition("base", ("one", "two"), merge={"method": "stack", "weights": [0.7, -0.2]}), "merged")
    bank.put(sb.Composition("base", ("one", "two"), merge={"method": "svd", "rank": 2}), "truncated")
    bank.put(sb.Composition("base", ("one", "two"), gate=GATE, tensors=random_gate().state_dict()), "gated")
    constant = {"_target_": "skillbank.gate.ConstantGate", "context_dim": 5, "skills": 2}
    bank.put(sb.Composition("base", ("one", "two"), gate=constant, tensors={"weights": torch.tensor([0.7, -0.2])}), "constant")
    return bank


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return fill(sb.Bank(tmp_path_factory.mktemp("bank")))


def skills():
    return [random_skill(tiny_policy().net, rank=rank, seed=rank) for rank in (2, 3)]


def live(name):
    policy = tiny_policy()
    if name == "gated":
        return sb.Composed(policy, random_gate(), skills())
    made = {
        "one": lambda: skills()[0],
        "merged": lambda: sb.merge(skills(), [0.7, -0.2]),
        "truncated": lambda: sb.merge(skills(), method="svd", rank=2),
    }
    if name in made:
        sb.attach(policy.net, made[name]())
    return policy


def predict(model, temperature):
    policy = getattr(model, "model", model)
    policy.temperature = temperature
    torch.manual_seed(4)
    return model.predict({"observation": tiny_batch()["observation"].to(next(model.parameters()).dtype)})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["base", "one", "merged", "truncated", "gated"])
def test_loaded_is_live(bank, name, temperature):
    loaded = sb.load(name, bank, plan="reference")
    assert not any(module.training for module in loaded.modules())
    expected = predict(live(name), temperature)
    assert torch.equal(predict(loaded, temperature), expected)
    assert name == "base" or not torch.equal(expected, predict(tiny_policy(), temperature))
    exact = predict(sb.load(name, bank, plan="reference").double(), temperature)
    for plan in [None] if name == "base" else [None, "factors"]:
        close(predict(sb.load(name, bank, plan=plan).double(), temperature), exact)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("one", {"merged"}), ("merged", {"merged"}), ("truncated", {"merged"}), ("gated", {"per row"}), ("constant", {"merged"})],
)
def test_the_best_plan_is_taken_and_shown(bank, name, kinds):
    plan = sb.load(name, bank).plan
    assert {choice.kind for choice in plan.values()} == kinds
    assert set(plan) == set(skills()[0])
    assert str(plan).splitlines()[-1].split()[:2] == ["in", "all"]


def test_rows_that_share_their_weights_are_merged_where_that_pays(bank):
    for samples in (1, 1000):  # in 5 steps each
        plan = sb.load("gated", bank, samples=samples).plan
        for each in plan.values():
            out, width = each.size
            factors = 2 * each.rank * (out + width) * 5 * samples + START * 5
            assert each.kind == ("per row" if 2 * out * width * each.rank < factors else "factors")
            assert (each.repeats, each.passes) == (5 * samples, 5)
    net, wide = torch.nn.Sequential(torch.nn.Linear(512, 512)), sb.Skill({"0": (torch.randn(8, 512), torch.randn(512, 8))})
    mixture = Mixture(net, [wide, wide])
    kinds = {repeats: plan_gated(net, mixture, repeats=repeats).of("per row") for repeats in (1, 200, 300)}
    assert kinds == {1: [], 200: [], 300: ["0"]}
    assert plan_gated(net, mixture, repeats=20, passes=20).of("per row") == ["0"]
    assert plan_gated(net, mixture, repeats=20, passes=20, memory=2**19).of("per row") == []
    loaded, expected = sb.load("gated", bank, samples=3), sb.load("gated", bank, plan="reference")
    observation = tiny_batch()["observation"]
    for model in (loaded, expected):
        model.model.temperature = 0.0
    close(loaded.predict({"observation": observation}, samples=3), expected.predict({"observation": observation}, samples=3))
    close(loaded.predict({"observation": observation}, samples=3)[:, 1], expected.predict({"observation": observation}))


def test_a_plan_can_be_asked_for(bank):
    plan = sb.load("one", bank, plan={"leave.1": "factors"}).plan
    assert (plan["leave.1"].kind, plan["leave.1"].reason, plan["enter"].kind) == ("factors", "asked for", "merged")
    assert {each.kind for each in sb.load("constant", bank, plan="per row").plan.values()} == {"per row"}
    with pytest.raises(ValueError, match=r"module 'time.1' cannot be planned as 'merged': it has weights that a gate changes"):
        sb.load("gated", bank, plan="merged")
    with pytest.raises(ValueError, match=r"module 'blocks.0.expand' cannot be planned as 'per row': it has the same weights for every input"):
        sb.load("one", bank, plan="per row")
    with pytest.raises(ValueError, match="unknown plan 'fast': choose merged, per row, factors or reference"):
        sb.load("one", bank, plan="fast")
    with pytest.raises(ValueError, match=r"the plan names the module 'net.7', the skills are on \['time.1'"):
        sb.load("gated", bank, plan={"net.7": "factors"})


@pytest.mark.parametrize("form", [str, lambda path: path, sb.Bank], ids=["text", "path", "bank"])
def test_a_bank_or_where_it_is(bank, form):
    assert torch.equal(predict(sb.load("one@1", form(bank.root)), 0.0), predict(live("one"), 0.0))


def test_plain_peft_reads_a_version(bank):
    inputs = tiny_batch()["action"].flatten(1), tiny_batch()["observation"], torch.arange(6) % 5
    net = peft.PeftModel.from_pretrained(tiny_policy().net, str(bank.path("one@1"))).eval()
    with torch.no_grad():
        close(net(*inputs), live("one").net(*inputs))


def test_a_skill_of_another_base_is_refused(bank):
    other = tiny_policy()
    with torch.no_grad():
        next(layer for layer in other.net.modules() if isinstance(layer, torch.nn.Linear)).weight.add_(1e-3)
    ref = bank.put(sb.Base(MODEL, other.state_dict()), "other")
    bank.put(random_skill(other.net, seed=9), "stranger", card={"base": str(ref)})
    with pytest.raises(ValueError, match="one common base is needed, got"):
        skills_on_base(bank, ["one", "stranger"])
    with pytest.raises(ValueError, match=r"skill 'one@1' was trained on base 'base@1' \(\w{12}\), this model is \w{12}: load that base or retrain"):
        sb.check_base(bank, "one@1", other.net)


def test_a_version_of_another_kind_is_refused(bank):
    with pytest.raises(ValueError, match="'gated@1' is a composition, a skill is needed here"):
        skills_on_base(bank, ["gated"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", "'os.system' is no nn.Module, so a bank may not build it"),
        ("subprocess.Popen", "'subprocess.Popen' is no nn.Module, so a bank may not build it"),
        ("no_such_package.Model", "cannot import 'no_such_package.Model', the model class that a version names"),
        ("skillbank.models.diffusion.Nothing", "cannot import 'skillbank.models.diffusion.Nothing'"),
        ("Nothing", "cannot import 'Nothing'"),
    ],
)
def test_only_modules_are_built(tmp_path, target, message):
    bank = sb.Bank(tmp_path)
    bank.put(sb.Base({**MODEL, "_target_": target}, tiny_policy().state_dict()), "base")
    with pytest.raises(ValueError, match=message):
        sb.load("base", bank)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    bank = sb.Bank(tmp_path)
    tensors = tiny_policy().state_dict()
    tensors["net.surplus.weight"] = tensors.pop("net.enter.bias")
    bank.put(sb.Base(MODEL, tensors), "base")
    with pytest.raises(ValueError, match=r"missing \['net.enter.bias'\], unknown \['net.surplus.weight'\]"):
        sb.load("base", bank)


def test_unknown_and_damaged(tmp_path):
    bank = fill(sb.Bank(tmp_path))
    with pytest.raises(sb.bank.UnknownRef, match=r"no 'gatde'.* did you mean 'gated'"):
        sb.load("gatde", bank)
    path = bank.path("one@1") / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    for ref in ("one", "merged", "gated"):
        with pytest.raises(ValueError, match=r"one@1: adapter_model.safetensors does not match"):
            sb.load(ref, bank)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu(bank):
    with pytest.raises(ValueError, match="device=cuda was asked for, but torch sees no GPU: use device='cpu'"):
        sb.load("base", bank, device="cuda")
