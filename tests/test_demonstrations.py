"""Demonstrations: selection laws, every reader on real files, and every error."""

import hashlib
import re
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skillbank.tasks.demonstrations import Demonstrations, load_demonstrations, read_hdf5, read_npz

SHIPPED = Path(__file__).parents[1] / "demos"


def grid(episodes=4, steps=6, features=3, actions=2, seed=0):
    random = np.random.default_rng(seed)
    return {
        "observations": random.normal(size=(episodes, steps, features)).astype(np.float32),
        "actions": random.uniform(-0.9, 0.9, size=(episodes, steps, actions)).astype(np.float32),
        "rewards": random.uniform(size=(episodes, steps)).astype(np.float32),
    }


def flat(lengths=(3, 1, 4), seed=0):
    steps = sum(lengths)
    arrays = {name: value[0] for name, value in grid(1, steps, seed=seed).items()}
    ends = np.cumsum(lengths) - 1
    marks = {name: np.zeros(steps, bool) for name in ("terminals", "timeouts")}
    marks["terminals"][ends[::2]] = True
    marks["timeouts"][ends[1::2]] = True
    return arrays | marks


def ragged(lengths):
    arrays = flat(lengths)
    return Demonstrations(*(arrays[name] for name in ("observations", "actions", "rewards")), np.cumsum([0, *lengths]), "ragged")


def write_npz(path, arrays):
    np.savez(path, **arrays)
    return str(path)


def write_hdf5(path, arrays):
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file[name] = value
        file["metadata/algorithm"] = "none"
    return str(path)


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("observations", "actions", "rewards", "starts"))


LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=8)


@given(LENGTHS, st.data())
def test_prefixes_are_nested(lengths, data):
    whole = ragged(lengths)
    n = data.draw(st.integers(1, len(lengths)))
    m = data.draw(st.integers(1, n))
    assert same(whole.episodes(n).episodes(m), whole.episodes(m))
    assert np.array_equal(whole.episodes(n).lengths, lengths[:n])
    assert np.array_equal(whole.episodes(n).returns, whole.returns[:n])
    assert (whole.episodes(n).hash == whole.hash) == (n == len(lengths))


@given(LENGTHS, st.data())
def test_slices_partition_the_episodes(lengths, data):
    whole = ragged([*lengths, 2])
    cut = data.draw(st.integers(1, len(lengths)))
    head, tail = whole.episodes(cut), whole.episodes(slice(cut, None))
    assert np.array_equal(np.concatenate([head.actions, tail.actions]), whole.actions)
    assert len(head) + len(tail) == len(whole)
    np.testing.assert_allclose([*head.returns, *tail.returns], whole.returns)


def test_returns_are_sums_of_rewards():
    demonstrations = ragged([3, 1, 4])
    expected = [part.sum(dtype=np.float64) for part in np.split(demonstrations.rewards, [3, 4])]
    np.testing.assert_allclose(demonstrations.returns, expected, rtol=1e-12)


@pytest.mark.parametrize("which", [0, -1, slice(0, 3, 2), slice(2, 2), slice(2, 1)])
def test_senseless_selections_are_refused(which):
    with pytest.raises(ValueError, match=f"ragged: cannot select episodes {re.escape(repr(which))} of 3"):
        ragged([3, 1, 4]).episodes(which)


@pytest.mark.parametrize("which", [4, slice(0, 4)])
def test_more_episodes_than_there_are(which):
    with pytest.raises(ValueError, match="ragged has 3 episodes, asked for 4"):
        ragged([3, 1, 4]).episodes(which)


def test_grid_npz(tmp_path):
    arrays = grid()
    read = load_demonstrations(write_npz(tmp_path / "a.npz", {**arrays, "extra": np.ones(1)}), episodes=2)
    assert np.array_equal(read.observations, arrays["observations"][:2].reshape(-1, 3))
    assert np.array_equal(read.actions, arrays["actions"][:2].reshape(-1, 2))
    assert read.starts.tolist() == [0, 6, 12]
    assert read.actions.dtype == read.observations.dtype == read.rewards.dtype == np.float32
    assert "2 episodes, 12 steps, 3 -> 2" in repr(read)


def test_the_same_arrays_give_the_same_demonstrations_in_every_format(tmp_path):
    arrays = flat((3, 1, 4)) | {"costs": np.ones(8)}
    npz, hdf5 = read_npz(write_npz(tmp_path / "a.npz", arrays)), read_hdf5(write_hdf5(tmp_path / "b.hdf5", arrays | {"infos": np.ones(8)}))
    assert same(npz, hdf5)
    assert npz.hash == hdf5.hash == load_demonstrations(write_hdf5(tmp_path / "c.h5", arrays)).hash
    assert npz.starts.tolist() == [0, 3, 4, 8]


def test_grid_and_flat_layouts_agree(tmp_path):
    arrays = grid(3, 4)
    ends = np.tile([False, False, False, True], 3)
    rows = {name: value.reshape(12, *value.shape[2:]) for name, value in arrays.items()} | {"timeouts": ends}
    assert same(read_npz(write_npz(tmp_path / "a.npz", arrays)), read_npz(write_npz(tmp_path / "b.npz", rows)))


def test_an_unfinished_last_episode_counts(tmp_path):
    arrays = flat((3, 5))
    arrays["timeouts"][-1] = False
    assert read_hdf5(write_hdf5(tmp_path / "a.hdf5", arrays)).lengths.tolist() == [3, 5]


def test_the_hash_is_of_contents_not_of_files(tmp_path):
    arrays = grid()
    one = load_demonstrations(write_npz(tmp_path / "a.npz", arrays))
    np.savez_compressed(tmp_path / "b.npz", **arrays)
    assert load_demonstrations(str(tmp_path / "b.npz")).hash == one.hash
    arrays["actions"][1, 2, 0] += 1e-3
    assert load_demonstrations(write_npz(tmp_path / "c.npz", arrays)).hash != one.hash


def test_actions_are_clipped_off_the_limits(tmp_path):
    arrays = grid()
    arrays["actions"][0, 0] = [1.0005, -1]
    read = load_demonstrations(write_npz(tmp_path / "a.npz", arrays))
    np.testing.assert_array_equal(read.actions[0], np.float32([1 - 1e-5, -1 + 1e-5]))


def test_a_relative_path_is_taken_from_the_current_directory(tmp_path, monkeypatch):
    write_npz(tmp_path / "a.npz", grid())
    monkeypatch.chdir(tmp_path)
    assert len(load_demonstrations("a.npz")) == 4


def test_a_missing_file_names_its_neighbour(tmp_path):
    write_npz(tmp_path / "walk.npz", grid())
    with pytest.raises(FileNotFoundError, match=r"no demonstration file '.*wlak\.npz': did you mean '.*walk\.npz'\?"):
        load_demonstrations(str(tmp_path / "wlak.npz"))
    with pytest.raises(FileNotFoundError, match=r"no demonstration file 'nowhere/a\.hdf5': the current directory is"):
        load_demonstrations("nowhere/a.hdf5")


def test_an_unknown_kind():
    with pytest.raises(ValueError, match=r"'walk\.pkl' are of no known kind: give a \.npz, \.hdf5, \.h5 file or minari:<id>"):
        load_demonstrations("walk.pkl")


@pytest.mark.parametrize(
    ("suffix", "content"),
    [*((suffix, content) for suffix in (".npz", ".hdf5") for content in (b"", b"not an archive", "cut")), (".npz", "flip")],
)
def test_a_damaged_file(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    (write_npz if suffix == ".npz" else write_hdf5)(path, flat((30, 70)))
    whole = bytearray(path.read_bytes())
    half = whole[: len(whole) // 2]
    whole[300] ^= 0xFF
    path.write_bytes({"cut": half, "flip": whole}.get(content, content))
    with pytest.raises(ValueError, match=rf"a\{suffix} is damaged or no \{suffix} archive of plain arrays"):
        load_demonstrations(str(path))


def test_a_single_array_and_pickles_are_refused(tmp_path):
    with open(tmp_path / "a.npz", "wb") as file:
        np.save(file, np.ones(3))
    np.savez(tmp_path / "b.npz", **{**grid(), "actions": np.array([{}, {}], object)})
    for name in ("a.npz", "b.npz"):
        with pytest.raises(ValueError, match=rf"{name} is damaged or no \.npz archive of plain arrays"):
            load_demonstrations(str(tmp_path / name))


def broken(**changes):
    return {name: value for name, value in (grid() | changes).items() if value is not None}


def poisoned(name, value):
    arrays = grid()
    arrays[name][2, 5] = value
    return arrays


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (broken(actions=None), r"a\.npz: missing array 'actions'; it has \['observations', 'rewards'\]"),
        (broken(actions=np.ones((4, 5, 2))), r"a\.npz: observations are 4 episodes of 6 steps, but array 'actions' has shape \(4, 5, 2\)"),
        (broken(rewards=np.ones((4, 6, 1))), r"a\.npz: observations are 4 episodes of 6 steps, but array 'rewards' has shape \(4, 6, 1\)"),
        (broken(observations=np.ones((4, 6, 3, 3))), r"a\.npz: missing array 'terminals' or 'timeouts'"),
        (broken(observations=np.ones((0, 6, 3)), actions=np.ones((0, 6, 2)), rewards=np.ones((0, 6))), r"a\.npz holds no steps"),
        (broken(observations=np.full((4, 6, 3), "x")), r"a\.npz: array 'observations' must hold numbers, got dtype <U1"),
        (flat() | {"terminals": None}, None),
        ({**flat(), "terminals": np.zeros(7)}, r"a\.npz: observations have 8 steps, but the end marks have \{'terminals': 7\}"),
        ({**flat(), "actions": np.ones(8)}, r"a\.npz: array 'actions' must have shape \(steps, features\), got \(8,\)"),
        ({**flat(), "rewards": np.ones((8, 1))}, r"a\.npz: array 'rewards' must have shape \(steps,\), got \(8, 1\)"),
        ({**flat(), "rewards": np.ones(7)}, r"a\.npz: the arrays have different numbers of steps: \{'observations': 8, 'actions': 8, 'rewards': 7\}"),
        (poisoned("observations", np.nan), r"a\.npz: array 'observations' holds nan at episode 2, step 5 \(1 such steps\)"),
        (poisoned("actions", -np.inf), r"a\.npz: array 'actions' holds -inf at episode 2, step 5"),
        (poisoned("rewards", np.nan), r"a\.npz: array 'rewards' holds nan at episode 2, step 5"),
        (poisoned("actions", 1.5), r"a\.npz: array 'actions' reaches 1\.5 at episode 2, step 5, outside \[-1, 1\]"),
    ],
)
def test_wrong_arrays(tmp_path, arrays, message):
    path = write_npz(tmp_path / "a.npz", {name: value for name, value in arrays.items() if value is not None})
    if message is None:
        assert len(load_demonstrations(path)) == 2
        return
    with pytest.raises(ValueError, match=message):
        load_demonstrations(path)


def test_flat_arrays_without_end_marks(tmp_path):
    arrays = {name: value for name, value in flat().items() if name not in ("terminals", "timeouts")}
    with pytest.raises(ValueError, match=r"a\.hdf5: missing array 'terminals' or 'timeouts': flat demonstrations need the end of every"):
        load_demonstrations(write_hdf5(tmp_path / "a.hdf5", arrays))


@pytest.mark.parametrize("starts", [[0], [1, 8], [0, 9], [0, 3, 3, 8], [[0, 8]]])
def test_wrong_starts(starts):
    arrays = flat()
    with pytest.raises(ValueError, match="here: starts must rise from 0 to 8, got "):
        Demonstrations(arrays["observations"], arrays["actions"], arrays["rewards"], np.array(starts), "here")


@pytest.fixture
def minari_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    import minari
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    def make(low=-2.0, high=2.0, observation_space=None, costly=()):
        random = np.random.default_rng(0)
        buffers = []
        for steps in (5, 3, 4):
            observations, actions = random.normal(size=(steps + 1, 3)).astype(np.float32), random.uniform(-1, 1, (steps, 2)).astype(np.float32)
            ends = [False] * (steps - 1) + [True]
            buffers.append(
                EpisodeBuffer(
                    observations=observations if observation_space is None else {"state": observations},
                    actions=actions,
                    rewards=random.uniform(size=steps).tolist(),
                    terminations=ends if steps == 3 else [False] * steps,
                    truncations=[False] * steps if steps == 3 else ends,
                    infos={"cost": [9.0, *np.arange(steps)]} if steps in costly else None,
                )
            )
        space = observation_space or Box(-np.inf, np.inf, (3,), np.float32)
        actions = Box(low, high, (2,), np.float32)
        described = {"author": "a", "author_email": "a@b", "code_permalink": "c", "algorithm_name": "d", "description": "e"}
        with warnings.catch_warnings(action="ignore"):  # Minari asks for an evaluation environment and reference scores
            minari.create_dataset_from_buffers("toy/points-v0", buffers, observation_space=space, action_space=actions, **described)
        return buffers

    return make


def test_minari_by_id_and_by_folder(minari_dataset, tmp_path):
    buffers = minari_dataset()
    read = load_demonstrations("minari:toy/points-v0")
    assert read.lengths.tolist() == [5, 3, 4]
    np.testing.assert_array_equal(read.observations, np.concatenate([each.observations[:-1] for each in buffers]))
    np.testing.assert_allclose(read.actions, np.concatenate([each.actions for each in buffers]) / 2, atol=1e-7)
    np.testing.assert_allclose(read.returns, [sum(each.rewards) for each in buffers], rtol=1e-6)
    for source in (str(tmp_path / "toy/points-v0"), f"minari:{tmp_path / 'toy/points-v0'}", str(tmp_path / "toy/points-v0/data")):
        assert load_demonstrations(source).hash == read.hash
    assert same(load_demonstrations("minari:toy/points-v0", episodes=2), read.episodes(2))


def test_minari_says_how_episodes_ended_and_what_steps_cost(minari_dataset):
    buffers = minari_dataset(costly=(5, 3, 4))
    read = load_demonstrations("minari:toy/points-v0")
    assert read.terminated.tolist() == [False, True, False]
    np.testing.assert_array_equal(read.finals, [each.observations[-1] for each in buffers])
    assert read.costs.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]


def test_minari_with_costs_of_some_episodes_has_none(minari_dataset):
    minari_dataset(costly=(5, 4))
    assert load_demonstrations("minari:toy/points-v0").costs is None


def test_minari_actions_in_the_unit_box_stay_as_they_are(minari_dataset):
    buffers = minari_dataset(-1.0, 1.0)
    np.testing.assert_array_equal(load_demonstrations("minari:toy/points-v0").actions[:5], buffers[0].actions)


def test_minari_errors(minari_dataset, tmp_path):
    from gymnasium.spaces import Box, Dict

    with pytest.raises(FileNotFoundError, match=r"no Minari data set 'toy/none-v0' on this machine: run `minari download toy/none-v0`"):
        load_demonstrations("minari:toy/none-v0")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is damaged or no Minari data set: No data found"):
        load_demonstrations(str(tmp_path / "empty"))
    minari_dataset(observation_space=Dict({"state": Box(-9, 9, (3,), np.float32)}))
    with pytest.raises(ValueError, match=r"minari:toy/points-v0: the observation space must be a Box with one dimension, got Dict"):
        load_demonstrations("minari:toy/points-v0")


def test_minari_has_fewer_episodes(minari_dataset):
    minari_dataset()
    with pytest.raises(ValueError, match="minari:toy/points-v0 has 3 episodes, asked for 4"):
        load_demonstrations("minari:toy/points-v0", episodes=4)


def test_shipped_files_are_as_their_readme_says():
    """Those of changed dynamics have a manifest with hashes, see test_dynamics.py; those of Bullet are made by a command and not shipped."""
    text = (SHIPPED / "README.md").read_text()
    rows = re.findall(r"^\| (\w+/\w+\.npz) \| (\d+) \|(?: [a-z]+ \|)? (\d+) \| (.*) \| (\w{64}) \|$", text, re.MULTILINE)
    shipped = {path.relative_to(SHIPPED).as_posix() for path in SHIPPED.rglob("*.npz")}
    dynamics = {name for name in shipped if name.startswith("dynamics/")}
    rows = [row for row in rows if not row[0].startswith("bullet/")]
    assert {name for name, *_ in rows} == shipped - dynamics
    assert {Path(name).name for name in dynamics} <= set(re.findall(r"[\w-]+\.npz", text.partition("other dynamics")[2]))
    sizes = {"walker": (24, 6), "ball/run": (7, 2), "ball/circle": (8, 2)}
    for name, episodes, mean, more, sha in rows:
        assert hashlib.sha256((SHIPPED / name).read_bytes()).hexdigest() == sha
        read = load_demonstrations(str(SHIPPED / name))
        kind = next(kind for kind in sizes if name.startswith(kind))
        assert (len(read), read.observations.shape[1], read.actions.shape[1]) == (int(episodes), *sizes[kind])
        assert round(read.returns.mean()) == int(mean)
        figures = [read.returns.std(), read.returns.min(), read.returns.max()]
        if read.costs is not None:
            costs = np.add.reduceat(read.costs, read.starts[:-1], dtype=np.float64)
            figures = [*figures[1:], costs.mean(), costs.min(), costs.max()]
        assert [round(float(each)) for each in figures] == [int(each) for each in more.split(" | ")]
