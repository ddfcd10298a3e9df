"""Skills of the bank -> merge or gate -> composition. `python compose.py task=walker/run skills=[walker/walk,walker/run] gate=mlp`."""

import sys
from pathlib import Path
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

import skillbank as sb
from skillbank import recipe
from skillbank.artifacts import tracked
from skillbank.cli import check_choices, user_errors
from skillbank.report import markdown, write_report


@hydra.main(version_base=None, config_path="conf", config_name="compose")
@user_errors
def main(cfg: DictConfig) -> None:
    """Compose what the configuration says, evaluate it, put it in the bank and write a report."""
    compose(cfg)


def compose(cfg: DictConfig) -> str:
    """Do it; returns the new version's reference."""
    conf = cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    bank = sb.Bank(cfg.bank)
    _ = bank.root  # an error where it is elsewhere, before anything is trained
    with tracked(conf, bank) as log:
        made = recipe.compose(conf, bank)
        assert isinstance(made.thing, sb.Composition)
        base, refs, metrics = made.thing.base, made.thing.skills, made.card["metrics"]
        rivals = {"base, untouched": base} | {f"{ref}, untouched": ref for ref in refs} | {ref: ref for ref in cfg.compare}
        evaluate = made.task.evaluate
        rows = [{"row": row} | evaluate(sb.load(ref, bank), episodes=cfg.episodes) for row, ref in rivals.items()] if cfg.episodes else []
        own = evaluate(made.model, episodes=cfg.episodes) if cfg.episodes else {}
        metrics |= own
        ref = str(bank.put(made.thing, made.name, card=made.card))
        log(ref)
    rows += [{"row": ref} | own] if rows else []
    print(markdown(rows) if rows else ref)
    if rows and cfg.report:
        print(f"report: {write_report(ref, bank, made.task, rows, made.folder)}")
    return ref


if __name__ == "__main__":
    check_choices(Path(__file__).parent / "conf", sys.argv[1:])
    main()
