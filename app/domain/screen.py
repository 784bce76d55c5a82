"""The screen: every account's book as numpy columns, re-margined as prices move, to find whom a decision is due for.

It decides nothing. Its figures are those of `account_figures` but for rounding; whoever is a candidate is assessed
anew, under the lock of its book.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.domain.black76 import Floats
from app.domain.board import Board
from app.domain.book import Book
from app.domain.book_columns import ISOLATED, PORTFOLIO, BookColumns, HoldingColumns, PositionColumns, book_columns
from app.domain.computed import computed
from app.domain.holders import Holders, Keys, pair_keys
from app.domain.margin import many
from app.domain.parameters import MarketParameters
from app.domain.portfolio import Flags, Rows, sums
from app.domain.ragged import Column, Ragged
from app.domain.screen_scenarios import Exposures

TOLERANCE = 1e-9
"""Relative: an account this near to a threshold is a candidate, whatever the sums' rounding."""
WHOLE_SHARE = 0.25
"""Share of the accounts past which all are assessed: to read every row in a line costs less than to pick some."""
ACCOUNTS_AT_ONCE = 4_096
"""What is worked on of them at once stays in a core's cache."""

SHORT, USED_UP, ALONE, CALLED = (np.uint8(1 << k) for k in range(4))
"""How an account stands: equity below maintenance, utilization at the breach level, an isolated position below its own
maintenance, a margin call that is open."""
BREACHED = SHORT | USED_UP | ALONE

_UNCHECKED = np.int8(2)

_POOL = {
    "symbol": np.intp(0),
    "size": np.float64(0.0),
    "entry_price": np.float64(0.0),
    "leverage": np.float64(np.nan),
    "quantity": np.float64(0.0),
    "initial_rate": np.float64(0.0),
    "maintenance_rate": np.float64(0.0),
    "price_range": np.float64(0.0),
    "first": np.True_,
    "sign": np.int8(0),
}
"""Positions that share the account's collateral, sorted by underlying.

Those from one `first` to the next net against each other: a lane. Rates and range are their lane's; the rates are 0 in
portfolio mode. `sign` is, on the first row, that of the lane when its correlations were last checked.
"""
_SOLO = {
    "symbol": np.intp(0),
    "size": np.float64(0.0),
    "entry_price": np.float64(0.0),
    "leverage": np.float64(np.nan),
    "allocated": np.float64(0.0),
    "quantity": np.float64(0.0),
    "maintenance_rate": np.float64(0.0),
}
"""Isolated positions, each on its own collateral."""
_UNITS = ("held", "owed", "reserved", "lent")
_HOLDINGS = {"asset": np.intp(0)} | {name: np.float64(0.0) for name in _UNITS}


Standing = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ScreenFigures:
    """Figures of accounts (k,), USD, as `Health` has them: of the pool, with reservations required.

    Ratios are infinite where `Health` has none for want of equity. NaN: a price lacks.
    """

    accounts: Rows
    equity: Floats
    required_initial: Floats
    required_maintenance: Floats

    @property
    def utilization(self) -> Floats:
        """Required initial margin / equity (k,)."""
        return self._ratio(self.required_initial)

    @property
    def margin_ratio(self) -> Floats:
        """Required maintenance margin / equity (k,)."""
        return self._ratio(self.required_maintenance)

    def _ratio(self, required: Floats) -> Floats:
        equity, initial = self.equity, self.required_initial
        insolvent = (equity < 0.0) | ((equity == 0.0) & (initial > 0.0))
        ratio = np.divide(required, equity, out=np.zeros(len(equity)), where=(required != 0.0) & ~insolvent)
        ratio[insolvent] = np.inf
        return ratio


class Screen:
    """All books, by the account's index; the agent of an index is in `agents`. Not for several threads."""

    def __init__(self, parameters: MarketParameters, prices: Mapping[str, float]) -> None:
        self.board = Board(parameters, prices)
        self.agents: list[str] = []
        self.index: dict[str, int] = {}
        self.version: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._mode: NDArray[np.int8] = np.zeros(0, dtype=np.int8)
        self._own_breach: Floats = np.zeros(0)
        self._open_call: Flags = np.zeros(0, dtype=np.bool_)
        self._unsound: Flags = np.zeros(0, dtype=np.bool_)
        self._alone_breached: Flags = np.zeros(0, dtype=np.bool_)
        self._owes: Flags = np.zeros(0, dtype=np.bool_)
        self._equity: Floats = np.zeros(0)
        self._alone: Floats = np.zeros(0)
        self._initial: Floats = np.zeros(0)
        self._maintenance: Floats = np.zeros(0)
        self._pool, self._solo, self._holdings = Ragged(_POOL), Ragged(_SOLO), Ragged(_HOLDINGS)
        self._market_holders, self._asset_holders = Holders(), Holders()
        self._correlations = many.Correlations(parameters)
        self._asset_names: list[str] = []
        self._listed: Rows = np.zeros(0, dtype=np.intp)

    def __len__(self) -> int:
        return len(self.agents)

    @property
    def parameters(self) -> MarketParameters:
        """The market's parameters that everything is margined by; others need `under`."""
        return self.board.parameters

    # --- what is screened

    def update(self, columns: BookColumns) -> Rows:
        """Replace whole books, new ones too, and return their accounts (k,), assessed."""
        accounts = self._accounts(columns.agents)
        self.version[accounts] = columns.version
        self._mode[accounts] = columns.mode
        self._own_breach[accounts] = columns.breach
        self._open_call[accounts] = columns.open_call
        self._unsound[accounts] = False
        debts = columns.holdings.account[columns.holdings.owed > 0.0]
        self._owes[accounts] = np.bincount(debts, minlength=len(accounts)) > 0
        before = self._held(accounts)
        self._place(accounts, columns)
        after = self._held(accounts)
        self._market_holders.change(before[0], after[0])
        self._asset_holders.change(before[1], after[1])
        self._assess(np.sort(accounts))
        return accounts

    def update_account(self, book: Book, *, open_call: bool) -> int:
        """Replace one account's book and return its index."""
        return int(self.update(book_columns([book], frozenset([book.agent_id] if open_call else [])))[0])

    def version_of(self, agent: str) -> int | None:
        """Return the version of an agent's book, None of one that is not screened."""
        account = self.index.get(agent)
        return None if account is None else int(self.version[account])

    def under(self, parameters: MarketParameters) -> Screen:
        """Return the same books under other parameters of the market, assessed."""
        other = Screen(parameters, self.board.stored)
        other.update(self.columns())
        return other

    def columns(self) -> BookColumns:
        """Return all books as they were given."""
        pool, solo, holdings = self._pool, self._solo, self._holdings
        for table in (pool, solo, holdings):
            table.close_up()
        none = np.zeros(len(pool))
        return BookColumns(
            agents=tuple(self.agents),
            version=self.version.copy(),
            mode=self._mode.copy(),
            breach=self._own_breach.copy(),
            open_call=self._open_call.copy(),
            symbols=tuple(self.board.symbols),
            assets=tuple(self.board.assets),
            positions=PositionColumns(
                account=np.concatenate([pool["owner"], solo["owner"]]),
                **{n: np.concatenate([pool[n], solo[n]]) for n in ("symbol", "size", "entry_price", "leverage")},
                isolated=np.repeat([False, True], [len(pool), len(solo)]),
                allocated=np.concatenate([none, solo["allocated"]]),
            ),
            holdings=HoldingColumns(holdings["owner"].copy(), **{n: holdings[n].copy() for n in _HOLDINGS}),
        )

    # --- what comes of it

    def tick(self, prices: Mapping[str, float]) -> ScreenFigures:
        """Take in prices, USD by symbol or asset; return the figures of the accounts that they touch, sorted by index.

        Touched is who holds a market whose mark changed or an asset whose price did; a market without a price of its
        own is marked at its underlying's. A price that is as before touches nobody.
        """
        touched = self._touched(*self.board.post(prices))
        self._assess(touched)
        return self.figures(touched)

    def figures(self, accounts: Rows | None = None) -> ScreenFigures:
        """Return the figures of accounts (k,), else of all, as last assessed."""
        chosen = np.arange(len(self)) if accounts is None else accounts
        return ScreenFigures(chosen, self._equity[chosen], self._initial[chosen], self._maintenance[chosen])

    def whole_equity(self, accounts: Rows) -> Floats:
        """Return what accounts (k,) are worth with their isolated positions, USD, as last assessed."""
        whole: Floats = self._equity[accounts] + self._alone[accounts]
        return whole

    def standing(self, accounts: Rows) -> Standing:
        """Return how accounts (k,) stand, as last assessed: a sum of the bits above, within a rounding of each level.

        A book without anything leveraged is never short: it may have reserved all that is free.
        """
        found, policy = self.figures(accounts), self.parameters.policy
        equity, maintenance, used = found.equity, found.required_maintenance, found.utilization
        breach = np.fmin(self._own_breach[accounts], policy.breach_utilization)
        leveraged = (self._pool.count[accounts] + self._solo.count[accounts] > 0) | self._owes[accounts]
        bits = np.zeros(len(accounts), dtype=np.uint8)
        bits[leveraged & (equity - TOLERANCE * np.abs(equity) < maintenance * (1.0 + TOLERANCE))] |= SHORT
        bits[leveraged & (used >= breach * (1.0 - TOLERANCE))] |= USED_UP
        bits[self._alone_breached[accounts]] |= ALONE
        bits[self._open_call[accounts]] |= CALLED
        return bits

    def candidates(self, accounts: Rows | None = None) -> Rows:
        """Return those of the accounts, else of all, for whom a decision is due, or may be within a rounding.

        Utilization at the account's breach level, equity below the maintenance margin, a margin call that is open, or
        an isolated position below its own maintenance margin.
        """
        chosen = np.arange(len(self)) if accounts is None else accounts
        due: Flags = (self.standing(chosen) & (BREACHED | CALLED)) != 0
        return chosen[due]

    def prices_used(self) -> dict[str, int]:
        """Return how many accounts hold what each stored price values; an unmarked market counts with its asset."""
        board = self.board
        by_symbol = self._market_holders.counts(len(board.symbols))
        following = np.isnan(board.own_price)
        by_asset = self._asset_holders.counts(len(board.assets))
        by_asset += np.bincount(board.underlying[following], by_symbol[following], len(by_asset)).astype(np.intp)
        used = {name: int(by_asset[row]) for name, row in board.assets.items() if name in board.stored}
        for name, row in board.symbols.items():
            if name in board.stored:
                used[name] = used.get(name, 0) + int(by_symbol[row])
        return {name: count for name, count in used.items() if count}

    def exposures(self) -> tuple[Exposures, Exposures]:
        """Return the pool's positions and the collateral after haircut less debts, for `scenario_pnl`."""
        pool, holdings, board = self._pool, self._holdings, self.board
        for table in (pool, holdings):
            table.close_up()
        asset = holdings["asset"]
        value = holdings["held"] * board.backing[asset] - holdings["owed"] * board.price[asset]
        value -= holdings["lent"] * board.price[asset] * board.recall_haircut
        symbol = pool["symbol"]
        return (
            Exposures(_indptr(pool), board.underlying[symbol], pool["quantity"] * board.mark[symbol]),
            Exposures(_indptr(holdings), asset, value),
        )

    def unpriced(self) -> Rows:
        """Return the accounts that can't be assessed: a price lacks, or their correlations are past repair."""
        return np.flatnonzero(np.isnan(self._equity + self._initial))

    # --- books in

    def _accounts(self, agents: Sequence[str]) -> Rows:
        """Return the indices of agents, new ones added."""
        new = [agent for agent in agents if agent not in self.index]
        if new:
            self.index |= {agent: len(self.agents) + k for k, agent in enumerate(new)}
            self.agents += new
            for name in _ACCOUNT_COLUMNS:
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros(len(new), old.dtype)]))
            for table in (self._pool, self._solo, self._holdings):
                table.add_owners(len(self.agents))
        return np.array([self.index[agent] for agent in agents], dtype=np.intp)

    def _held(self, accounts: Rows) -> tuple[Keys, Keys]:
        """Return the pairs of market and account, and of asset and account."""
        pairs = []
        for tables, name in (((self._pool, self._solo), "symbol"), ((self._holdings,), "asset")):
            picked = [table.rows(accounts) for table in tables]
            what = np.concatenate([table[name][rows] for table, (rows, _) in zip(tables, picked, strict=True)])
            pairs.append(pair_keys(what, accounts[np.concatenate([local for _, local in picked])]))
        return pairs[0], pairs[1]

    def _place(self, accounts: Rows, columns: BookColumns) -> None:
        """Put the rows of whole books into the tables."""
        symbols, assets = self.board.symbol_ids(columns.symbols), self.board.asset_ids(columns.assets)
        placed = lay_out(columns.positions, symbols, columns.mode, self.board)
        self._pool.replace(accounts, *placed.pool)
        self._solo.replace(accounts, *placed.solo)
        holdings = columns.holdings
        order = np.argsort(holdings.account, kind="stable")
        units = {name: getattr(holdings, name)[order] for name in _UNITS}
        self._holdings.replace(accounts, holdings.account[order], {"asset": assets[holdings.asset[order]], **units})
        if len(self._asset_names) < len(self.board.assets):
            self._asset_names = list(self.board.assets)
            self._listed = self._correlations.listed(self._asset_names)

    def depending_on(self, names: Collection[str]) -> Rows:
        """Return the accounts (k,), sorted, whose figures depend on the stored prices of these symbols and assets."""
        board = self.board
        assets = np.array([board.assets[name] for name in names if name in board.assets], dtype=np.intp)
        own = np.array([board.symbols[name] for name in names if name in board.symbols], dtype=np.intp)
        following = np.flatnonzero(np.isnan(board.own_price) & np.isin(board.underlying, assets))
        return self._touched(np.union1d(own, following), assets)

    # --- prices in

    def _touched(self, symbols: Rows, assets: Rows) -> Rows:
        """Return the accounts (k,), sorted, whose figures depend on the marks and prices that changed."""
        flags = np.zeros(len(self), dtype=np.bool_)
        self._market_holders.mark(symbols.tolist(), flags)
        self._asset_holders.mark(assets.tolist(), flags)
        limited = assets[~np.isnan(self.board.limit[assets])]
        if len(limited):  # a limit in units: the add-on of portfolio mode depends on the underlying's own price
            also = np.zeros(len(self), dtype=np.bool_)
            self._market_holders.mark(self.board.symbols_on(limited).tolist(), also)
            flags |= also & (self._mode == PORTFOLIO)
        return np.flatnonzero(flags)

    def _assess(self, accounts: Rows) -> None:
        """Bring the figures of accounts (k,), sorted, up to date; of all where they are many."""
        if len(accounts) <= WHOLE_SHARE * len(self):
            self._assess_block(accounts)
            return
        everyone = np.arange(len(self))
        for start in range(0, len(self), ACCOUNTS_AT_ONCE):
            self._assess_block(everyone[start : start + ACCOUNTS_AT_ONCE])

    def _assess_block(self, accounts: Rows) -> None:
        backing, reserved = self._backing(accounts)
        alone = self._stand_alone(accounts)
        pnl, initial, maintenance = self._additive(accounts)
        self._equity[accounts] = backing - alone + pnl
        members = np.flatnonzero(self._mode[accounts] == PORTFOLIO)
        if len(members):
            initial[members], maintenance[members] = self._by_risk(accounts[members])
        self._initial[accounts] = initial + reserved
        self._maintenance[accounts] = maintenance + reserved

    def _backing(self, accounts: Rows) -> tuple[Floats, Floats]:
        """Return collateral after haircut less debts, and what reservations require of it, USD (k,)."""
        table, board = self._holdings, self.board
        picked = _pick(table, accounts)
        rows = picked.rows
        asset = table["asset"][rows]
        unit = board.backing[asset]
        price = board.price[asset]
        value = table["held"][rows] * unit - (table["owed"][rows] + table["lent"][rows] * board.recall_haircut) * price
        return picked.sums(value), picked.sums(table["reserved"][rows] * unit)

    def _stand_alone(self, accounts: Rows) -> Floats:
        """Return what isolated positions hold for themselves, USD (k,); note whose fall short of their own margin."""
        table = self._solo
        picked = _pick(table, accounts)
        rows = picked.rows
        quantity, mark = table["quantity"][rows], self.board.mark[table["symbol"][rows]]
        allocated = table["allocated"][rows]
        left = allocated + quantity * (mark - table["entry_price"][rows])
        needed = table["maintenance_rate"][rows] * np.abs(quantity) * mark
        # never so for a blank row, which needs nothing and holds nothing
        short = left - TOLERANCE * allocated < needed * (1.0 + TOLERANCE)
        self._alone[accounts] = picked.sums(left)
        self._alone_breached[accounts] = np.bincount(picked.owner[short], minlength=len(accounts)) > 0
        return picked.sums(allocated)

    def _additive(self, accounts: Rows) -> tuple[Floats, Floats, Floats]:
        """Return the pool's profit and loss, and its margins in cross and isolated mode, USD (k,)."""
        table = self._pool
        picked = _pick(table, accounts)
        rows = picked.rows
        quantity, mark = table["quantity"][rows], self.board.mark[table["symbol"][rows]]
        lanes = _Grouping(table["first"][rows])
        net = lanes.netted(quantity * mark)
        mark -= table["entry_price"][rows]
        mark *= quantity
        initial, maintenance = table["initial_rate"][rows] * net, table["maintenance_rate"][rows] * net
        return picked.sums(mark), picked.sums(initial), picked.sums(maintenance)

    def _by_risk(self, accounts: Rows) -> tuple[Floats, Floats]:
        """Return the pool's margins in portfolio mode, USD (k,)."""
        table, board, count = self._pool, self.board, len(accounts)
        rows, owner = table.rows(accounts)
        symbol = table["symbol"][rows]
        exposure = table["quantity"][rows] * board.mark[symbol]
        lanes = _Grouping(table["first"][rows])
        first = rows[lanes.leads]
        under = board.underlying[symbol[lanes.leads]]
        books = many.Lanes(
            owner=owner[lanes.leads],
            net=lanes.sums(exposure),
            gross=lanes.sums(np.abs(exposure)),
            price_range=table["price_range"][first],
            price=board.price[under],
            limit=board.limit[under],
        )
        d = many.directional(books, self.parameters)
        pairs = self._correlations.pairs(books.owner, self._listed[under])
        self._check_signs(accounts, books.owner, d, under, first, pairs)
        joint = np.sqrt(np.maximum(many.quadratic(d, books.owner, count, pairs, self.parameters), 0.0))
        for k in np.flatnonzero(self._unsound[accounts]).tolist():
            own = slice(*np.searchsorted(books.owner, [k, k + 1]))
            names = [self._asset_names[j] for j in under[own].tolist()]
            joint[k] = many.repaired_joint(names, d[own], self.parameters)
        return many.requirement(books, joint, self.parameters)

    def _check_signs(self, accounts: Rows, owner: Rows, d: Floats, under: Rows, first: Rows, pairs: many.Pairs) -> None:
        """Find anew whose signed correlations need a repair, where signs changed since they were last checked."""
        sign = np.sign(np.nan_to_num(d)).astype(np.int8)
        seen = self._pool["sign"]
        changed = sign != seen[first]
        if not changed.any():
            return
        seen[first] = sign
        doubtful = np.zeros(len(accounts), dtype=np.bool_)
        doubtful[pairs.owner if self._correlations.sound else owner] = True
        doubtful &= np.bincount(owner[changed], minlength=len(accounts)) > 0
        sizes = np.bincount(owner, minlength=len(accounts))
        starts = np.cumsum(sizes) - sizes
        for size in np.unique(sizes[doubtful]).tolist():
            members = np.flatnonzero(doubtful & (sizes == size))
            lanes = starts[members, None] + np.arange(size)
            self._unsound[accounts[members]] = self._correlations.unsound(self._listed[under[lanes]], sign[lanes])


_ACCOUNT_COLUMNS = (
    "version",
    "_mode",
    "_own_breach",
    "_open_call",
    "_unsound",
    "_alone_breached",
    "_owes",
    "_alone",
    "_equity",
    "_initial",
    "_maintenance",
)


@dataclass(frozen=True, eq=False)
class _Grouping:
    """Rows (m,) in groups, each from one that is `first` (m,) to the next."""

    first: Flags

    @computed
    def leads(self) -> Rows:
        """The first row of each group (g,)."""
        return np.flatnonzero(self.first)

    @computed
    def group(self) -> Rows:
        """Each row's group (m,)."""
        return np.cumsum(self.first) - 1

    @computed
    def _shared(self) -> tuple[Rows, Rows, Rows]:
        """The rows of groups of several rows, the first of each such group, and which of these groups each is of."""
        behind = ~self.first
        rows = np.flatnonzero(behind | np.append(behind[1:], False))
        first = self.first[rows]
        return rows, rows[first], np.cumsum(first) - 1

    def sums(self, values: Floats) -> Floats:
        """Return the sums (g,) of values (m,)."""
        return sums(self.group, values, len(self.leads))

    def netted(self, values: Floats) -> Floats:
        """Return the absolute sum of each group on its first row, 0 on its others (m,)."""
        net = np.abs(values)
        rows, leads, group = self._shared
        if len(rows):
            net[rows] = 0.0
            net[leads] = np.abs(sums(group, values[rows], len(leads)))
        return net


@dataclass(frozen=True, slots=True)
class _Picked:
    """Rows (m,) of a table, each with the place of its owner among `count`."""

    rows: Rows | slice
    owner: Rows
    count: int

    def sums(self, values: Floats) -> Floats:
        """Return the sums by owner (count,) of values (m,)."""
        return sums(self.owner, values, self.count)


def _indptr(table: Ragged) -> Rows:
    return np.concatenate([[0], np.cumsum(table.count)])


def _pick(table: Ragged, accounts: Rows) -> _Picked:
    """Return the rows of accounts (k,), sorted: a slice where they stand in a line."""
    count = len(accounts)
    if count and accounts[-1] - accounts[0] == count - 1 and table.in_order:
        start, last = table.start[accounts[0]], accounts[-1]
        rows = slice(start, table.start[last] + table.count[last])
        return _Picked(rows, table["owner"][rows] - accounts[0], count)
    return _Picked(*table.rows(accounts), count)


@dataclass(frozen=True, slots=True)
class _Placed:
    """Rows of whole books, by account: each its place among them, and the table's columns."""

    pool: tuple[Rows, dict[str, Column]]
    solo: tuple[Rows, dict[str, Column]]


def lay_out(given: PositionColumns, symbols: Rows, mode: NDArray[np.int8], board: Board) -> _Placed:
    """Return positions (n,) as rows of the tables, sorted by account and underlying; `symbols` index the board."""
    symbol = symbols[given.symbol]
    order = np.argsort(given.account * len(board.assets) + board.underlying[symbol], kind="stable")
    account, symbol, alone = given.account[order], symbol[order], given.isolated[order]
    key = account * len(board.assets) + board.underlying[symbol]
    rows: dict[str, Column] = {
        "symbol": symbol,
        "size": given.size[order],
        "entry_price": given.entry_price[order],
        "leverage": given.leverage[order],
        "quantity": given.size[order] * board.contract_size[symbol],
        "maintenance_rate": board.maintenance_rate[symbol],
    }
    # the widest of an underlying's markets in the book, isolated ones too
    price_range = _highest(board.price_range[symbol], _starts(key))
    pool, solo = ({name: values[kept] for name, values in rows.items()} for kept in (~alone, alone))
    account_of_pool = account[~alone]
    by_risk, by_position = (mode[account_of_pool] == which for which in (PORTFOLIO, ISOLATED))
    first = _starts(key[~alone]) | by_position
    rate = np.fmax(board.initial_rate[pool["symbol"]], 1.0 / pool["leverage"])
    pool |= {
        "initial_rate": np.where(by_risk, 0.0, _highest(rate, first)),
        "maintenance_rate": np.where(by_risk, 0.0, _highest(pool["maintenance_rate"], first)),
        "price_range": price_range[~alone],
        "first": first,
        "sign": np.full(len(first), _UNCHECKED),
    }
    return _Placed((account_of_pool, pool), (account[alone], solo | {"allocated": given.allocated[order][alone]}))


def _starts(key: Rows) -> Flags:
    """Return whether each key (m,) differs from the one before."""
    starts: Flags = np.diff(key, prepend=-1) != 0
    return starts


def _highest(values: Floats, first: Flags) -> Floats:
    """Return the highest value of each row's group (m,)."""
    if first.all():
        return values
    groups = _Grouping(first)
    return np.maximum.reduceat(values, groups.leads)[groups.group]
