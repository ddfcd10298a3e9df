import json
import math
import os
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from skillbank import Composed, MLPGate, fit, fresh, read, validation_loss
from skillbank.skill import digest
from skillbank.tensors import load_tensors, save_tensors
from tests.tiny import close, random_skill, tiny_batch, tiny_policy

ROOT = Path(__file__).parents[1]


def batches(start):
    while True:
        generator = torch.Generator().manual_seed(start)
        yield {"observation": torch.randn(16, 5, generator=generator), "action": torch.rand(16, 1, 3, generator=generator) * 2 - 1}
        start += 1


class KilledError(Exception):
    pass


def killed_at(step):
    def stream(start):
        for i, batch in enumerate(batches(start), start):
            if i == step:
                raise KilledError
            yield batch

    return stream


def run(stage="skill", data=batches, **options):
    policy = tiny_policy(dropout=0.1)
    params = list(policy.parameters()) if stage == "base" else fresh(policy.net, rank=2)
    options = {"steps": 20, "log_every": 2, "checkpoint_every": 4, "progress": False, **options}
    return policy, fit(policy, data, params, **options)


@pytest.mark.parametrize("stage", ["base", "skill"])
def test_the_loss_falls(stage):
    _, result = run(stage, steps=150, lr=3e-3, log_every=10)
    assert result.loss < 0.8 * result.rows[0]["loss"]
    assert [row["step"] for row in result.rows] == list(range(10, 151, 10))


def test_the_same_seed_gives_the_same_losses_and_another_does_not():
    first, again, other = (run(seed=seed)[1].rows for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("step", [3, 4, 11, 19])
def test_a_killed_run_resumes_to_the_last_bit(tmp_path, step):
    policy, whole = run()
    with pytest.raises(KilledError):
        run(data=killed_at(step), folder=tmp_path)
    resumed, result = run(folder=tmp_path)
    assert result.rows == whole.rows
    assert read(resumed.net).fingerprint == read(policy.net).fingerprint
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == whole.rows


class Normed(torch.nn.Module):
    """Batch normalisation with parameters and without, and dropout; `extra` is none of its own."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        norm, plain = torch.nn.BatchNorm1d(width), torch.nn.BatchNorm1d(width, affine=False)
        self.net = torch.nn.Sequential(torch.nn.Linear(5, width), norm, torch.nn.Linear(width, width), plain, torch.nn.Dropout(0.5))
        self.out = torch.nn.Linear(width, 3)
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, batch):
        return (self.out(self.net(batch["observation"])) - batch["action"][:, 0]).square().mean()

    def statistics(self):
        return {name: value.clone() for name, value in self.named_buffers()}


NORMED = {"steps": 12, "log_every": 1, "checkpoint_every": 4, "lr": 1e-2, "device": "cpu", "progress": False}


def test_a_killed_run_resumes_with_its_running_statistics(tmp_path):
    whole, killed, resumed, again = (Normed() for _ in range(4))
    rows = fit(whole, batches, whole.parameters(), **NORMED).rows
    with pytest.raises(KilledError):
        fit(killed, killed_at(6), killed.parameters(), folder=tmp_path, **NORMED)
    assert fit(resumed, batches, resumed.parameters(), folder=tmp_path, **NORMED).rows == rows
    fit(again, killed_at(0), again.parameters(), folder=tmp_path, **NORMED)
    assert whole.statistics()["net.3.num_batches_tracked"] == 12
    assert "buffer/scratch" not in load_tensors(tmp_path / "checkpoint.safetensors")[0]
    for model in (resumed, again):
        assert digest(model.state_dict()) == digest(whole.state_dict())


def test_a_checkpoint_without_buffers_resumes_still(tmp_path):
    model, path = Normed(), tmp_path / "checkpoint.safetensors"
    rows = fit(model, batches, model.parameters(), folder=tmp_path, **NORMED).rows
    tensors, notes = load_tensors(path)
    save_tensors(path, {key: value for key, value in tensors.items() if not key.startswith("buffer/")}, notes)
    old = Normed()
    assert fit(old, killed_at(0), old.parameters(), folder=tmp_path, **NORMED).rows == rows
    lost, more = ("buffer/net.1.running_mean", "param/out.bias"), "'buffer/more', which this has not"
    for key, other, what in [*((name, None, f"no '{name}'") for name in lost), ("buffer/more", torch.ones(1), more)]:
        changed = {**tensors, key: other}
        save_tensors(path, {name: value for name, value in changed.items() if value is not None}, notes)
        with pytest.raises(ValueError, match=f"its checkpoint has {what}; use another folder"):
            fit(old, batches, old.parameters(), folder=tmp_path, **NORMED)


class Untraceable(Normed):
    """Batch normalisation by torch's function, an average written through `.data`, and features drawn when it is made."""

    def __init__(self, seed):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(5))
        self.register_buffer("running_var", torch.ones(5))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("features", torch.rand(5, generator=torch.Generator().manual_seed(seed)))

    def forward(self, batch):
        seen = batch["observation"] * self.features
        if self.training:
            self.mean.data.mul_(0.9).add_(seen.mean(0), alpha=0.1)
        seen = torch.nn.functional.batch_norm(seen, self.running_mean, self.running_var, training=self.training) - self.mean
        return super().forward({**batch, "observation": seen})


def test_a_killed_run_resumes_with_buffers_that_do_not_tell_when_they_are_written_to(tmp_path):
    whole, killed, resumed = Untraceable(0), Untraceable(0), Untraceable(1)
    rows = fit(whole, batches, whole.parameters(), **NORMED).rows
    with pytest.raises(KilledError):
        fit(killed, killed_at(6), killed.parameters(), folder=tmp_path, **NORMED)
    assert fit(resumed, batches, resumed.parameters(), folder=tmp_path, **NORMED).rows == rows
    assert digest(resumed.state_dict()) == digest(whole.state_dict())


def test_a_checkpoint_holds_no_large_buffer_that_training_left_as_it_was(tmp_path):
    """Frozen weights as quantised layers keep them, one that shares its memory with a parameter, one whose entries are one number."""

    def model():
        made = Normed()
        made.register_buffer("packed", torch.ones(2**18 + 1, dtype=torch.int32))
        made.register_buffer("same", made.out.weight.data)
        made.register_buffer("one", torch.ones(1, 3).expand(4, 3))
        made.register_buffer("few", torch.eye(3).to_sparse())
        return made

    whole, killed, resumed = model(), model(), model()
    rows = fit(whole, batches, whole.parameters(), **NORMED).rows
    with pytest.raises(KilledError):
        fit(killed, killed_at(6), killed.parameters(), folder=tmp_path, **NORMED)
    assert fit(resumed, batches, resumed.parameters(), folder=tmp_path, **NORMED).rows == rows
    kept = {key for key in load_tensors(tmp_path / "checkpoint.safetensors")[0] if key.startswith("buffer/")}
    assert kept == {"buffer/same", *(f"buffer/{name}" for name in dict(whole.net.named_buffers(prefix="net")))}


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path):
    narrow, wide = Normed(1), Normed(8)
    fit(narrow, batches, narrow.parameters(), folder=tmp_path, **NORMED)
    before = digest(wide.state_dict())
    with pytest.raises(ValueError, match=r"holds a run of another model: its checkpoint has 'buffer/net.1.running_mean' of shape \(1,\), not \(8,\)"):
        fit(wide, batches, wide.parameters(), folder=tmp_path, **NORMED)
    assert digest(wide.state_dict()) == before


def test_a_skill_leaves_the_running_statistics_of_its_base_alone():
    model = Normed().eval()
    before = model.statistics()
    params = fresh(model.net, rank=2)
    dropping, modes = model.net[4], []
    dropping.register_forward_hook(lambda module, *_: modes.append(module.training))
    fit(model, batches, params, **NORMED)
    found = model.statistics()
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in before)
    assert modes == [True] * NORMED["steps"]
    fit(model, batches, model.out.parameters(), **NORMED)
    assert all(torch.equal(model.statistics()[name], before[name]) for name in before)


@pytest.mark.filterwarnings("ignore")  # of torch about itself
@pytest.mark.parametrize("kind", ["base", "skill", "gate"])
def test_a_compiled_run_has_the_losses_of_one_that_is_not_and_each_goes_on_for_the_other(kind, tmp_path):
    _, whole = one_of(kind, until=8)
    rows = torch.tensor([row["loss"] for row in whole])
    for first in (True, False):
        counters.clear()
        assert one_of(kind, until=4, folder=tmp_path / str(first), compile=first) is None
        _, resumed = one_of(kind, until=8, folder=tmp_path / str(first), compile=not first)
        torch.testing.assert_close(torch.tensor([row["loss"] for row in resumed]), rows, rtol=1e-5, atol=1e-6)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


def test_a_finished_run_is_not_run_again(tmp_path):
    policy, whole = run(folder=tmp_path)
    again, result = run(data=killed_at(0), folder=tmp_path)
    assert result.rows == whole.rows
    assert result.seconds >= whole.seconds * 0.5
    assert read(again.net).fingerprint == read(policy.net).fingerprint


def test_a_second_run_has_its_own_precision():
    once, twice = tiny_policy(), tiny_policy()
    options = {"steps": 3, "weight_decay": 0.0, "ema": None, "progress": False}
    coarse = fit(twice, batches, twice.parameters(), precision="bf16", lr=0.0, **options)
    second = fit(twice, batches, twice.parameters(), lr=0.0, **options)
    only = fit(once, batches, once.parameters(), lr=0.0, **options)
    assert second.loss == only.loss != coarse.loss


def test_accumulated_batches_are_one_large_batch():
    def forward(model, batch):
        return (model.net(batch["action"][:, 0], batch["observation"], torch.zeros(len(batch["action"])).long()) ** 2).mean()

    class Fixed(torch.nn.Module):
        def __init__(self, policy):
            super().__init__()
            self.policy = policy

        def forward(self, batch):
            return forward(self.policy, batch)

    def joined(start):
        stream = batches(2 * start)
        while True:
            pair = next(stream), next(stream)
            yield {key: torch.cat([part[key] for part in pair]) for key in pair[0]}

    results = []
    for data, accumulate in ((batches, 2), (joined, 1)):
        model = Fixed(tiny_policy(dropout=0.0))
        rows = fit(model, data, model.parameters(), steps=5, log_every=1, accumulate=accumulate, progress=False).rows
        results.append([row["loss"] for row in rows])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_the_ema_is_what_stays(monkeypatch):
    """Oracle: the EMA computed by hand from the parameters after every optimiser step."""
    policy = tiny_policy(dropout=0.0)
    params = fresh(policy.net, rank=2)
    seen = [[p.detach().double() for p in params]]
    step = torch.optim.AdamW.step

    def watched(optimizer, *args, **kwargs):
        step(optimizer, *args, **kwargs)
        seen.append([p.detach().double() for p in params])

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    fit(policy, batches, params, steps=12, lr=1e-2, ema=0.5, progress=False)
    assert len(seen) == 13
    expected = seen[0]
    for n, current in enumerate(seen[1:]):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, current, strict=True)]
    for actual, average, raw in zip(params, expected, seen[-1], strict=True):
        torch.testing.assert_close(actual.detach().double(), average, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(average, raw, rtol=1e-3)


@pytest.mark.parametrize(("schedule", "factor"), [("cosine", 0.5 * (1 + math.cos(math.pi * 9 / 40))), ("constant", 1.0)])
def test_learning_rate(schedule, factor):
    _, result = run(steps=10, log_every=1, schedule=schedule, schedule_steps=40, warmup=4, lr=1e-3)
    rates = [row["lr"] for row in result.rows]
    assert rates[0] == pytest.approx(0.25e-3)
    assert rates[9] == pytest.approx(1e-3 * factor)


def test_mixed_precision_trains():
    _, result = run(precision="bf16", steps=60, lr=3e-3)
    assert result.loss < result.rows[0]["loss"]


def test_clipping_bounds_the_gradient():
    clipped, free = (run(clip=value, steps=3, ema=None, lr=1e-2, weight_decay=0.0)[0] for value in (1e-9, None))
    start = tiny_policy()
    fresh(start.net, rank=2)
    assert read(clipped.net).norm() < read(free.net).norm()


def test_validation_runs_on_the_average_and_is_logged():
    policy = tiny_policy(dropout=0.1)
    params = fresh(policy.net, rank=2)
    held_out = [tiny_batch()]
    result = fit(
        policy, batches, params, steps=20, log_every=5, validate_every=10, validate=lambda: validation_loss(policy, held_out), progress=False
    )
    assert [("validation" in row) for row in result.rows] == [False, True, False, True]
    assert result.rows[-1]["validation"] == validation_loss(policy, held_out)


def test_validation_does_not_change_training():
    _, plain = run()
    policy = tiny_policy(dropout=0.1)
    params = fresh(policy.net, rank=2)
    options = {"steps": 20, "log_every": 2, "validate_every": 2, "progress": False}
    watched = fit(policy, batches, params, validate=lambda: validation_loss(policy, [tiny_batch()]), **options)
    assert [row["loss"] for row in watched.rows] == [row["loss"] for row in plain.rows]


def test_the_callers_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    policy = tiny_policy()
    torch.manual_seed(3)
    params = list(policy.parameters())
    fit(policy, batches, params, steps=2, progress=False)
    assert torch.equal(torch.rand(1), expected)


PROCESSES = """
import json, os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.test_fit import one_of
result, folder, until, *kinds = sys.argv[1:]
found = {kind: one_of(kind, folder=Path(folder) / kind, until=int(until)) for kind in kinds}
Path(result + os.environ["RANK"]).write_text(json.dumps(found))
torch.distributed.destroy_process_group()
"""


def one_of(kind, *, until, **options):
    """A short run that draws noise and has dropout, from data that end after so many batches: what it trained, as a hash, and its rows."""
    policy = tiny_policy(dropout=0.1)
    if kind == "gate":
        model = Composed(policy, MLPGate(5, 2, hidden=(8,)), [random_skill(policy.net, seed=seed) for seed in (1, 2)])
        params = list(model.gate.parameters())
    else:
        model, params = policy, fresh(policy.net, rank=2) if kind == "skill" else list(policy.parameters())
    few = lambda start: islice(batches(start), max(0, until - start))  # noqa: E731
    try:
        result = fit(model, few, params, steps=8, log_every=1, checkpoint_every=2, device="cpu", progress=False, **options)
    except StopIteration:
        return None
    return digest({str(i): p for i, p in enumerate(params)}), result.rows


def launched(processes, code, folder, *arguments):
    """Run this code in processes of `accelerate launch`; what they print mixes, so results go to files."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command += ["--main_process_port", str(free.getsockname()[1]), "--mixed_precision", "no", "--dynamo_backend", "no"]
    script = folder / "processes.py"
    script.write_text(code)
    done = subprocess.run(
        [*command, str(script), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]


KINDS = ("base", "skill", "gate")


def two_of(until, *, folder, tmp_path):
    """What each of two processes has found of every kind, all of them in one launch."""
    launched(2, PROCESSES, tmp_path, tmp_path / "result", folder, until, *KINDS)
    return [json.loads((tmp_path / f"result{rank}").read_text()) for rank in range(2)]


def test_two_processes_train_what_one_does_and_each_goes_on_for_the_other(tmp_path):
    """Two processes that see a batch each per step, and one that sees both; each is cut off after four steps, and the other kind goes on with it."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert two_of(8, folder=two, tmp_path=tmp_path) == [dict.fromkeys(KINDS)] * 2
    for kind in KINDS:
        assert one_of(kind, folder=one / kind, accumulate=2, until=8) is None
        with pytest.raises(ValueError, match=r"holds a run with \{'accumulate': 2\}, this one has \{'accumulate': 1\}"):
            one_of(kind, folder=two / kind, accumulate=1, until=16)
    results = two_of(16, folder=one, tmp_path=tmp_path)
    assert results[0] == results[1]  # the same skills and the same rows on both
    for kind, (_, second) in results[0].items():
        _, first = one_of(kind, folder=two / kind, accumulate=2, until=16)
        _, whole = one_of(kind, accumulate=2, until=16)
        assert [json.loads(line) for line in (one / kind / "metrics.jsonl").read_text().splitlines()] == second
        assert len(first) == len(second) == 8
        losses = [torch.tensor([row["loss"] for row in rows]) for rows in (first, second, whole)]
        for other in losses[1:]:
            torch.testing.assert_close(losses[0], other, rtol=1e-5, atol=1e-6)


def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run(tracker="wandb", run={"name": "a run", "conf": {"rank": 2}})
    assert list(tmp_path.rglob("*.wandb"))


def test_bad_input(tmp_path):
    policy = tiny_policy()
    with pytest.raises(ValueError, match="no parameters to train"):
        fit(policy, batches, [], steps=1)
    with pytest.raises(ValueError, match="1 of 1 parameters to train are not the model's"):
        fit(policy, batches, [torch.nn.Parameter(torch.ones(1))], steps=1)
    with pytest.raises(ValueError, match="steps=0 trains nothing: give at least 1"):
        run(steps=0)
    with pytest.raises(ValueError, match="unknown schedule 'linear'"):
        run(schedule="linear")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device=cuda was asked for, but torch sees no GPU"):
            run(device="cuda")
    run(folder=tmp_path)
    with pytest.raises(ValueError, match=r"holds a run with \{'lr': 0.0003\}, this one has \{'lr': 0.1\}"):
        run(folder=tmp_path, lr=0.1)
    with pytest.raises(ValueError, match="holds a run of another model"):
        run("base", folder=tmp_path)
    with pytest.raises(ValueError, match="there are no held-out batches"):
        validation_loss(policy, [])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def bad(start):
        for i, batch in enumerate(batches(start), start):
            yield {**batch, "observation": batch["observation"] * float("nan")} if i >= 9 else batch

    with pytest.raises(FloatingPointError, match="the loss is nan at step 10: lower the learning rate or clip the gradient; the last checkpoint"):
        run(data=bad, folder=tmp_path)
    with pytest.raises(FloatingPointError, match=r"lower the learning rate or clip the gradient$"):
        run(data=bad, folder=tmp_path / "new", checkpoint_every=20)
    assert load_tensors(tmp_path / "checkpoint.safetensors")[1]["step"] == "8"


def test_tensors_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(2)}, {"k": "v"})
    first = path.read_bytes()
    with pytest.raises(AttributeError, match="detach"):
        save_tensors(path, {"a": "no tensor"})
    assert path.read_bytes() == first
    plain = tmp_path.parent / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    path.write_bytes(first[:-3])
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        load_tensors(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_tensors(tmp_path / "y")
    close(torch.ones(1), torch.ones(1))
