"""What a composition came to, for a person: tables for the terminal, and one self-contained HTML file with figures and a short video."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from skillbank.model import Recorded
from skillbank.progress import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from skillbank.bank import Bank
    from skillbank.certificate import Certificate
    from skillbank.model import Task

__all__ = ["Report", "markdown", "write_report"]

Row = Mapping[str, Any]
INK, PALETTE = "#1f2933", ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#c53030", "#718096")


def markdown(rows: Sequence[Row]) -> str:
    """Rows as an aligned Markdown table; the columns are the keys of the first row."""
    columns = list(rows[0])
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines)


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that a report shows; `write` makes the files.

    Args:
        title: reference of the composition.
        rows: the results table, one mapping per row, the trivial rows included.
        facts: what it was made from, as name and text.
        skills: names of the K skills.
        cosine: cosine of the skills' deltas, (K, K).
        recorded: what the task shows of it, such as an episode.
        losses: rows of the metrics file, with `step`, `loss` and sometimes `validation`.
        certificate: of a merge; None for a gate.

    """

    title: str
    rows: Sequence[Row]
    facts: Mapping[str, str]
    skills: Sequence[str]
    cosine: NDArray[np.float64]
    recorded: Recorded = field(default=Recorded())
    losses: Sequence[Mapping[str, float]] = field(default=())
    certificate: Certificate | None = None

    def write(self, folder: Path) -> Path:
        """Write `report.html` (which needs nothing beside it), its figures as PNG and the video as GIF; returns the path of the HTML file."""
        from jinja2 import Environment

        folder.mkdir(parents=True, exist_ok=True)
        images: dict[str, bytes] = {}
        if self.recorded.rewards is not None or self.recorded.weights is not None:
            images["episode.png"] = _png(self._episode())
        images["cosine.png"] = _png(self._similarity())
        if self.losses:
            images["loss.png"] = _png(self._loss())
        if self.certificate is not None:
            images["merge.png"] = _png(_merge(self.certificate))
        if self.recorded.frames is not None:
            images["episode.gif"] = _gif(self.recorded.frames)
        for name, data in images.items():
            (folder / name).write_bytes(data)
        inline = {name: f"data:image/{name[-3:]};base64,{base64.b64encode(data).decode()}" for name, data in images.items()}
        columns = list(self.rows[0])
        cells = [[_cell(row.get(column, "")) for column in columns] for row in self.rows]
        page = Environment(autoescape=True).from_string(PAGE).render(title=self.title, columns=columns, cells=cells, facts=self.facts, images=inline)
        path = folder / "report.html"
        path.write_text(page)
        return path

    def _episode(self) -> Figure:
        """Key frames over the gate's weights and the reward, as far as there are any, on one axis."""
        shown = 6
        seen, given, got = self.recorded.frames, self.recorded.weights, self.recorded.rewards
        steps = next(len(each) for each in (got, given) if each is not None)
        figure = _figure(10, 5.2)
        heights = [0.02 if seen is None else 1.0, 1.1, 0.02 if got is None else 0.7]
        grid = figure.add_gridspec(3, shown, height_ratios=heights, hspace=0.15, wspace=0.04)
        if seen is not None:
            for column, frame in enumerate(np.linspace(0, len(seen) - 1, shown).round().astype(int)):
                axis = figure.add_subplot(grid[0, column])
                axis.imshow(seen[frame])
                axis.set_title(f"step {frame * self.recorded.every}", fontsize=8)
                axis.set_axis_off()
        weights = figure.add_subplot(grid[1, :])
        if given is not None:
            for k, name in enumerate(self.skills):
                weights.plot(given[:, k], color=PALETTE[k % len(PALETTE)], label=name, linewidth=1)
            weights.legend(loc="upper right", fontsize=8, ncols=len(self.skills), frameon=False)
        else:
            weights.text(0.5, 0.5, "constant weights", transform=weights.transAxes, ha="center", color="#718096")
        weights.axhline(0, color=INK, linewidth=0.5)
        weights.set(xlim=(0, steps), ylabel="weight\n(1 = as trained)", xlabel=self.recorded.unit)
        if got is not None:
            weights.set(xlabel="", xticklabels=[])
            reward = figure.add_subplot(grid[2, :])
            reward.fill_between(np.arange(steps), got, color="#a0aec0", linewidth=0)
            reward.set(xlim=(0, steps), ylim=(0, None), ylabel="reward", xlabel=self.recorded.unit)
        return figure

    def _similarity(self) -> Figure:
        count = len(self.skills)
        figure = _figure(2.2 + 0.7 * count, 1.6 + 0.7 * count)
        axis = figure.add_subplot()
        axis.imshow(self.cosine, cmap="RdBu_r", vmin=-1, vmax=1)
        for i in range(count):
            for j in range(count):
                axis.text(
                    j, i, f"{self.cosine[i, j]:.2f}", ha="center", va="center", fontsize=9, color="white" if abs(self.cosine[i, j]) > 0.5 else INK
                )
        axis.set_xticks(range(count), self.skills, rotation=20, ha="right", fontsize=8)
        axis.set_yticks(range(count), self.skills, fontsize=8)
        return figure

    def _loss(self) -> Figure:
        figure = _figure(5, 3)
        axis = figure.add_subplot()
        axis.plot([row["step"] for row in self.losses], [row["loss"] for row in self.losses], color=PALETTE[0], label="training", linewidth=1)
        held_out = [(row["step"], row["validation"]) for row in self.losses if "validation" in row]
        if held_out:
            axis.plot(*zip(*held_out, strict=True), color=PALETTE[1], label="held out", marker=".", linewidth=1)
        axis.legend(fontsize=8, frameon=False)
        axis.set(xlabel="step", ylabel="loss")
        return figure


def _merge(certificate: Certificate) -> Figure:
    """Per module how far the merge is from the weighted sum, and how many directions it has and uses."""
    names = list(certificate.errors)
    figure = _figure(9, 1.2 + 0.24 * len(names))
    error, rank = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(names))
    error.barh(places, [min(certificate.errors[name], 2.0) for name in names], color=PALETTE[0])
    error.axvline(certificate.error, color=INK, linewidth=0.8, linestyle="--")
    error.set(xlabel="distance from the weighted sum, relative (line: in total)", xlim=(0, None))
    error.set_yticks(places, names, fontsize=8)
    error.invert_yaxis()
    rank.barh(places, [certificate.ranks.get(name, 0) for name in names], color="#cbd2d9", label="rank")
    rank.barh(places, [certificate.effective_ranks.get(name, 0.0) for name in names], height=0.4, color=PALETTE[1], label="effective rank")
    rank.set(xlabel="directions")
    rank.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    return figure


def write_report(ref: str, bank: Bank, task: Task, rows: Sequence[Row], folder: Path) -> Path:
    """Report of a composition in a bank, with what its task records of it.

    Args:
        ref: a composition.
        bank: where it is.
        task: what it is judged by.
        rows: of the results table, its own the last one.
        folder: of its training run, for the loss curve; the report goes to the same place.

    Returns:
        Path of the HTML file.

    """
    from skillbank.bank import Composition
    from skillbank.load import load, skills_on_base
    from skillbank.merge import merge
    from skillbank.skill import cosine

    card, model, composition = bank.card(ref), load(ref, bank), bank.get(ref)
    names = [parent["ref"] for parent in card.parents]
    skills = skills_on_base(bank, names)[2]
    recipe = composition.merge if isinstance(composition, Composition) else None
    metrics = folder / METRICS
    report = Report(
        title=ref,
        rows=rows,
        facts=_facts(bank, ref),
        skills=names,
        cosine=cosine(skills).numpy(),
        recorded=task.record(model),
        losses=[json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else (),
        certificate=None if recipe is None else merge(skills, **recipe).certificate,
    )
    return report.write(folder)


def _facts(bank: Bank, ref: str) -> dict[str, str]:
    card = bank.card(ref)
    assert card.base is not None
    weights = {parent["ref"]: parent["weight"] for parent in card.parents}
    return {
        "base": f"{card.base['ref']} (fingerprint {str(card.base['fingerprint'])[:12]})",
        "skills": ", ".join(name if weight is None else f"{weight:g} x {name}" for name, weight in weights.items()),
        "data": ", ".join(f"{source} ({digest[:12]})" for source, digest in card.data.items()),
        "content": f"sha256:{card.hash}",
        "made": f"{card.created} with " + ", ".join(f"{tool} {version}" for tool, version in card.tools.items()),
    }


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else f"{value:.0f}" if isinstance(value, float) else str(value)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _gif(frames: NDArray[np.uint8], seconds: float = 0.05) -> bytes:
    """Animated GIF on one palette of 64 colours."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    palette = images[len(images) // 2].quantize(64)
    small = [image.quantize(64, palette=palette, dither=Image.Dither.NONE) for image in images]
    buffer = BytesIO()
    small[0].save(buffer, format="GIF", save_all=True, append_images=small[1:], duration=int(1000 * seconds), loop=0, optimize=True)
    return buffer.getvalue()


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #d9e2ec; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; } dt { color: #627d98; } dd { margin: 0; overflow-wrap: anywhere; }
img { max-width: 100%; } figure { margin: 1.5rem 0; } figcaption { color: #627d98; font-size: .9rem; }
.two { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; } .two figure { flex: 1 1 18rem; }
</style></head><body>
<h1>{{ title }}</h1>
<div class="two">
<div><table><tr>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for line in cells %}<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></div>
{% if images["episode.gif"] %}<figure><img src="{{ images["episode.gif"] }}" alt="the recorded episode">
<figcaption>The first evaluation episode.</figcaption></figure>{% endif %}
</div>
{% if images["episode.png"] %}<figure><img src="{{ images["episode.png"] }}" alt="weights along the episode">
<figcaption>The same episode: what the gate does, and what it earns. A weight of 1 is the skill as it was trained, 0 is the base.</figcaption>
</figure>{% endif %}
<div class="two">
<figure><img src="{{ images["cosine.png"] }}" alt="cosine of the skills">
<figcaption>Cosine of the skills' weight changes: near 0 they do not meet, near -1 they cancel.</figcaption></figure>
{% if images["loss.png"] %}<figure><img src="{{ images["loss.png"] }}" alt="loss curve">
<figcaption>Training of the gate.</figcaption></figure>{% endif %}
{% if images["merge.png"] %}<figure><img src="{{ images["merge.png"] }}" alt="certificate of the merge">
<figcaption>What the merge did to every module.</figcaption></figure>{% endif %}
</div>
<h2>Made from</h2><dl>{% for key, text in facts.items() %}<dt>{{ key }}</dt><dd>{{ text }}</dd>{% endfor %}</dl>
</body></html>
"""
