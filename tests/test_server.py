"""Rows of one batch by different versions are what each version predicts by itself."""

import pytest
import torch

import skillbank as sb
from skillbank.runtime.residents import Residents
from tests.test_load import MODEL, fill
from tests.tiny import close, random_skill, tiny_policy

ALL = ["base", "one", "merged", "truncated", "gated", "constant", "two", "chosen", "mean"]


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    bank = fill(sb.Bank(tmp_path_factory.mktemp("bank")))
    bank.put(sb.Composition("base", ("one", "two"), merge={"method": "ties", "weights": [0.5, 2.0], "density": 0.5, "rank": 4}), "chosen")
    bank.put(sb.Composition("base", ("one", "two"), merge={"method": "stack"}), "mean")
    return bank


def observations(rows):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(3))


def alone(bank, ref, observation, *, seed=None, temperature=0.0, **options):
    model = sb.load(ref, bank, plan="reference")
    getattr(model, "model", model).temperature = temperature
    if seed is not None:
        torch.manual_seed(seed)
    return model.predict({"observation": observation[None]}, **options)[0]


@pytest.mark.parametrize("slots", [2, 3, 64])
@pytest.mark.parametrize("rows", [3, 1024])
def test_every_row_is_its_version(bank, slots, rows):
    server = sb.Server("base", bank, slots=slots, rank=8, rows=rows)
    server.model.temperature = 0.0
    refs = [ALL[i % len(ALL)] for i in (3, 0, 1, 4, 4, 2, 6, 5, 7, 1, 8, 0, 3)]
    observation = observations(len(refs))
    found = server.predict({"observation": observation}, refs)
    for i, ref in enumerate(refs):
        close(found[i], alone(bank, ref, observation[i]))
    close(server.predict({"observation": observation[:1]}, ["two"])[0], alone(bank, "two", observation[0]))


@pytest.mark.parametrize("samples", [None, 3])
def test_seeds_make_rows_repeat_whatever_is_beside_them(bank, samples):
    server = sb.Server("base", bank, slots=4, rank=8)
    server.model.temperature = 1.0
    options = {} if samples is None else {"samples": samples}
    refs, seeds, observation = ["one", "gated", "base", "one"], [7, 8, 7, 9], observations(4)
    found = server.predict({"observation": observation}, refs, seeds=seeds, **options)
    for i, ref in enumerate(refs):
        close(found[i], alone(bank, ref, observation[i], seed=seeds[i], temperature=1.0, **options))
    assert not torch.allclose(found[0], found[3])


def test_a_compiled_server_says_the_same(bank):
    server = sb.Server("base", bank, slots=4, rank=8, compile=True)
    server.model.temperature = 0.0
    server._answer.options["backend"] = "eager"
    refs, observation = ["one", "gated"], observations(2)
    found = server.predict({"observation": observation}, refs)
    for i, ref in enumerate(refs):
        close(found[i], alone(bank, ref, observation[i]))


def test_what_cannot_be_served_is_refused_by_name(bank):
    server = sb.Server("base", bank, slots=1, rank=2)
    batch = {"observation": observations(2)}
    with pytest.raises(ValueError, match="got 2 rows, 1 references and 1 seeds"):
        server.predict(batch, ["one"])
    with pytest.raises(ValueError, match="2 skills at once do not go into 1 slots"):
        server.predict(batch, ["one", "merged"])
    with pytest.raises(ValueError, match="has rank 3, slots hold 2"):
        server.predict(batch, ["two", "base"])
    with pytest.raises(sb.bank.refs.UnknownRef, match="no 'absent' in Bank"):
        server.predict(batch, ["absent", "base"])
    with pytest.raises(ValueError, match="'one' is a skill, a server needs a base"):
        sb.Server("one", bank)
    other = tiny_policy()
    with torch.no_grad():
        next(layer for layer in other.net.modules() if isinstance(layer, torch.nn.Linear)).weight.add_(1e-3)
    bank.put(sb.Base(MODEL, other.state_dict()), "other")
    with pytest.raises(ValueError, match="'other@1' is no skill or composition on the base 'base@1'"):
        server.predict(batch, ["other", "base"])


def test_what_was_not_used_for_longest_makes_room():
    policy = tiny_policy()
    fetched = []

    def fetch(name):
        fetched.append(name)
        return random_skill(tiny_policy().net, rank=2, seed=int(name))

    residents = Residents(sb.Slots(policy.net, 3, rank=2), fetch)
    places = residents.place(["1", "2", "3", "1"])
    assert sorted(places.values()) == [0, 1, 2]
    assert residents.place(["1"]) == {"1": places["1"]}
    assert residents.place(["4", "3"]) == {"4": places["2"], "3": places["3"]}
    assert fetched == ["1", "2", "3", "4"]
    assert residents.place(["2"]) == {"2": places["1"]}
    assert residents.slots.read(places["1"]).fingerprint == fetch("2").fingerprint
    with pytest.raises(ValueError, match="4 skills at once do not go into 3 slots"):
        residents.place(["1", "2", "3", "4"])
