"""The report: whole by itself, and true to its numbers."""

import base64
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from skillbank import Skill, merge
from skillbank.model import Recorded
from skillbank.report import Report, markdown

ROWS = [
    {"row": "base, untouched", "return": 155.4321, "return_std": 12.5},
    {"row": "best single skill", "return": 265.0, "return_std": 30.25},
    {"row": "walker/run-from-stand-walk@1 <&>", "return": 451.75, "return_std": 0.5, "more": 7},
]


def report(**options):
    rng = np.random.default_rng(0)
    shown = {
        "weights": rng.normal(size=(60, 2)).astype(np.float32),
        "rewards": rng.random(60),
        "frames": rng.integers(0, 256, (6, 48, 64, 3)).astype(np.uint8),
    }
    values = {
        "title": "walker/run-from-stand-walk@1 <&>",
        "rows": ROWS,
        "facts": {"base": "walker/stand@1", "skills": "walker/walk@1, walker/run@1"},
        "skills": ["walker/walk@1", "walker/run@1"],
        "cosine": np.array([[1.0, 0.25], [0.25, 1.0]]),
        "losses": [{"step": step, "loss": 1 / step, **({"validation": 2 / step} if step % 20 == 0 else {})} for step in range(10, 60, 10)],
    }
    recorded = Recorded(**{**shown, **{key: options.pop(key) for key in list(options) if key in shown}})
    return Report(recorded=recorded, **{**values, **options})


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.sources, self.cells, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href", "srcset", "data", "poster")]

    def handle_data(self, text):
        if self.tags and self.tags[-1] in ("td", "th", "h1", "dd", "dt"):
            self.cells.append(text)


def test_the_page_needs_nothing_beside_it(tmp_path):
    path = report().write(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    text = path.read_text()
    page = Page(text)
    assert len(page.sources) == 4
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import", re.sub(r"data:image/[^\"]*", "", text))
    for source in page.sources:
        kind, _, data = source.removeprefix("data:image/").partition(";base64,")
        with Image.open(BytesIO(base64.b64decode(data))) as image:
            assert image.format.lower() == kind
            image.load()


def test_the_numbers_are_in_the_page(tmp_path):
    page = Page(report().write(tmp_path).read_text())
    text = "".join(page.cells)
    for words in ("base, untouched", "155", "12.5", "best single skill", "265", "452", "walker/run-from-stand-walk@1 <&>", "walker/stand@1"):
        assert words in text, words


def test_the_figures_lie_beside_it(tmp_path):
    report().write(tmp_path)
    for name in ("episode.png", "cosine.png", "loss.png"):
        with Image.open(tmp_path / name) as image:
            image.verify()
            assert (image.format, min(image.size) > 100) == ("PNG", True)
    with Image.open(tmp_path / "episode.gif") as video:
        assert (video.format, video.n_frames, video.size) == ("GIF", 6, (64, 48))
        video.seek(5)
        video.load()


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({"frames": None}, {"episode.png", "cosine.png", "loss.png"}),
        ({"weights": None, "losses": ()}, {"episode.png", "episode.gif", "cosine.png"}),
        ({"rewards": None, "frames": None, "losses": (), "weights": None}, {"cosine.png"}),
        ({"rewards": None, "frames": None}, {"episode.png", "cosine.png", "loss.png"}),
        (
            {"skills": ["one"], "cosine": np.ones((1, 1)), "weights": np.ones((60, 1), np.float32)},
            {"episode.png", "episode.gif", "cosine.png", "loss.png"},
        ),
    ],
)
def test_what_there_is_not_is_left_out(tmp_path, options, files):
    path = report(**options).write(tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"report.html", *files}
    assert len(Page(path.read_text()).sources) == len(files)


def test_markdown():
    assert markdown(ROWS).splitlines() == [
        "| row                              | return | return_std |",
        "| -------------------------------- | ------ | ---------- |",
        "| base, untouched                  | 155    | 12.5       |",
        "| best single skill                | 265    | 30.2       |",
        "| walker/run-from-stand-walk@1 <&> | 452    | 0.5        |",
    ]
    assert markdown([{"row": "a", "n": 3}, {"row": "b"}]).splitlines()[-2:] == ["| a   | 3 |", "| b   |   |"]


def test_a_merge_shows_its_certificate(tmp_path):
    skill = Skill({name: (torch.randn(3, 6), torch.randn(5, 3)) for name in ("blocks.0", "blocks.1")})
    merged = merge([skill, skill.scaled(-0.5)], [1.0, 0.5], method="svd", rank=2)
    path = report(weights=None, losses=(), certificate=merged.certificate).write(tmp_path)
    assert 'alt="certificate of the merge"' in path.read_text()
    with Image.open(tmp_path / "merge.png") as image:
        assert image.width > 800
    assert not (tmp_path / "loss.png").exists()
