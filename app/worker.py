"""The worker: watches every book, fires the timers of calls and of clearing, delivers webhooks. Any number may run.

Nothing here decides. The screen and the timers name accounts; each is decided on alone, under the lock of its book, on
figures of that moment, so that two workers that name the same account do no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from types import MappingProxyType

from sqlalchemy.exc import SQLAlchemyError

from app import telemetry, tracing
from app.db.session import Database
from app.errors import DatabaseUnavailableError
from app.loan_keeping import LoanKeeper
from app.screening import Watchman
from app.services import calls, clearing, delivery, fleet_pool, fleet_watch, heartbeat, margin_calls, shards, snapshots
from app.services.delegation import MasterNeeded
from app.services.fleet_watch import FleetWatch
from app.services.liquidation import Rules
from app.services.margin import Scenes
from app.services.margin_calls import Decided
from app.services.market_cache import MarketCache
from app.services.sender import Sender
from app.settings import Settings
from app.telemetry import Metrics

log = logging.getLogger(__name__)

DUE_AT_ONCE_MAX = 200
DUE_PAUSE, DUE_PAUSE_SECONDS_MAX = 4.0, 2.0
"""How long that question rests after an answer that took long, as a multiple of it: of 100,000 due it takes .6 s."""
DECISIONS_AT_ONCE = 4
OUTAGE_PAUSE_SECONDS = 1.0
LONG_SECONDS, REST, REST_SECONDS_MAX = 0.2, 2.0, 2.0
"""From when on a look at a fleet's call that changed nothing took long, and how much longer it is then left alone.

All that happens to its members names its master, and of 1,000 to judge their pool takes .6 s.
"""
RETRY_SECONDS, RETRY_SECONDS_MAX = 0.5, 60.0
"""How long an account on which deciding has failed is left alone, at first and at most."""
TURN_RETRY_SECONDS = 10.0
"""How long a member is passed over whose turn under its fleet's call has failed."""
FLEETS_CHANGED_MAX = 3
_NO_FLEETS: Mapping[str, str] = MappingProxyType({})

LOOK_SECONDS_MAX, FIRST_LOOK_SECONDS_MAX = 15.0, 60.0
"""How long the screen may take for one look, and for the first, before the worker passes for silent."""


class _Line:
    """Accounts that wait, in turn: one that is in no fleet, then a member of a fleet, of each fleet one.

    A fleet of a thousand in breach at once keeps others waiting no longer than as many of them are.
    """

    def __init__(self) -> None:
        self._alone: deque[str] = deque()
        self._fleets: OrderedDict[str, deque[str]] = OrderedDict()
        self._is_fleets_turn = False

    def append(self, agent: str, master: str | None) -> None:
        """Put an account at the end, of its fleet's part where it is a member of one."""
        line = self._alone if master is None else self._fleets.setdefault(master, deque())
        line.append(agent)

    def pop(self) -> str | None:
        """Take out who comes next; None: there is nobody."""
        if self._fleets and (self._is_fleets_turn or not self._alone):
            self._is_fleets_turn = False
            master, members = self._fleets.popitem(last=False)
            agent = members.popleft()
            if members:
                self._fleets[master] = members
            return agent
        self._is_fleets_turn = True
        return self._alone.popleft() if self._alone else None


class Agenda:
    """Accounts to decide on: each once, what is urgent first, none by two at a time, no fleet's before all others.

    One that is named while it is decided on comes again afterwards. One on which deciding has failed is left alone for
    a while, twice as long after each failure in a row, and then comes by itself: no price may come that would name it.
    One that has a rest comes after it, if it is named meanwhile.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[str, bool] = {}
        self._lines = _Line(), _Line()
        self._masters: dict[str, str] = {}
        self._under_way: dict[str, bool | None] = {}
        self._failures: dict[str, int] = {}
        self._again_at: dict[str, float] = {}
        self._rests: dict[str, float] = {}
        self._any = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, agents: Iterable[str], *, urgent: bool, masters: Mapping[str, str | None] = _NO_FLEETS) -> None:
        """Put accounts on the agenda; `masters`: who leads the fleets that some are members of, as far as is known."""
        for agent in agents:
            if (master := masters.get(agent)) is not None:
                self._masters[agent] = master
            if agent in self._under_way:
                self._under_way[agent] = urgent or bool(self._under_way[agent])
            elif agent in self._rests:
                self._again_at[agent] = self._rests[agent]
            elif agent not in self._again_at and (agent not in self._waiting or urgent > self._waiting[agent]):
                self._waiting[agent] = urgent
                self._lines[not urgent].append(agent, self._masters.get(agent))
        if self._waiting:
            self._any.set()

    async def take(self) -> str:
        """Return the next account, once there is one; it is under way until `done` or `put_off`."""
        while True:
            for urgent, line in zip((True, False), self._lines, strict=True):
                while (agent := line.pop()) is not None:
                    if self._waiting.get(agent) is urgent:  # else it has moved to the other line, or was taken there
                        del self._waiting[agent]
                        self._under_way[agent] = None
                        return agent
            self._any.clear()
            await self._any.wait()

    def done(self, agent: str, rest: float = 0.0) -> None:
        """Note a decision, and for how many seconds the account is left alone, whoever names it."""
        self._failures.pop(agent, None)
        named_again = self._under_way.pop(agent)
        if rest > 0.0:
            self._rests[agent] = self._clock() + rest
        if named_again is None:
            self._masters.pop(agent, None)
        else:
            self.add([agent], urgent=named_again)

    def put_off(self, agent: str, *, outage: bool = False) -> float:
        """Note a failure, and return the seconds for which the account is left alone; an outage is none of its own."""
        del self._under_way[agent]
        if not outage:
            self._failures[agent] = self._failures.get(agent, 0) + 1
        again = 0 if outage else self._failures[agent] - 1
        seconds = min(RETRY_SECONDS_MAX, RETRY_SECONDS * 2.0**again)
        self._again_at[agent] = self._clock() + seconds
        return seconds

    def recall(self) -> None:
        """Put those on the agenda again who have been left alone for long enough."""
        now = self._clock()
        self._rests = {agent: moment for agent, moment in self._rests.items() if moment > now}
        again = [agent for agent, moment in self._again_at.items() if moment <= now]
        for agent in again:
            del self._again_at[agent]
        self.add(again, urgent=True)


def _rest_after(took: float) -> float:
    """Return for how long a fleet's call is left alone, a look at which took so many seconds and changed nothing."""
    return min(REST_SECONDS_MAX, REST * took) if took >= LONG_SECONDS else 0.0


class Worker:
    """One worker of a process."""

    def __init__(
        self, settings: Settings, database: Database, market: MarketCache, scenes: Scenes, metrics: Metrics
    ) -> None:
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._settings = settings
        self._database = database
        self._market = market
        self._scenes = scenes
        self._metrics = metrics
        self._agenda = Agenda()
        self._alive_until = time.monotonic() + FIRST_LOOK_SECONDS_MAX
        self._shards: frozenset[int] = frozenset()
        age_max = timedelta(seconds=settings.price_age_seconds_max)
        self._snapshots = snapshots.Snapshots(self.id, database)
        self._clearing = clearing.Timers(self.id, database, scenes, metrics)
        self._watchman = Watchman(self.id, database, market, age_max)
        self._fleets = FleetWatch(self.id, database, scenes, metrics)
        self._rules = Rules.of(settings)

        self._keeper = LoanKeeper(self.id, database, scenes, market, metrics, self._rules, age_max)

    async def run(self) -> None:
        """Work until cancelled, then finish what is under way."""
        async with Sender(self._settings, self._database.clock) as sender:
            loops = [
                asyncio.create_task(self._forever(self._watch)),
                asyncio.create_task(self._forever(self._fire_timers)),
                asyncio.create_task(self._forever(self._clear)),
                asyncio.create_task(self._forever(self._beat)),
                asyncio.create_task(self._forever(self._take_snapshots)),
                asyncio.create_task(self._forever(self._keep_loans)),
                asyncio.create_task(self._forever(self._watch_fleets)),
                asyncio.create_task(self._forever(self._watch_pools)),
                asyncio.create_task(self._forever(lambda: self._deliver(sender))),
                *(asyncio.create_task(self._forever(self._decide_on)) for _ in range(DECISIONS_AT_ONCE)),
            ]
            try:
                await asyncio.gather(*loops)
            finally:
                for loop in loops:
                    if not loop.cancelling():  # a second time would cut off what it finishes
                        loop.cancel()
                await asyncio.gather(*loops, return_exceptions=True)
                await self._leave()

    async def _leave(self) -> None:
        """Let the others take over at once."""
        with contextlib.suppress(DatabaseUnavailableError, SQLAlchemyError):  # else the leases lapse by themselves
            async with self._database.transaction(self.id) as tx:
                await shards.let_go(tx, self.id)
                await heartbeat.leave(tx, self.id)

    async def _forever(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Run a loop; an outage, or a fault of ours, is logged and the loop begun anew."""
        while True:
            try:
                await loop()
            except (DatabaseUnavailableError, SQLAlchemyError) as error:
                log.warning("the worker waits for the database: %s", type(error).__name__)
            except Exception:
                log.exception("a loop of the worker failed")
            await asyncio.sleep(OUTAGE_PAUSE_SECONDS)

    async def _watch(self) -> None:
        """Name those whom a change of prices or books brings past a level."""
        while True:
            with self._metrics.screen_seconds.time():
                named = await self._watchman.look(self._shards)
            self._alive_until = time.monotonic() + LOOK_SECONDS_MAX
            self._agenda.add(named.urgent, urgent=True, masters=named.masters)
            self._agenda.add(named.others, urgent=False)
            self._agenda.recall()
            self._metrics.agenda.set(len(self._agenda))
            await asyncio.sleep(self._settings.worker_poll_seconds)

    async def _fire_timers(self) -> None:
        """Name the accounts of this worker whose calls are due."""
        while True:
            began = time.monotonic()
            async with self._database.transaction(self.id) as tx:
                due = await calls.due(tx, DUE_AT_ONCE_MAX, self._shards)
            took = time.monotonic() - began
            self._agenda.add(due, urgent=True, masters=due)
            await asyncio.sleep(max(self._settings.worker_poll_seconds, min(DUE_PAUSE_SECONDS_MAX, DUE_PAUSE * took)))

    async def _clear(self) -> None:
        """Time out the escrows of this worker's shards, and settle its agreements."""
        while True:
            if self._shards:
                await self._clearing.fire(self._shards)
            await asyncio.sleep(self._settings.worker_poll_seconds)

    async def _watch_fleets(self) -> None:
        """Tell the zones of fleets, and stand by members in breach, of the masters in this worker's shards."""
        while True:
            if self._shards and self._market.view.read_at is not None:
                await self._fleets.look(self._shards)
            await asyncio.sleep(fleet_watch.EVERY_SECONDS)

    async def _watch_pools(self) -> None:
        """Name the masters in this worker's shards whose pools are in breach: an account of theirs has a call."""
        while True:
            if self._shards and self._market.view.read_at is not None:
                async with self._database.transaction(self.id) as tx:
                    called = await fleet_pool.called(tx, self._shards)
                for master_id in called:
                    await self._look_at_pool(master_id)
            await asyncio.sleep(fleet_pool.LOOK.total_seconds())

    async def _look_at_pool(self, master_id: str) -> None:
        """Name a master whose pool is to be called; one that can't be looked at holds up no other."""
        try:
            async with self._database.transaction(self.id) as tx:
                scene = await self._scenes.at(tx)
                is_named = await fleet_pool.is_to_be_called(tx, scene, self._rules, master_id)
        except DatabaseUnavailableError:
            raise
        except Exception:
            self._metrics.decision_failures.inc()
            log.exception("the pool of the fleet of %s can't be looked at", master_id)
        else:
            self._agenda.add([master_id] if is_named else [], urgent=True)

    async def _take_snapshots(self) -> None:
        """Write down what each account of this worker's shards is worth, once a UTC day."""
        while True:
            if not self._shards or self._market.view.read_at is None:
                await asyncio.sleep(OUTAGE_PAUSE_SECONDS)
                continue
            taken = await self._snapshots.round(self._market.view, self._shards)
            self._metrics.account_snapshots.inc(taken.count)
            await asyncio.sleep(0.0 if taken.more else snapshots.EVERY_SECONDS)

    async def _keep_loans(self) -> None:
        """Take what is due of the loans whose borrowers are in this worker's shards."""
        while True:
            await self._keeper.round(self._shards)
            await asyncio.sleep(self._settings.worker_poll_seconds)

    async def _deliver(self, sender: Sender) -> None:
        await delivery.run(self._database, sender, self._settings, self._metrics, self.id)

    async def _decide_on(self) -> None:
        """Decide on the accounts of the agenda, one after the other; one that can't be decided on holds up no other."""
        while True:
            agent_id = await self._agenda.take()
            with telemetry.concerning(agent_id=agent_id):
                await self._decide_if_possible(agent_id)

    async def _decide_if_possible(self, agent_id: str) -> None:
        began = time.monotonic()
        try:
            stands_still = await self._decide(agent_id)
        except DatabaseUnavailableError as error:
            log.warning("no decision on an account now: %s", error.code)
            self._agenda.put_off(agent_id, outage=True)
        except Exception:
            self._metrics.decision_failures.inc()
            log.exception("no decision on %s", agent_id)
            await self._leave_alone(agent_id)
        else:
            took = time.monotonic() - began
            self._agenda.done(agent_id, _rest_after(took) if stands_still else 0.0)

    async def _leave_alone(self, agent_id: str) -> None:
        """Put off an account, in the database too: its timer would be due for ever."""
        seconds = self._agenda.put_off(agent_id)
        with contextlib.suppress(DatabaseUnavailableError, SQLAlchemyError):
            async with self._database.transaction(self.id) as tx:
                await calls.put_off(tx, agent_id, seconds)

    async def _decide(self, agent_id: str) -> bool:
        """Decide on an account, and on whose turn it is then; return whether a fleet's call is where it was."""
        decided, is_more = await self._decided(agent_id, None), False
        if decided.turns:
            is_more = await self._take_turns(decided.turns, agent_id)
        if is_more or "liquidation.executed" in decided.told:
            self._agenda.add([agent_id], urgent=True)  # what is next is closed without waiting for the timer
        is_fleets = decided.call is not None and decided.call.cause == "fleet"
        return is_fleets and not decided.told and not is_more

    async def _take_turns(self, agents: Sequence[str], master_id: str) -> bool:
        """Decide on members under their fleet's call: whether that told of something.

        Where that fails for one of them, each is decided on by itself.
        """
        try:
            async with self._database.transaction(self.id) as tx:
                made = await margin_calls.take_turns(tx, self._scenes, master_id, agents, self._rules)
        except DatabaseUnavailableError:
            raise
        except Exception:
            log.exception("turns under the call of the fleet of %s", master_id)
            told = [await self._take_turn(agent_id, master_id) for agent_id in agents]
            return any(told)
        for agent_id, decided in made.items():
            with telemetry.concerning(agent_id=agent_id):
                self._follow(agent_id, decided)
        return any(decided.told for decided in made.values())

    async def _take_turn(self, agent_id: str, master_id: str) -> bool:
        """Decide on a member under its fleet's call: whether that told of something.

        One that can't be decided on is left alone, and the line goes on.
        """
        try:
            return bool((await self._decided(agent_id, master_id)).told)
        except DatabaseUnavailableError:
            raise
        except Exception:
            self._metrics.decision_failures.inc()
            log.exception("no turn of %s", agent_id)
            async with self._database.transaction(self.id) as tx:
                await margin_calls.pass_over(tx, self._scenes, agent_id, master_id, self._rules, TURN_RETRY_SECONDS)
            return True

    async def _decided(self, agent_id: str, master_id: str | None) -> Decided:
        started = time.perf_counter()
        with tracing.span("decide", agent_id=agent_id):
            decided = await self._decide_with(agent_id, master_id)
        self._metrics.decision_seconds.observe(time.perf_counter() - started)
        self._follow(agent_id, decided)
        return decided

    def _follow(self, agent_id: str, decided: Decided) -> None:
        """Tell of a decision, and see to what follows from it."""
        self._tell(decided)
        self._agenda.add(decided.named, urgent=True)
        if decided.drew:
            self._metrics.fleet_top_ups.inc()
        if decided.escalated:
            self._metrics.liquidations_escalated.inc()
            log.error("the venue of %s does not fill its liquidation: an operator has to look", agent_id)
        if decided.levels is not None:
            self._watchman.decided(agent_id, decided.levels, decided.band, waits=decided.waits)

    async def _decide_with(self, agent_id: str, master_id: str | None) -> Decided:
        """Decide on an account, together with its fleet's master where that has a say in it."""
        for _ in range(FLEETS_CHANGED_MAX):
            try:
                async with self._database.transaction(self.id) as tx:
                    return await margin_calls.decide(tx, self._scenes, agent_id, self._rules, master_id)
            except MasterNeeded as needed:
                master_id = needed.master_id
        raise RuntimeError("an account goes from fleet to fleet")

    def _tell(self, decided: Decided) -> None:
        """Tell the operator what was decided, and how long after the price that asked for it."""
        if decided.priced_at is not None:
            seconds = (self._database.clock.now() - decided.priced_at).total_seconds()
            self._metrics.price_to_call_seconds.observe(max(0.0, seconds))
        call = "" if decided.call is None else decided.call.id
        for told in decided.told:
            self._metrics.margin_events.labels(told).inc()
            with telemetry.concerning(margin_call_id=call):
                log.info(told)

    async def _beat(self) -> None:
        """Tell that this worker is alive, and hold its share of the accounts: only while it really looks at them."""
        while True:
            if time.monotonic() < self._alive_until:
                async with self._database.transaction(self.id) as tx:
                    await heartbeat.beat(tx, self.id, self._watchman.tally)
                    self._shards = await shards.hold(tx, self.id)
                self._metrics.screen_shards.set(len(self._shards))
                self._metrics.worker_beat.set_to_current_time()
            await asyncio.sleep(heartbeat.EVERY.total_seconds())
