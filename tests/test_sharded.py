"""A base that is spread over processes trains what a whole one does, to the last bit, and every process holds its part only."""

import json

import pytest
import torch

from skillbank import fit, fresh
from skillbank.skill import digest
from tests.test_fit import launched
from tests.test_generate import LENGTH, VOCABULARY, composed, net_of, text
from tests.tiny import tiny_batch, tiny_policy

PROCESSES = """
import json, os, pathlib, sys, torch
torch.set_num_threads(1)
from tests.test_sharded import CASES, trained
results = [trained(*case, shard=True) for case in CASES]
pathlib.Path(sys.argv[1], os.environ["RANK"] + ".json").write_text(json.dumps(results))
torch.distributed.destroy_process_group()
"""

CASES = [("gpt2", "skill"), ("llama", "skill"), ("llama", "gate"), ("llama", "gate per token")]


def trained(kind, what, **options):
    """Losses, hash of what was trained, and how many numbers of the frozen weights this process holds."""
    if what == "skill":
        model = text(net_of(kind))
        torch.manual_seed(0)
        params = fresh(model.net, rank=2)
    else:
        model = composed(kind, "fused", tokens=what == "gate per token")
        params = list(model.gate.parameters())
    rows = torch.randint(VOCABULARY, (8, 4, LENGTH), generator=torch.Generator().manual_seed(3))
    batches = lambda start: iter([{"input_ids": row} for row in rows[start:]])  # noqa: E731
    settings = {"steps": 4, "log_every": 1, "lr": 1e-2, "clip": 0.5, "device": "cpu", "progress": False}
    result = fit(model, batches, params, **settings, **options)
    mine = {id(p) for p in params}
    held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters() if id(p) not in mine)
    return [row["loss"] for row in result.rows], digest({str(i): p for i, p in enumerate(params)}), held


def test_a_spread_base_trains_what_a_whole_one_does(tmp_path):
    launched(2, PROCESSES, tmp_path, tmp_path)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for i, case in enumerate(CASES):
        losses, made, held = trained(*case, accumulate=2)
        for result in results:
            assert result[i][:2] == [losses, made]
            assert result[i][2] < 0.75 * held  # embeddings, head and last norm are whole


def test_what_cannot_be_spread_is_refused():
    with pytest.raises(ValueError, match="there is one process, so there is nothing to spread a base over: start several with `accelerate launch`"):
        trained("llama", "skill", shard=True)
    policy = tiny_policy()
    with pytest.raises(ValueError, match=r"DiffusionPolicy has no nn.ModuleList, so no blocks to spread: train with shard=False"):
        fit(policy, lambda start: iter([tiny_batch()]), fresh(policy.net, rank=2), steps=1, shard=True, device="cpu", progress=False)
