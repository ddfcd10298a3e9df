"""Changed dynamics against edited text that MuJoCo compiles; sets of demonstrations as they are written and read."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest

from benchmarks.dynamics_data import SHOWN, write
from skillbank.tasks.demonstrations import load_demonstrations
from skillbank.tasks.dynamics import parse_changes
from skillbank.tasks.environments import environment_sizes, make_environment

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "demos/dynamics/halfcheetah"
MANIFEST = json.loads((SHIPPED / "manifest.json").read_text())
ASSETS = Path(gymnasium.__file__).parent / "envs/mujoco/assets"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*settotalmass"),
    pytest.mark.filterwarnings("ignore:.*Walker2d-v4 is out of date:DeprecationWarning"),
]


def times(factor, numbers):
    return " ".join(repr(float(each) * factor) for each in numbers.split())


def edited(text, attribute, factor, *, only=""):
    """Multiply all numbers of an attribute, in lines that hold a word."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if only in line:
            lines[i] = re.sub(rf'\b{attribute}="([^"]*)"', lambda found: f'{attribute}="{times(factor, found[1])}"', line)
    return "\n".join(lines)


def arrays(model):
    """Every array of a model, its options among them."""
    found = {}
    for prefix, holder in {"": model, "opt.": model.opt}.items():
        for name in dir(holder):
            value = None if name.startswith("_") else getattr(holder, name)
            if isinstance(value, np.ndarray | float | int):
                found[prefix + name] = np.array(value)
    return found


def assert_same(model, other):
    ours, theirs = arrays(model), arrays(other)
    assert len(ours) > 200
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize(
    ("environment", "file", "edits"),
    [
        ("HalfCheetah-v5?friction=0.25", "half_cheetah.xml", [("friction", 0.25, "")]),
        ("HalfCheetah-v5?gravity=2", "half_cheetah.xml", [("gravity", 2, "")]),
        ("HalfCheetah-v5?thigh=2", "half_cheetah.xml", [("size", 2, "thigh")]),
        ("HalfCheetah-v5?thigh=0.7&gravity=1.3&friction=3", "half_cheetah.xml", [("friction", 3, ""), ("gravity", 1.3, ""), ("size", 0.7, "thigh")]),
        ("Walker2d-v4?friction=0.5", "walker2d.xml", [("friction", 0.5, "")]),
        ("Walker2d-v4?thigh=2", "walker2d.xml", [("size", 2, "thigh")]),
    ],
)
def test_edited_text_compiles_to_the_same_model(environment, file, edits):
    text = (ASSETS / file).read_text()
    for attribute, factor, word in edits:
        text, before = edited(text, attribute, factor, only=word), text
        assert text != before
    env = make_environment(environment)
    assert_same(env.unwrapped.model, mujoco.MjModel.from_xml_string(text))
    env.close()


def test_a_file_that_leaves_gravity_to_mujoco():
    assert "gravity" not in (ASSETS / "walker2d.xml").read_text()
    env = make_environment("Walker2d-v4?gravity=2")
    assert env.unwrapped.model.opt.gravity.tolist() == [0, 0, -2 * 9.81]


def test_masses_follow_from_the_size():
    plain, thick = (make_environment(name).unwrapped.model for name in ("Walker2d-v4", "Walker2d-v4?thigh=2"))
    radius, half = 0.05, 0.225
    grown = (np.pi * 0.1**2 * 0.9 + 4 / 3 * np.pi * 0.1**3) / (np.pi * radius**2 * 2 * half + 4 / 3 * np.pi * radius**3)
    factors = {plain.body(i).name: thick.body_mass[i] / plain.body_mass[i] for i in range(1, plain.nbody)}
    assert factors == pytest.approx({name: grown if name.startswith("thigh") else 1 for name in factors})
    cheetah = make_environment("HalfCheetah-v5?thigh=2").unwrapped.model
    assert cheetah.body_mass.sum() == pytest.approx(14)
    assert cheetah.body("fthigh").mass[0] > 3 * make_environment("HalfCheetah-v5").unwrapped.model.body("fthigh").mass[0]


def follow(env, actions, seed=3):
    observation, _ = env.reset(seed=seed)
    steps = [env.step(action)[:3] for action in actions]
    return np.stack([observation, *(step[0] for step in steps)]), np.array([step[1] for step in steps]), [step[2] for step in steps]


ACTIONS = np.random.default_rng(0).uniform(-1, 1, (60, 6)).astype(np.float32)


@pytest.mark.parametrize("environment", ["HalfCheetah-v5", "Walker2d-v4"])
def test_unchanged_is_what_gymnasium_makes(environment):
    for name in (environment, f"{environment}?friction=1&gravity=1&thigh=1"):
        ours, theirs = make_environment(name), gymnasium.make(environment)
        assert_same(ours.unwrapped.model, theirs.unwrapped.model)
        for mine, wanted in zip(follow(ours, ACTIONS), follow(theirs, ACTIONS), strict=True):
            np.testing.assert_array_equal(mine, wanted)
        assert ours.spec.max_episode_steps == 1000


@pytest.mark.parametrize("change", ["friction=0.25", "gravity=2", "thigh=2"])
def test_every_change_is_felt_and_repeats(change):
    plain, changed, again = (follow(make_environment(name), ACTIONS)[0] for name in ("HalfCheetah-v5", *[f"HalfCheetah-v5?{change}"] * 2))
    np.testing.assert_array_equal(changed, again)
    np.testing.assert_array_equal(changed[0], plain[0])
    assert np.abs(changed[-1] - plain[-1]).max() > 0.1
    assert environment_sizes(f"HalfCheetah-v5?{change}") == (17, 6)


@pytest.mark.filterwarnings("ignore:.*HalfCheetah-v4 is out of date:DeprecationWarning")
def test_the_cheetah_of_version_5_is_that_of_version_4():
    for new, old in zip(follow(make_environment("HalfCheetah-v5"), ACTIONS), follow(gymnasium.make("HalfCheetah-v4"), ACTIONS), strict=True):
        np.testing.assert_array_equal(new, old)


def test_the_walker_of_version_5_is_another():
    frictions = [make_environment(name).unwrapped.model.geom("foot_geom").friction[0] for name in ("Walker2d-v4", "Walker2d-v5")]
    assert frictions == [0.9, 1.9]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("HalfCheetah-v5?mass=2", "environment 'HalfCheetah-v5?mass=2': the change 'mass' is none of friction, gravity, thigh"),
        ("HalfCheetah-v5?gravity=2&gravity=3", "the change 'gravity' is given twice"),
        ("HalfCheetah-v5?gravity=-1", "gravity must be a positive factor such as 0.25, got '-1'"),
        ("HalfCheetah-v5?gravity=0", "gravity must be a positive factor such as 0.25, got '0'"),
        ("HalfCheetah-v5?gravity=inf", "gravity must be a positive factor such as 0.25, got 'inf'"),
        ("HalfCheetah-v5?gravity=nan", "gravity must be a positive factor such as 0.25, got 'nan'"),
        ("HalfCheetah-v5?gravity=big", "gravity must be a positive factor such as 0.25, got 'big'"),
        ("HalfCheetah-v5?gravity", "gravity must be a positive factor such as 0.25, got ''"),
        ("HalfCheetah-v5?", "after '?' comes <change>=<factor> (joined by '&'), a change being friction, gravity, thigh"),
        ("Ant-v5?thigh=2", "environment 'Ant-v5': the thighs cannot be resized: geoms with 'thigh' in their names are not there"),
        ("Humanoid-v5?thigh=2", "geoms with 'thigh' in their names are given by their end points"),
        ("Pendulum-v1?gravity=2", "environment 'Pendulum-v1' has no MJCF file: gravity can be changed in gymnasium's MuJoCo environments alone"),
        ("dm_control/walker-walk?friction=0.5", "environment 'dm_control/walker-walk' has no MJCF file: friction can be changed"),
        ("HalfCheeta-v5?gravity=2", "no environment 'HalfCheeta-v5': did you mean 'HalfCheetah-v5'?"),
    ],
)
def test_changes_that_cannot_be_made(environment, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_environment(environment)


def test_ids_are_taken_apart():
    assert parse_changes("HalfCheetah-v5") == ("HalfCheetah-v5", {})
    assert parse_changes("HalfCheetah-v5?thigh=2&friction=.25") == ("HalfCheetah-v5", {"thigh": 2, "friction": 0.25})


def some_episode(steps, *, terminated, seed=0):
    generator = np.random.default_rng(seed)
    sizes = {"observations": (steps, 3), "actions": (steps, 2), "rewards": (steps,), "finals": (3,)}
    return {name: generator.uniform(-1, 1, size).astype(np.float32) for name, size in sizes.items()} | {"terminated": np.array(terminated)}


@pytest.mark.parametrize("lengths", [(4, 4), (3, 5)])
def test_sets_are_read_as_they_were_written(tmp_path, lengths):
    episodes = [some_episode(steps, terminated=i == 0, seed=i) for i, steps in enumerate(lengths)]
    about = write(tmp_path / "set.npz", episodes)
    read = load_demonstrations(str(tmp_path / "set.npz"))
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(read, name), np.concatenate([each[name] for each in episodes]))
    assert read.lengths.tolist() == list(lengths)
    assert read.terminated.tolist() == [True, False]
    np.testing.assert_array_equal(read.finals, np.stack([each["finals"] for each in episodes]))
    assert about["returns"] == pytest.approx(read.returns.tolist(), abs=0.06)
    assert about["steps"] == sum(lengths)


@pytest.mark.parametrize("name", MANIFEST["sets"])
def test_shipped_sets_are_what_the_manifest_says(name):
    about, file = MANIFEST["sets"][name], SHIPPED / f"{name}.npz"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == about["sha256"]
    assert file.stat().st_size < 2_000_000
    read = load_demonstrations(str(file))
    assert read.returns.tolist() == pytest.approx(about["returns"], abs=0.06)
    assert (len(read), len(read.rewards)) == (about["episodes"], about["steps"])
    assert not read.terminated.any()
    assert read.finals.shape == (len(read), 17)


def test_every_file_is_in_the_manifest():
    assert {path.stem for path in SHIPPED.glob("*.npz")} == set(MANIFEST["sets"])
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 10_000_000


@pytest.mark.parametrize("name", [name for name in MANIFEST["sets"] if name != "medium-replay"])
def test_shipped_sets_replay_in_their_environments(name):
    env = make_environment(MANIFEST["sets"][name]["environment"])
    exact = mujoco.__version__ == MANIFEST["versions"]["mujoco"]
    with np.load(SHIPPED / f"{name}.npz") as arrays:
        observations, actions, rewards = (arrays[key][0, :80] for key in ("observations", "actions", "rewards"))
    seen, earned, _ = follow(env, actions, seed=SHOWN)
    np.testing.assert_allclose(seen[:-1].astype(np.float32), observations, atol=0 if exact else 1e-3)
    np.testing.assert_allclose(earned.astype(np.float32), rewards, atol=0 if exact else 1e-3)


@pytest.mark.parametrize("name", MANIFEST["sets"])
def test_final_observations_are_what_the_last_action_leads_to(name):
    env = make_environment(MANIFEST["sets"][name]["environment"])
    with np.load(SHIPPED / f"{name}.npz") as arrays:
        last, actions, rewards, finals = (arrays["observations"][:, -1], arrays["actions"][:, -1], arrays["rewards"][:, -1], arrays["finals"])
    for observation, action, reward, final in zip(last, actions, rewards, finals, strict=True):
        env.reset(seed=0)
        env.unwrapped.set_state(np.array([0, *observation[:8]], float), observation[8:].astype(float))
        reached, earned, *_ = env.step(action)
        np.testing.assert_allclose(reached, final, atol=0.02)
        np.testing.assert_allclose(earned, reward, atol=0.02)


def printed_by(*options):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.psec_dynamics", "--quick", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("| ")]


def test_the_benchmark_runs():
    rows = ["awr", "joint"]
    printed = printed_by("--rows", *rows)
    column = printed[0].index("friction, medium")
    assert sum(line[column].endswith("(1)") for line in printed[2:]) == len(rows)
    data, paper = printed[-2:]
    assert data[0] == "the target data themselves"
    assert float(data[column]) > 20
    assert paper[0].startswith("the paper's PSEC")
    assert float(paper[column]) == 40


def test_what_gates_say_in_test_episodes():
    printed = printed_by("--weights", "--shifts", "gravity", "--targets", "medium", "--seeds", "3")
    (row,) = (dict(zip(printed[0], line, strict=True)) for line in printed[2:])
    assert (row["shift"], row["data"], row["seed"]) == ("gravity", "medium", "3")
    assert -0.5 < float(row["5 %"]) <= float(row["median"]) <= float(row["95 %"]) < 0.5  # three steps from the official start
