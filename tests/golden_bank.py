"""The small bank in tests/golden/bank, as it was made when its format was new; what is in it must stay readable."""

import torch

from skillbank import Bank, Base, Composition, Skill


def things():
    """Every kind of thing, from numbers that no random generator has a say in."""

    def ramp(*shape):
        return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)

    base = Base({"_target_": "torch.nn.Linear", "in_features": 3}, {"net.a.weight": ramp(4, 3), "net.b.weight": ramp(2, 4)})
    walk = Skill({"a": (ramp(2, 3), ramp(4, 2)), "b": (ramp(1, 4), ramp(2, 1))})
    run = Skill({"a": (2 * ramp(1, 3).half(), ramp(4, 1).half())})
    merged = Composition("base", ("skill/walk", "skill/run"), merge={"method": "stack", "weights": [0.75, -0.25]})
    gate = {"_target_": "skillbank.gate.ConstantGate", "context_dim": 3, "skills": 2}
    gated = Composition("base", ("skill/walk", "skill/run"), gate=gate, tensors={"weights": ramp(2)})
    return {"base": base, "skill/walk": walk, "skill/run": run, "merged": merged, "gated": gated}


def fill(bank: Bank) -> None:
    """Put all of them into a bank."""
    for name, thing in things().items():
        card = {"base": "base"} if isinstance(thing, Skill) else {}
        if name == "skill/run":
            card["parents"] = [{"ref": "skill/walk", "weight": 0.5}]
        fields = {"conf": {"steps": 3}, "data": {"demos": "ab" * 32}, "metrics": {"return": 1.5}, "tags": ["golden"], "license": "apache-2.0"}
        bank.put(thing, name, card={**card, **fields, "notes": f"{name}, with an ä and a 走."})
    bank.alias("skill/walk", "best", 1, protect=True)
