"""Skills found by a few examples: the right one first, copies apart, many in one pass as each alone, and from the command line to a composition."""

import copy
import json
import random
import re
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import skillbank as sb
from skillbank import cli, recipe
from skillbank.attach import mark
from skillbank.folding import fold
from skillbank.kshot import losses_of, text_batches
from skillbank.models.transformer import CausalLM
from skillbank.tasks.records import read_records
from skillbank.tasks.text import TextTask
from tests.commands import ROOT, Commands
from tests.tiny import random_skill, tiny_batch, tiny_policy

LETTERS = "abcdefgh"
FUNCTIONS = {
    "next": lambda s: "".join(LETTERS[(LETTERS.index(letter) + 1) % 8] for letter in s),
    "back": lambda s: "".join(LETTERS[LETTERS.index(letter) - 1] for letter in s),
    "flip": lambda s: "".join(LETTERS[7 - LETTERS.index(letter)] for letter in s),
    "first": lambda s: s[0] * 3,
}
NET = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def records(function, count, seed):
    rng = random.Random(seed)
    return [{"prompt": f"{word}>", "completion": function(word)} for word in ("".join(rng.choices(LETTERS, k=3)) for _ in range(count))]


def text_task(name, function):
    return TextTask(name=name, data=records(function, 200, seed=0), tokenizer="bytes", length=16)


def turned(skill):
    """The same function, with other factors."""
    return sb.Skill({name: (2 * a.flip(0), b.flip(1) / 2) for name, (a, b) in skill.factors.items()})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a bank of a small language model that repeats a word, a skill for each function, copies, and 8 new examples of every function."""
    home, options = tmp_path_factory.mktemp("home"), {"progress": False, "ema": None, "lr": 1e-2}
    repeat = text_task("repeat", str)
    torch.manual_seed(0)
    model = CausalLM(NET, **repeat.dimensions)
    sb.fit(model, repeat.batches(batch_size=64, seed=0), model.parameters(), steps=100, **options)
    bank = sb.Bank(home / "bank")
    conf = {"_target_": "skillbank.models.transformer.CausalLM", "net": NET, **repeat.dimensions}
    bank.put(sb.Base(conf, model.state_dict()), "base")
    together = sb.Together(model, range(4), ranks=4, scales=4.0)
    batches = [text_task(name, function).batches(batch_size=32, seed=0) for name, function in FUNCTIONS.items()]
    sb.fit(together, sb.together_batches(batches), together.groups(), steps=60, **options)
    skills = {name: together.read(k) for k, name in enumerate(FUNCTIONS)}
    copies = {"twin": turned(skills["next"]), "near": sb.stack([skills["next"], skills["first"]], [0.98, 0.02])}
    for name, skill in {**copies, **skills}.items():
        bank.put(skill, f"words/{name}", card={"base": "base"})
    bank.put(skills["next"], "elsewhere", card={"base": {"name": "gpt2"}})
    bank.put(sb.Base({"_target_": "x.Y"}, {"net.a.weight": torch.ones(2, 2)}), "alone")
    for name, function in FUNCTIONS.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(function, 8, seed=1)))
    return home


@pytest.fixture(scope="module")
def bank(home):
    return sb.Bank(home / "bank")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_right_skill_is_first(home, bank, name):
    found = sb.best_skills(bank, "base", home / f"{name}.jsonl")
    assert sorted(FUNCTIONS) == sorted({"near": "next", "twin": "next"}.get(each, each) for each in names(found))
    assert {"near": "next", "twin": "next"}.get(names(found)[0], names(found)[0]) == name
    assert [each.loss for each in found] == sorted(each.loss for each in found)
    assert found[0].better == 1
    assert found[0].loss < found[1].loss / 2
    assert max(each.cosine for each in found) <= 0.9
    task = TextTask(name=name, data=home / f"{name}.jsonl", tokenizer="base", bank=bank, held_out=1, test=home / f"{name}.jsonl")
    own = sb.load("base", bank)
    for each in found:  # by the task's own measure
        loss = task.evaluate(sb.load(str(each.ref), bank))["loss"]
        assert each.loss == pytest.approx(loss, rel=1e-4)
        assert each.margin == pytest.approx(task.evaluate(own)["loss"] - loss, rel=1e-4)


def names(found):
    return [each.ref.name.removeprefix("words/") for each in found]


def test_copies_are_kept_apart(home, bank):
    def found(**options):
        return sb.best_skills(bank, "base", home / "next.jsonl", **options)

    assert set(names(found(diversity=0, top=3))) == {"next", "twin", "near"}
    every = found(diversity=0, top=10)
    assert len(every) == 6
    assert max(each.cosine for each in every) > 0.99
    (best, second) = found(top=2)
    assert (best, second) == (found()[0], found()[1])
    assert best.cosine == 0
    assert second.cosine == pytest.approx(float(sb.cosine([bank.get(best.ref), bank.get(second.ref)])[0, 1]))
    assert names(found(diversity=1.9)) == names([best])
    assert names(found(pattern="*/f*")) == sorted(names(found(pattern="*/f*")), key=names(every).index)
    assert set(names(found(pattern="*/f*"))) == {"flip", "first"}


def test_what_is_better_on_most_examples_may_come_first(home, bank):
    """Rather than what gains much on some."""
    task = [*read_records(home / "next.jsonl")[:3], *read_records(home / "first.jsonl")[:2]]
    by_loss, by_share = (sb.best_skills(bank, "base", text_batches(task, "base", bank), by=by, diversity=0) for by in ("loss", "better"))
    assert set(names(by_loss)[:3]) == {"next", "twin", "near"}
    assert names(by_share)[0] == "first"
    assert (by_share[0].better, by_loss[0].better) == (0.8, 0.6)
    assert by_share[0].margin < by_loss[0].margin


def one_by_one(model, skills, batches):
    """Every skill added into the weights of a copy."""
    found = []
    for skill in skills:
        alone = copy.deepcopy(model)
        fold(alone.net, skill)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            first = alone.losses(batches[0])
        found.append(torch.cat([first, *(alone.losses(batch).detach() for batch in batches[1:])]))
    return torch.stack(found).double()


def language_model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=31, initializer_range=0.3, **{key: value for key, value in NET.items() if key != "model_type"})
    return CausalLM(LlamaForCausalLM(config).double()).eval()


def several(net):
    """Of other ranks, and on other layers."""
    modules = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    shapes = [(2, modules), (5, modules[:3]), (1, modules[-1:]), (3, modules[2:]), (2, modules[:1])]
    return [random_skill(net, rank, part, torch.float64, size=0.3, seed=seed) for seed, (rank, part) in enumerate(shapes)]


@pytest.mark.parametrize("size", [1, 60, 10**6])
def test_many_in_a_pass_are_each_alone(size):
    model = language_model()
    before = {name: dict(layer.__dict__) for name, layer in model.net.named_modules()}
    skills = [several(model.net)[0].scaled(0.0), *several(model.net)]
    ids = torch.randint(31, (7, 6), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(6) < torch.tensor([6, 5, 4, 6])[:, None]).long()
    packed = {"input_ids": ids[4:6], "segments": torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2]])}
    batches = [{"input_ids": ids[:4], "attention_mask": mask}, packed, {"input_ids": ids[6:], "labels": ids[6:].clamp(min=15)}]
    found = losses_of(model, iter(skills), batches, size=size)
    assert found.shape == (6, 4 + 4 + 1)
    torch.testing.assert_close(found, one_by_one(model, skills, batches), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(found[0], torch.cat([model.losses(batch) for batch in batches]), rtol=1e-10, atol=1e-10)
    assert (found[1:] - found[0]).abs().amax(1).min() > 1e-3
    assert mark(model.net) is None
    assert [name for name, layer in model.net.named_modules() if layer.__dict__.keys() != before[name].keys()] == []


def test_layers_that_are_not_linear_are_taken_one_by_one():
    model = language_model()
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 31), (32, 2)))
    skills = [*several(model.net)[:2], sb.Skill({"model.embed_tokens": (a, b)}, frozenset(["model.embed_tokens"]))]
    batches = [{"input_ids": torch.randint(31, (3, 5), generator=generator)}]
    found = losses_of(model, skills, batches)
    torch.testing.assert_close(found, one_by_one(model, skills, batches), rtol=1e-10, atol=1e-10)
    assert mark(model.net) is None


def test_any_model_with_losses_will_do_and_draws_the_same_for_every_skill():
    policy = tiny_policy().double()
    skills = [random_skill(policy.net, dtype=torch.float64, size=0.3, seed=seed) for seed in range(3)]
    batch = {key: value.double() for key, value in tiny_batch().items()}
    before = torch.get_rng_state()
    found = losses_of(policy, skills, [batch])
    torch.testing.assert_close(found, one_by_one(policy, skills, [batch]), rtol=1e-10, atol=1e-10)
    assert torch.equal(torch.get_rng_state(), before)


class Scalar(CausalLM):
    def losses(self, batch):
        return super().losses(batch).mean()


def test_models_and_skills_that_do_not_fit(bank):
    model = language_model()
    skills, batches = several(model.net), [{"input_ids": torch.ones(2, 4, dtype=torch.long)}]
    with pytest.raises(ValueError, match=r"Linear has no losses\(batch\), the loss of every row: without it"):
        losses_of(nn.Linear(2, 2), skills, batches)
    with pytest.raises(ValueError, match=r"Scalar.losses gives \(\) for 10 rows: it must give the loss of every row, \(B,\)"):
        losses_of(Scalar(model.net), skills, batches)
    assert [name for name, layer in model.net.named_modules() if "forward" in layer.__dict__] == []
    with pytest.raises(ValueError, match="there are no examples: give at least one batch"):
        losses_of(model, skills, [])
    with pytest.raises(ValueError, match="there are no skills to look at"):
        losses_of(model, [], batches)
    with pytest.raises(ValueError, match="the net has no module 'other' that the skill adapts"):
        losses_of(model, [sb.Skill({"other": (torch.ones(1, 2), torch.ones(2, 1))})], batches)
    with pytest.raises(ValueError, match="no skills named '\\*' on the base 'alone@1': train some"):
        sb.best_skills(bank, "alone", batches)


@pytest.fixture
def run(home, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.chdir(home)
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr(sys, "argv", ["skillbank", "search", *arguments, "--bank", "bank"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr()
        return stop.value.code, out.out, out.err

    return run


def test_the_command_line(run):
    code, out, err = run("--examples", "flip.jsonl", "--base", "base", "--top", "2", "--json")
    assert code == 0, err
    best, second = json.loads(out)
    assert best["ref"] == "words/flip@1"
    assert set(best) == {"ref", "loss", "margin", "better", "cosine"}
    assert best["margin"] > second["margin"]
    code, out, _ = run("--examples", "flip.jsonl", "--base", "base", "--top", "2", "--by", "better")
    assert (code, out.split()[:5]) == (0, ["ref", "loss", "margin", "better", "cosine"])
    assert re.search(r"words/flip@1 +0\.\d+ +\+\d\.\d+ +100% +0.000", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base", "bsae"), "no 'bsae' .* did you mean 'base'"),
        (("--base", "words/next"), "'words/next@1' is a skill, a base is needed: give base=base@1"),
        (("--base", "alone"), r"Bank\('bank'\) has no skills named '\*' on the base 'alone@1': train some, or give another base"),
        (("--base", "base", "--pattern", "*/z"), "Bank.* has no skills named '\\*/z' on the base 'base@1'"),
        (("--base", "base", "--top", "0"), r"top must be at least 1, diversity in \[0, 2\] and by loss or better, got top=0, diversity=0.1"),
        (("--base", "base", "--by", "luck"), "top must be .* by='luck'"),
        (("--base", "base", "--examples", "none.jsonl"), "there are no examples at 'none.jsonl'"),
        (("--base", "base", "--examples", "empty.jsonl"), "empty.jsonl: there are no records"),
    ],
)
def test_mistakes_are_one_line(run, home, arguments, message):
    (home / "empty.jsonl").write_text("")
    given = arguments if "--examples" in arguments else ("--examples", "next.jsonl", *arguments)
    code, out, err = run(*given)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.match(f"skillbank: {message}", err)


TASK = ["task=text", "task.name=words/flip", "task.data=flip.jsonl", "task.length=16", "task.held_out=2", "episodes=0", "bank=bank"]


def test_what_is_found_is_merged_by_the_command_and_made_again(home, bank, monkeypatch):
    refs = [str(each.ref) for each in reversed(sb.best_skills(bank, "base", home / "flip.jsonl", top=2))]
    assert refs[-1] == "words/flip@1"
    command = Commands()
    searched = ["skills=search", "base=base", "search.examples=flip.jsonl", "search.top=2"]
    code, out, err = command(home, "compose", *TASK, *searched, "merge=stack", "weights=[0,1]", "name=merged")
    command.close()
    assert (code, out) == (0, "merged@1\n"), err
    card = bank.card("merged")
    assert (card.conf["skills"], card.conf["search"]["top"]) == (refs, 2)
    assert [parent["ref"] for parent in card.parents] == refs
    merged, own = (sb.load(ref, bank)({"input_ids": torch.arange(20, 30)[None]}) for ref in ("merged", "words/flip"))
    torch.testing.assert_close(merged, own)
    monkeypatch.chdir(home)
    assert sb.rebuild("merged", bank).equal


def configured(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return OmegaConf.to_container(compose("compose", [*TASK, *overrides]), resolve=True)


def test_a_gate_over_what_is_found_starts_at_the_best(home, bank, monkeypatch):
    monkeypatch.chdir(home)
    fit = ["fit.steps=2", "batch_size=4", "+fit.device=cpu", "gate=mlp", "gate.hidden=[8]"]
    made = recipe.compose(configured("skills=search", "base=base", "search.examples=flip.jsonl", *fit), bank)
    assert made.thing.skills[-1] == "words/flip@1"
    assert len(made.thing.skills) == 4
    ref = bank.put(made.thing, "gated", card=made.card)
    assert sb.rebuild(ref, bank).equal
    bank.remove(ref)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["base=base"], "skills=search looks for skills of a base by examples: .*, got base=base and search.examples=None"),
        (["search.examples=flip.jsonl"], "skills=search looks .*, got base=None and search.examples=flip.jsonl"),
        (["search.examples=flip.jsonl", "base=words/next"], "'words/next@1' is a skill, a base is needed: give base=base@1"),
    ],
)
def test_a_search_for_a_composition_needs_a_base_and_examples(home, bank, monkeypatch, overrides, message):
    monkeypatch.chdir(home)
    with pytest.raises(ValueError, match=message):
        recipe.compose(configured("skills=search", "merge=stack", *overrides), bank)
