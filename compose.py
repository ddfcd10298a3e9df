"""Skills of the bank -> merge or gate -> composition. `python compose.py task=walker/run skills=[walker/walk,walker/run] gate=mlp`."""

import sys
from itertools import islice
from pathlib import Path
from typing import cast

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import skillbank as sb
from skillbank.cli import check_choices, user_errors
from skillbank.fit import run_folder
from skillbank.load import build, skills_on_base
from skillbank.model import ModelModule
from skillbank.report import markdown, write_report


def composition_name(task: str, base: str, skills: list[str]) -> str:
    """`walker/run`, base `walker/stand@1`, skills walk and run -> `walker/run-from-stand-walk`."""
    own = [ref.split("@")[0] for ref in (base, *skills)]
    return "-".join([f"{task}-from", *(name.rpartition("/")[2] for name in own if name != task)])


@hydra.main(version_base=None, config_path="conf", config_name="compose")
@user_errors
def main(cfg: DictConfig) -> None:
    """Compose what the configuration says, evaluate it, put it in the bank and write a report."""
    compose(cfg)


def compose(cfg: DictConfig) -> str:
    """Do it; returns the new version's reference."""
    conf = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(conf, dict)
    merge, gate = conf.get("merge"), conf.get("gate")
    if (merge is None) == (gate is None):
        raise ValueError("give either a merge (merge=stack, merge=svd) or a gate (gate=mlp, gate=constant)")
    task, bank = instantiate(cfg.task, _convert_="all"), sb.Bank(cfg.bank)
    base, model, skills, refs = skills_on_base(bank, cfg.skills)
    name = cfg.name or composition_name(cfg.task.name, base, refs)
    recipe = {key: conf.get(key) for key in ("task", "gate", "merge", "weights", "regulariser", "standardise", "fit", "seed", "batch_size")}
    folder = run_folder("compose", name, [recipe, [bank.card(ref).hash for ref in (base, *refs)], task.data])
    torch.manual_seed(cfg.seed)
    if merge is not None:
        merge = {key: value for key, value in {**merge, "weights": conf["weights"]}.items() if value is not None}
        merged = sb.merge(skills, **merge)
        assert merged.certificate is not None
        sb.attach(model.net, merged)
        composition = sb.Composition(base, refs, merge=merge)
        metrics = {"merge_error": merged.certificate.error, "merge_energy": merged.certificate.energy}
    else:
        assert gate is not None
        gate = {**gate, "context_dim": model.context(next(task.batches(batch_size=1, seed=0)(0))).shape[-1], "skills": len(skills)}
        network, batches = build(gate), task.batches(batch_size=cfg.batch_size, seed=cfg.seed)
        if cfg.standardise and isinstance(network, sb.MLPGate):
            network.standardise(torch.cat([model.context(batch) for batch in islice(batches(0), 40)]))
        model = cast("ModelModule", sb.Composed(model, network, skills, regulariser=cfg.regulariser))
        result = sb.fit(
            model,
            batches,
            network.parameters(),
            seed=cfg.seed,
            folder=folder,
            validate=lambda: sb.validation_loss(model, task.validation(batch_size=1024)),
            **conf["fit"],
            **conf["logger"],
            run={"name": name, "conf": conf},
        )
        composition = sb.Composition(base, refs, gate=gate, tensors=network.state_dict())
        metrics = {key: value for key, value in result.rows[-1].items() if key != "lr"} | {"seconds": result.seconds}
    rivals = {"base, untouched": base} | {f"{ref}, untouched": ref for ref in refs} | {ref: ref for ref in cfg.compare}
    rows = [{"row": row} | task.evaluate(sb.load(ref, bank), episodes=cfg.episodes) for row, ref in rivals.items()] if cfg.episodes else []
    metrics |= task.evaluate(model, episodes=cfg.episodes) if cfg.episodes else {}
    card = {"conf": conf, "data": {} if gate is None else task.data, "metrics": metrics}
    ref = str(bank.put(composition, name, card=card))
    print(markdown([*rows, {"row": ref} | {key: metrics[key] for key in rows[0] if key != "row"}]) if rows else ref)
    if rows and cfg.report:
        print(f"report: {write_report(ref, bank, task, rows, folder)}")
    return ref


if __name__ == "__main__":
    check_choices(Path(__file__).parent / "conf", sys.argv[1:])
    main()
