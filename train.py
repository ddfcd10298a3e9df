"""Demonstrations -> base or skill -> bank. `python train.py task=walker/walk base=walker/stand`."""

import sys
from pathlib import Path

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import skillbank as sb
from skillbank.cli import check_choices, user_errors
from skillbank.fit import run_folder
from skillbank.load import skills_on_base


@hydra.main(version_base=None, config_path="conf", config_name="train")
@user_errors
def main(cfg: DictConfig) -> None:
    """Train what the configuration says and put it in the bank."""
    train(cfg)


def train(cfg: DictConfig) -> str:
    """Do it; returns the new version's reference."""
    conf = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(conf, dict)
    task, bank = instantiate(cfg.task, _convert_="all"), sb.Bank(cfg.bank)
    base = None if cfg.base is None else str(bank.resolve(cfg.base))
    if base is not None and (kind := bank.card(base).kind) != "base":
        raise ValueError(f"{base!r} is a {kind}, a base is needed: give base={bank.base_of([base])}, and start=[...] to stand on skills")
    start_base, _, foundation, start = skills_on_base(bank, cfg.start) if cfg.start else (base, None, [], [])
    if start_base != base:
        raise ValueError(f"the skills to stand on belong to base {start_base!r}, the new one is to have {base!r}: give base={start_base}")
    torch.manual_seed(cfg.seed)
    if base is None:
        model = instantiate(cfg.model, **task.dimensions, _convert_="all")
        params = list(model.parameters())
    else:
        model = sb.load(base, bank)
        for skill in foundation:
            sb.fold(model.net, skill)
        params = sb.fresh(model.net, **conf["lora"])
        for layer in (module for module in model.net.modules() if isinstance(module, torch.nn.Dropout)):
            layer.p = cfg.dropout
    made_from = [bank.card(ref).hash for ref in (base, *start) if ref is not None]
    recipe = {key: conf[key] for key in ("task", "model", "lora", "dropout", "fit", "seed", "batch_size")}
    folder = run_folder("train", cfg.name, [recipe, made_from, task.data])
    result = sb.fit(
        model,
        task.batches(batch_size=cfg.batch_size, seed=cfg.seed),
        params,
        seed=cfg.seed,
        folder=folder,
        validate=lambda: sb.validation_loss(model, task.validation(batch_size=1024)),
        **conf["fit"],
        **conf["logger"],
        run={"name": cfg.name, "conf": conf},
    )
    metrics = {key: value for key, value in result.rows[-1].items() if key != "lr"} | {"seconds": result.seconds}
    metrics |= task.evaluate(model, episodes=cfg.episodes) if cfg.episodes else {}
    card = {"conf": conf, "data": task.data, "metrics": metrics, "parents": start}
    thing: sb.Base | sb.Skill
    if base is None:
        thing = sb.Base({**conf["model"], **task.dimensions}, model.state_dict())
    else:
        thing, card["base"] = sb.stack([*foundation, sb.read(model.net)]), base
    ref = str(bank.put(thing, cfg.name, card=card))
    print(f"{ref}  " + "  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
    return ref


if __name__ == "__main__":
    check_choices(Path(__file__).parent / "conf", sys.argv[1:])
    main()
