"""The benchmarks run, and what they compose is what they say."""

import json
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks import stored
from benchmarks.intervals import interval
from benchmarks.levels import ActionLevel, NoiseLevel, ParameterLevel
from skillbank import Composed, ConstantGate, attach, check_model, merge
from tests.tiny import close, random_skill, tiny_batch, tiny_policy

ROOT = Path(__file__).parents[1]


def run(*command):
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_the_table_is_printed_from_stored_results():
    done = run("benchmarks.psec_continual", "--from-results")
    assert done.returncode == 0, done.stderr
    assert "S->W/det10/ours" in done.stdout
    assert "(the demonstrations)" in done.stdout


def test_the_readme_shows_what_is_stored():
    done = run("benchmarks.psec_continual", "--from-results", "--summary")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (ROOT / "README.md").read_text()


def test_merging_beside_its_peers():
    done = run("benchmarks.merge", "--quick", "--threads", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    header, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[:3])
    assert float(dict(zip(header, row, strict=True))["ours, error"]) == pytest.approx(1, abs=0.01)


def rows_of(done):
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("|"))
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_merging_files_entries_and_folding():
    files = rows_of(run("benchmarks.merge_files", "--quick", "--threads", "1"))
    assert [row["method"] for row in files][:2] == ["stack", "svd, rank 16"]
    assert all(float(row["written, MB"]) > 0.05 for row in files)
    entries = rows_of(run("benchmarks.merge_entries", "--quick", "--threads", "1"))
    assert {"ties", "magmax", "dare"} <= {row["method"] for row in entries}
    folding = rows_of(run("benchmarks.folding", "--quick"))
    assert [(row[""], row["changed"], row["drift"]) for row in folding if row[""] == "ours"] == [("ours", "0.0%", "0")] * 2


def test_gates_by_reward():
    rows = rows_of(run("benchmarks.gate_by_reward", "--quick"))
    assert [row["environment steps"] for row in rows] == ["", "", "", "", *3 * ["1,024"]]
    assert all(row["weights"].count("+-") == (2 if "run" in row[""] else 1) for row in rows[4:])


def test_skills_are_discovered_in_long_episodes():
    rows = {row["cut by"]: row for row in rows_of(run("benchmarks.discovery", "--quick"))}
    assert float(rows["base"]["f1"].partition(" ")[0]) >= 0.8 > float(rows["uniform"]["f1"].partition(" ")[0])


def test_running_and_training_beside_their_peers():
    layer = run("benchmarks.runtime", "--quick")
    assert layer.returncode == 0, layer.stderr[-2000:]
    assert layer.stdout.count("\n| PEFT loop ") == 2
    acting = rows_of(run("benchmarks.policy", "--quick"))
    assert [(row["N"], row["K"]) for row in acting] == [("64", "2")]
    assert {"limit", "reference", "planned", "compiled"} <= set(acting[0])
    gpu = run("benchmarks.gpu", "--quick")
    assert gpu.returncode == 0, gpu.stderr[-2000:]
    assert [line for line in gpu.stdout.splitlines() if line.isidentifier()] == ["device", "kernels", "layer", "policy", "training"]
    training = rows_of(run("benchmarks.training", "--quick"))
    assert [row["PEFT"].endswith("(1.00)") for row in training] == [True]


def test_language_beside_its_peers():
    done = run("benchmarks.language", "--quick")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert {"PEFT", "ours", "ours, four at once", "ours, gate per prompt", "PEFT X-LoRA", "ours, batched"} <= set(rows)


def test_functions_of_strings_are_composed():
    done = run("benchmarks.strings", "--quick")
    assert done.returncode == 0, done.stderr[-2000:]
    for way in ("base alone", "given the names: sum", "all: merge, sum", "all: logits", "all: Arrow", "search of the bank", "told which"):
        assert f"| {way}" in done.stdout


def test_merges_are_what_they_promise_or_refused(tmp_path):
    done = run("benchmarks.merge_correctness", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    for row in json.loads((tmp_path / "rows.json").read_text()):
        refused = row[""] in ("DoRA", "a bias in LoRA", "biases of the base")
        assert [row[name] == "refused" for name in ("stack", "svd")] == [refused] * 2, row
        assert refused or max(float(row["stack"]), float(row["svd"])) < 1e-6, row


def test_a_quick_cell_of_the_experiment():
    done = run("benchmarks.psec_continual", "--quick", "--rows", "ours", "nsec")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "S+W->R/sto3/ours" in done.stdout
    assert "S+W->R/sto3/nsec" in done.stdout


def test_quick_cells_of_the_ablations():
    rows = rows_of(run("benchmarks.psec_ablations", "--quick", "--rows", "nsec-search", "asec-each", "psec-of-30"))
    assert [row["row"] for row in rows] == ["asec-each", "nsec-search", "psec-of-30"]
    assert all(0 < float(row["mean"]) < 20 for row in rows)  # of twenty steps


def test_what_a_gate_says_in_test_episodes():
    (row,) = rows_of(run("benchmarks.psec_ablations", "--quick", "--weights", "psec-newest", "--seeds", "3"))
    assert (row["row"], row["seed"]) == ("psec-newest", "3")
    assert 0.5 < float(row["5 %"]) <= float(row["median"]) <= float(row["95 %"]) < 1.5


def test_a_bank_survives_faults():
    done = run("benchmarks.bank_faults", "--quick")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "killed at" in line]
    assert len(rows) == 18
    assert all(int(row[2]) > 0 and row[3:] == ["0"] * 4 for row in rows)
    assert "a rename works and reports a failure" in done.stdout
    stored = run("benchmarks.bank_faults", "--from-results").stdout
    for table in ("| put again ", "| the clock jumps back and forth ", "| tombstone.json ", "| writers | readers |", "| p50, ms |"):
        assert table in stored


def test_fuzzing_says_what_it_needs():
    assert "| adapter " in run("benchmarks.bank_fuzz", "--from-results").stdout
    assert "no parser nothing: there is ref, where, card" in run("benchmarks.bank_fuzz", "nothing").stderr


def test_rollout_times_and_errors():
    done = run("benchmarks.rollouts", "--quick")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("| K=")]
    assert len(rows) == 5
    assert all(float(row[-1]) < 1e-4 for row in rows)


@pytest.mark.parametrize("kind", [NoiseLevel, ActionLevel])
@pytest.mark.parametrize(
    ("member", "options"),
    [*product([0, 1, 2], [{}, {"per_dimension": True}, {"init": "official"}]), (1, {"base": False}), (2, {"base": False})],
)
def test_a_one_hot_level_is_that_policy(kind, member, options):
    skills = [random_skill(tiny_policy().net, seed=seed) for seed in range(2)]
    level = kind(tiny_policy(temperature=0.0), skills, **options)
    check_model(level, tiny_batch())
    members = torch.eye(3) if options.get("base", True) else torch.eye(3)[:, 1:]
    if member == 2 and "init" not in options:
        assert torch.equal(level.weights(tiny_batch()["observation"]).mean(-1)[0], members[2])  # as it starts
    with torch.no_grad():
        level.gate.head.weight.zero_()
        level.gate.head.bias.view(len(members[member]), -1).copy_(members[member][:, None])
    alone = tiny_policy(temperature=0.0)
    if member:
        attach(alone.net, merge([skills[member - 1]], [1.0]))
    close(level.predict(tiny_batch()), alone.predict(tiny_batch()), 1e-4)


def test_the_officials_start_is_nobody_and_not_slowed_down():
    skills = [random_skill(tiny_policy().net)]
    level = ActionLevel(tiny_policy(), skills, init="official")
    assert level.gate.divisor == 1
    assert level.gate.head.weight.any()
    assert not level.gate.head.bias.any()


def test_dimensions_of_an_action_are_weighted_one_by_one():
    skills = [random_skill(tiny_policy().net)]
    level = ActionLevel(tiny_policy(temperature=0.0), skills, per_dimension=True)
    each = [torch.randn(level.dimensions) for _ in range(2)]
    with torch.no_grad():
        level.gate.head.bias.copy_(torch.cat(each))
    alone = tiny_policy(temperature=0.0)
    base = alone.predict(tiny_batch())
    attach(alone.net, skills[0])
    close(level.predict(tiny_batch()), each[0] * base + each[1] * alone.predict(tiny_batch()), 1e-4)


def test_the_level_of_parameters_is_a_composition():
    skills = [random_skill(tiny_policy().net, seed=seed) for seed in range(2)]
    level, composed = ParameterLevel(tiny_policy(temperature=0.0), skills), Composed(tiny_policy(temperature=0.0), ConstantGate(0, 2), skills)
    with torch.no_grad():
        level.gate.head.bias.copy_(composed.gate.weights)
    close(level.predict(tiny_batch()), composed.predict(tiny_batch()), 1e-4)


def test_one_member_of_mixed_noise_has_the_loss_of_its_policy():
    skills = [random_skill(tiny_policy().net)]
    level, alone = NoiseLevel(tiny_policy(), skills, on_noise=True), tiny_policy()
    attach(alone.net, skills[0])
    losses = []
    for model in (level, alone):
        torch.manual_seed(0)
        losses.append(model(tiny_batch()).detach())
    close(*losses, 1e-4)


@pytest.mark.parametrize("kind", [NoiseLevel, ActionLevel, ParameterLevel])
def test_a_level_is_trained_without_the_dropout_of_its_base(kind):
    level = kind(tiny_policy(dropout=0.5, temperature=0.0), [random_skill(tiny_policy().net)])
    expected = level(tiny_batch())
    assert level.train().training
    assert level.gate.training
    assert torch.equal(level(tiny_batch()), expected)


def test_a_cell_is_stored_once_whoever_computes_it(tmp_path):
    path = tmp_path / "results" / "rows.jsonl"

    def compute(value, *, meanwhile=()):
        stored.complete(path, meanwhile, str)
        return {"name": "x", "seed": 0, "value": value}

    other = [("x", 0, partial(compute, 1))]
    stored.complete(path, [("x", 0, partial(compute, 2, meanwhile=other)), ("x", 0, partial(compute, 3))], str)
    assert stored.load(path) == [{"name": "x", "seed": 0, "value": 1}]


@pytest.mark.parametrize("kind", [NoiseLevel, partial(NoiseLevel, on_noise=True), ActionLevel, ParameterLevel])
def test_only_the_gate_of_a_level_gets_a_gradient(kind):
    level = kind(tiny_policy(), [random_skill(tiny_policy().net)])
    level(tiny_batch()).backward()
    assert {name.split(".")[0] for name, p in level.named_parameters() if p.grad is not None} == {"gate"}
    assert level.gate.head.bias.grad.abs().sum() > 0


def test_the_interval_covers_the_mean_and_grows_with_the_spread_of_seeds():
    narrow, wide = interval([[10.0, 11.0], [10.0, 11.0]]), interval([[0.0, 1.0], [20.0, 21.0]])
    assert narrow[0] <= 10.5 <= narrow[1]
    assert wide[1] - wide[0] > narrow[1] - narrow[0]
