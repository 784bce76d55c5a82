"""How often somebody may do something: token buckets in memory, one process each."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from app.errors import RateLimitedError

BUCKETS_MAX = 10_000


@dataclass(slots=True)
class RateLimiter:
    """A token bucket per key: `rate` a second, `burst` at once. Rate 0 lets everything pass."""

    rate: float
    burst: int
    noun: str = "requests"
    _buckets: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def spend(self, key_id: str) -> None:
        """Take one token. Raises RateLimitedError with Retry-After and RateLimit headers."""
        if self.rate <= 0.0:
            return
        now = time.monotonic()
        tokens, then = self._buckets.get(key_id, (float(self.burst), now))
        tokens = min(float(self.burst), tokens + (now - then) * self.rate)
        if tokens < 1.0:
            raise self._refusal((1.0 - tokens) / self.rate)
        self._buckets[key_id] = (tokens - 1.0, now)
        self._buckets.move_to_end(key_id)
        if len(self._buckets) > BUCKETS_MAX:
            self._buckets.popitem(last=False)

    def give_back(self, key_id: str) -> None:
        """Put back a token that was taken."""
        if held := self._buckets.get(key_id):
            self._buckets[key_id] = (held[0] + 1.0, held[1])

    def _refusal(self, seconds: float) -> RateLimitedError:
        wait = str(max(1, int(seconds + 0.999)))
        return RateLimitedError(
            f"more than {self.rate:g} {self.noun} a second",
            code="rate_limited",
            headers={"Retry-After": wait, "RateLimit": f'"key";r=0;t={wait}', "RateLimit-Policy": self._policy()},
        )

    def _policy(self) -> str:
        return f'"key";q={self.burst};w={max(1, round(self.burst / self.rate))}'
