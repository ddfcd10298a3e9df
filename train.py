"""Demonstrations -> base or skill -> bank. `python train.py task=walker/walk base=walker/stand`."""

import sys
from pathlib import Path
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

import skillbank as sb
from skillbank import recipe
from skillbank.artifacts import tracked
from skillbank.cli import check_choices, user_errors


@hydra.main(version_base=None, config_path="conf", config_name="train")
@user_errors
def main(cfg: DictConfig) -> None:
    """Train what the configuration says and put it in the bank."""
    train(cfg)


def train(cfg: DictConfig) -> str:
    """Do it; returns the new version's reference."""
    conf = cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    bank = sb.Bank(cfg.bank)
    _ = bank.root  # an error where it is elsewhere, before anything is trained
    with tracked(conf, bank) as log:
        made = recipe.train(conf, bank)
        metrics = made.card["metrics"]
        metrics |= made.task.evaluate(made.model, episodes=cfg.episodes) if cfg.episodes else {}
        ref = str(bank.put(made.thing, made.name, card=made.card))
        log(ref)
    print(f"{ref}  " + "  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
    return ref


if __name__ == "__main__":
    check_choices(Path(__file__).parent / "conf", sys.argv[1:])
    main()
