"""Merges from folders of PEFT adapters to a folder, one module at a time, with PEFT as the oracle."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from skillbank import Folding, cli, dense_merge, fold, merge, merge_adapters, read_adapter
from skillbank.adapter import CONFIG_FILE, WEIGHTS_FILE
from skillbank.skill import Lazy
from tests.test_adapter import IDS, SIZES, Tower

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
SCALES = [{"r": 3, "lora_alpha": 6}, {"r": 2, "lora_alpha": 5, "use_rslora": True}]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of PEFT, each with a scale of its own, and what the tower with both of them gives under weights .7 and -.4."""
    root = tmp_path_factory.mktemp("adapters")
    tower, deltas = Tower(), {}
    for number, scale in enumerate(SCALES):
        model = get_peft_model(Tower(), LoraConfig(target_modules=[*SIZES], init_lora_weights=False, **scale))
        model.save_pretrained(root / str(number))
        merged = model.merge_and_unload().state_dict()
        for name, weight in tower.state_dict().items():
            deltas[name] = deltas.get(name, 0) + (0.7, -0.4)[number] * (merged[name] - weight)
    expected = Tower()
    expected.load_state_dict({name: weight + deltas[name] for name, weight in tower.state_dict().items()})
    return [root / "0", root / "1"], expected(IDS)


@pytest.mark.parametrize("options", [{}, {"method": "svd", "rank": 5}, {"method": "svd", "error": 1e-7}])
def test_peft_loads_what_is_merged_from_its_folders(adapters, tmp_path, options):
    sources, expected = adapters
    certificate = merge_adapters(sources, tmp_path / "merged", weights=[0.7, -0.4], **options)
    assert certificate.error < 1e-6
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(Tower(), tmp_path / "merged")(IDS), expected, rtol=1e-4, atol=1e-4)
    assert certificate.ranks == read_adapter(tmp_path / "merged").ranks


def test_it_is_the_merge_of_the_skills(adapters, tmp_path):
    sources, _ = adapters
    certificate = merge_adapters(sources, tmp_path / "merged", method="ties", density=0.5, rank=2)
    merged = merge([read_adapter(source) for source in sources], method="ties", density=0.5, rank=2)
    assert certificate == merged.certificate
    written = read_adapter(tmp_path / "merged")
    assert all(torch.equal(half, other) for name in merged for half, other in zip(merged[name], written[name], strict=True))
    assert load_file(tmp_path / "merged" / WEIGHTS_FILE).keys() == load_file(sources[0] / WEIGHTS_FILE).keys()


def test_a_lazy_skill_is_the_skill(adapters):
    lazy, skill = (read_adapter(adapters[0][1], lazy=each) for each in (True, False))
    assert isinstance(lazy.factors, Lazy)
    assert lazy.fingerprint == skill.fingerprint
    assert list(lazy) == list(skill)
    assert "nowhere" not in lazy
    with pytest.raises(KeyError, match="the skill has no module 'nowhere'"):
        lazy["nowhere"]


def test_a_dense_merge_is_folded_in_and_taken_out(adapters):
    skills = [read_adapter(source) for source in adapters[0]]
    dense = dense_merge(skills, [0.7, -0.4], "magnitude", density=0.3)
    tower, folded = Tower(), Tower()
    with Folding(folded) as folding:
        folding.set(dense)
        with torch.no_grad():
            changed = {name: weight - tower.state_dict()[name] for name, weight in folded.state_dict().items()}
    assert all(torch.equal(weight, tower.state_dict()[name]) for name, weight in folded.state_dict().items())
    for name in dense:
        weighted = torch.stack([weight * skill.delta(name) for weight, skill in zip((0.7, -0.4), skills, strict=True)])
        count = round(0.3 * weighted[0].numel())
        least = weighted.abs().flatten(1).sort(descending=True).values[:, count - 1].reshape(2, *[1] * (weighted.dim() - 1))
        expected = torch.where(weighted.abs() >= least, weighted, 0).sum(0)
        turned = changed[f"{name}.weight"].mT if name in ("table", "turned") else changed[f"{name}.weight"]
        torch.testing.assert_close(turned, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="nothing is cut from a dense merge, got rank=3"):
        dense_merge(skills, rank=3)


def test_nothing_half_written_is_left(adapters, tmp_path):
    sources, _ = adapters
    with pytest.raises(ValueError, match="density is a share of the entries"):
        merge_adapters(sources, tmp_path / "merged", method="ties", density=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something already"):
        merge_adapters(sources, tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_merge_of_nothing_is_refused(tmp_path):
    for name in ("table", "image"):
        get_peft_model(Tower(), LoraConfig(r=2, target_modules=[name])).save_pretrained(tmp_path / name, save_embedding_layers=False)
    weights = [{"table": 0.0, "*": 1.0}, {"image": 0.0, "*": 1.0}]
    with pytest.raises(ValueError, match="all weights are 0 where the skills have modules"):
        merge_adapters([tmp_path / "table", tmp_path / "image"], tmp_path / "merged", weights=weights)
    assert not (tmp_path / "merged").exists()


def test_adapters_of_different_bases_are_refused(adapters, tmp_path):
    sources, _ = adapters
    other = tmp_path / "other"
    other.mkdir()
    for path in sources[1].iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    for source, base in ((other, "b"), (tmp_path / "named", "a")):
        source.mkdir(exist_ok=True)
        (source / WEIGHTS_FILE).write_bytes((sources[0] / WEIGHTS_FILE).read_bytes())
        config = json.loads((sources[0] / CONFIG_FILE).read_text()) | {"base_model_name_or_path": base}
        (source / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="adapters of different bases do not go together, their base_model_name_or_path differ"):
        merge_adapters([other, tmp_path / "named"], tmp_path / "merged")
    merge_adapters([tmp_path / "named", sources[1]], tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / CONFIG_FILE).read_text())["base_model_name_or_path"] == "a"


def test_on_the_command_line(adapters, tmp_path, monkeypatch, capsys):
    names = [str(source) for source in adapters[0]]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["skillbank", "merge", *names, *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    code, out, _ = run("--weights", ".7,-.4", "--to", str(tmp_path / "merged"))
    assert (code, out.splitlines()[-1]) == (0, str(tmp_path / "merged"))
    expected = merge([read_adapter(each) for each in names], [0.7, -0.4])
    torch.testing.assert_close(read_adapter(tmp_path / "merged").delta("net.0"), expected.delta("net.0"))
    code, out, err = run("--to", str(tmp_path / "again"), "-o", "mine")
    assert (code, out) == (1, "")
    assert "give one of them" in err


CASES = {  # what PEFT's own tests of merging ask of it
    "ranks by pattern": ([{"r": 3, "rank_pattern": {"net.0": 5}}, {"r": 3, "rank_pattern": {"turned": 1}}], [1.0, 1.0]),
    "minus one negates": ([{"r": 3}], [-1.0]),
    "one less another": ([{"r": 3}, {"r": 3}], [1.0, -1.0]),  # PEFT's test subtracts an adapter from itself, where cross terms cancel
    "scales differ": ([{"r": 3, "lora_alpha": 12}, {"r": 3, "lora_alpha": 1}], [0.5, 2.0]),
    "alphas by pattern": ([{"r": 3, "alpha_pattern": {"line": 9}}, {"r": 3, "lora_alpha": 4}], [1.0, 0.3]),
    "ranks differ": ([{"r": 1}, {"r": 7}], [0.7, 0.6]),
    "modules differ": ([{"r": 2, "target_modules": ["table", "image"]}, {"r": 2, "target_modules": ["image", "line"]}], [0.7, -0.6]),
}


@pytest.mark.parametrize("method", ["stack", "svd"])
@pytest.mark.parametrize("case", CASES)
def test_what_peft_asks_of_a_merge(case, method, tmp_path):
    configs, weights = CASES[case]
    expected = Tower().state_dict()
    for number, (config, weight) in enumerate(zip(configs, weights, strict=True)):
        torch.manual_seed(number)
        model = get_peft_model(Tower(), LoraConfig(**{"target_modules": [*SIZES], "init_lora_weights": False, **config}))
        model.save_pretrained(tmp_path / str(number), save_embedding_layers=False)
        merged = model.merge_and_unload().state_dict()
        expected = {name: value + weight * (merged[name] - Tower().state_dict()[name]) for name, value in expected.items()}
    options = {"rank": 20} if method == "svd" else {}
    merge_adapters([tmp_path / str(number) for number in range(len(configs))], tmp_path / "merged", weights=weights, method=method, **options)
    tower = Tower()
    fold(tower, read_adapter(tmp_path / "merged"))
    for name, value in tower.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
