"""The page in a real browser: it is drawn, in light and in dark, and the browser has nothing to complain of."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from tests.domain.book import book, linear, option
from tests.report.pages import Page, closes, paged

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")

BOOK = book(
    option("BTC", "put", "short", 1, 50_000, 30, 0.6),
    linear("BTC-PERP", "long", 0.5),
    linear("ETH-PERP", "short", 9),
    held={"USDC": 60_000, "BTC": 0.1},
)
DARK = "--blink-settings=preferredColorScheme=0"


def _chromium(place: Path, page: Path, *arguments: str) -> tuple[str, list[str]]:
    """Return what the browser wrote, and what its console said of the page."""
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr")
    profile = f"--user-data-dir={place / 'profile'}"
    done = subprocess.run(
        [str(CHROMIUM), *fixed, profile, *arguments, page.as_uri()], check=True, capture_output=True, timeout=60,
        env=os.environ | {"HOME": str(place)},
    )  # fmt: skip
    return done.stdout.decode(), re.findall(r"CONSOLE.*", done.stderr.decode())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("report") / "report.html"
    page.write_text(paged(BOOK, closes("BTC", "ETH")))
    return page


def test_the_browser_reads_what_was_written_and_says_nothing(made: Path) -> None:
    dom, said = _chromium(made.parent, made, "--dump-dom")
    assert said == []
    assert [len(p.texts) for p in Page(dom).pictures] == [len(p.texts) for p in Page(made.read_text()).pictures]


def test_a_script_that_came_in_would_not_run(made: Path) -> None:
    broken = made.with_name("broken.html")
    broken.write_text(made.read_text().replace("</main>", "<script>document.title = 'run'</script></main>"))
    dom, said = _chromium(made.parent, broken, "--dump-dom")
    assert "<title>run</title>" not in dom
    assert "Content Security Policy" in " ".join(said)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_has_pictures_in_colour(made: Path, theme: str) -> None:
    shot = made.with_name(f"{theme}.png")
    _, said = _chromium(
        made.parent, made, f"--screenshot={shot}", "--window-size=1150,5000", *([DARK] if theme == "dark" else [])
    )
    assert said == []
    pixels = np.asarray(image.imread(shot))[:, :, :3]
    paper = pixels[2, 2]
    assert paper.mean() > 0.9 if theme == "light" else paper.mean() < 0.2
    reds = pixels[:, :, 0] - pixels[:, :, 1:].max(axis=2)
    greens = pixels[:, :, 1] - pixels[:, :, [0, 2]].max(axis=2)
    for share in ((reds > 0.08).mean(), (greens > 0.05).mean()):
        assert share > 0.005
