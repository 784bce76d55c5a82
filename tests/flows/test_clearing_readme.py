"""The lines of the README's section on clearing, as they stand, in a shell, against a real server."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.flows.process import ROOT, Home, home, serving

README = (ROOT / "README.md").read_text()


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


def test_the_lines_on_clearing_work_as_they_stand(place: Home) -> None:
    section = README.partition("\n## Clearing\n")[2]
    found = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert found is not None
    with serving(place, PRIMERISK_PORT="0") as served:
        lines = found[1].replace("http://127.0.0.1:8000", served.greeting.address).replace("pr_…", served.greeting.key)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", lines], check=False, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "problem" not in said, said
    assert re.findall(r'"state":"(\w+)"', said) == ["accepted", "released", "active", "open", "active", "open"], said
    assert '"fee":100' in said
    assert '"movements_saved":0' in said
    assert '"outcome":"settled"' in said
