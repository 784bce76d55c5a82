"""The long form: python -m tests.faults --kills 200 [--seed N]."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time

from tests.faults.checks import objections
from tests.faults.scenario import Plan, run, summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--agents", type=int, default=24)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    given = parser.parse_args()
    begun = time.monotonic()

    def say(line: str) -> None:
        begin, end = ("\r", "") if sys.stdout.isatty() else ("", "\n")
        sys.stdout.write(f"{begin}{time.monotonic() - begun:6.1f} s  {line:<50}{end}")
        sys.stdout.flush()

    sys.stdout.write(f"seed {given.seed}\n")
    history, desk = asyncio.run(run(Plan(given.seed, given.kills, given.agents, up_seconds=2.0), say))
    sys.stdout.write(f"\n{summary(history, desk)}\n")
    sys.stdout.writelines(f"{role} ended by itself: {code}\n" for role, code in desk.stack.ended)
    found = objections(history)
    sys.stdout.write("\n".join(found) + "\n" if found else "no objection\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
