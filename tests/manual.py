"""What users read: the README and the pages of docs/."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
MANUAL = "\n".join([README, *PAGES.values()])


def shell_lines(text: str, begins: str = "") -> str:
    """Return the first block of shell in the text that begins so."""
    found = re.search(rf"```sh\n({re.escape(begins)}.*?)```", text, re.DOTALL)
    assert found is not None, f"no block that begins with {begins}"
    return found[1]
