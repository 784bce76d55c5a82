"""The page itself: whole, accessible, harmless, the same every time, and readable however large the book."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from tests.domain.book import PRICES, book, linear, option
from tests.report.pages import Page, amount, closes, paged

PAIR = book(linear("BTC-PERP", "long", 0.5), linear("ETH-PERP", "short", 9), held={"USDC": 20_000, "BTC": 0.1})
OPTIONS = book(
    option("BTC", "call", "short", 1, 70_000, 40, 0.5), linear("BTC-PERP", "long", 0.3), held={"USDC": 60_000}
)
EMPTY = book(held={"USDC": 1_000})
DROWNED = book(linear("BTC-PERP", "long", 1, entry_price=90_000), held={"USDC": 1_000})
BOOKS = {"pair": PAIR, "options": OPTIONS, "empty": EMPTY, "drowned": DROWNED, "nothing": book()}
HISTORIES = {"alone": None, "history": closes("BTC", "ETH")}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "--></svg><b>",
    "]]>&amp;",
    "$\\frac{1}{0}$",
    "a\u202eb\x00c\nd",
    "漢字\U0001f600",
    "#000100 id='x' url(#y) var(--ink)",
    "x" * 200,
)


@cache
def drawn(name: str, history: str) -> str:
    """Return the page of a book, drawn once for all who look at it."""
    return paged(BOOKS[name], HISTORIES[history])


@pytest.mark.parametrize("name", BOOKS)
@pytest.mark.parametrize("history", HISTORIES)
def test_every_page_is_whole_and_every_picture_is_said_in_words(name: str, history: str) -> None:
    text = drawn(name, history)
    page = Page(text)
    assert page.tags.isdisjoint({"script", "img", "link", "iframe", "object", "embed", "form", "base"})
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []
    for _, attribute, value in page.attributes:
        if attribute == "aria-labelledby":
            assert set(value.split()) <= set(page.ids)
        if attribute in ("href", "xlink:href"):
            assert value.startswith("#")
            assert value[1:] in page.ids
        assert not attribute.startswith("on")
    for reference in re.findall(r"url\(([^)]*)\)", text):
        assert reference.removeprefix("#") in page.ids
    assert page.pictures
    for picture in page.pictures:
        assert len(picture.labelled_by) == 2
        assert picture.title
        assert len(picture.description) > 20
        assert picture.texts


@pytest.mark.parametrize("name", BOOKS)
def test_nothing_is_loaded_from_elsewhere(name: str) -> None:
    text = drawn(name, "history")
    assert set(re.findall(r"\b[a-z]+://[^\"'\s<)]*", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert len(re.findall("://", text)) == len(re.findall(r'xmlns(?::xlink)?="http://www\.w3\.org/', text))
    assert "@import" not in text
    assert "javascript:" not in text
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src &#x27;none&#x27;")
    assert "script-src" not in policy[1]


def test_hostile_names_are_text() -> None:
    rows = [linear(name, "long", 1, underlying=f"{name}u", mark_price=100.0) for name in HOSTILE]
    prices = PRICES | {f"{name}u": 100.0 for name in HOSTILE} | dict.fromkeys(HOSTILE, 2.0)
    odd = replace(book(*rows, held={"USDC": 10_000, HOSTILE[0]: 3.0}), prices=prices)
    page = Page(paged(odd, closes("BTC", HOSTILE[1] + "u"), title=HOSTILE[0] + HOSTILE[1]))
    assert page.tags.isdisjoint({"script", "img", "b"})
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    shown = {row["position"] for row in page.table("Component VaR by position")}
    names = {*HOSTILE, f"{HOSTILE[0]} held"}
    assert shown == {"".join(c if c.isprintable() else "\ufffd" for c in name) for name in names}
    assert {row["asset"] for row in page.table("What backs it")} == {"USDC", HOSTILE[0]}
    assert not [text for picture in page.pictures for text in picture.texts if "<" in text or "$" in text]


def test_the_same_figures_give_the_same_bytes_and_another_seed_others() -> None:
    for one in (PAIR, OPTIONS):
        assert paged(one) == paged(one)
    assert paged(PAIR, seed=1) != paged(PAIR, seed=2)
    history = closes("BTC", "ETH")
    assert paged(PAIR, history) == paged(PAIR, history)


def test_a_thousand_positions_are_twenty_and_the_others() -> None:
    names = [f"A{k:03d}" for k in range(100)]
    rows = [linear(f"{names[k % 100]}-{k // 100}", "long" if k % 3 else "short", 1 + k % 7) for k in range(1_000)]
    large = replace(book(*rows, held={"USDC": 1e6}), prices=PRICES | dict.fromkeys(names, 50.0))
    text = paged(large)
    page = Page(text)
    assert len(text) < 600_000
    parts = page.table("Component VaR by position")
    assert len(parts) == 21
    assert parts[-1]["position"] == "980 others"
    whole = amount(page.table("Value at risk")[-1]["VaR"])
    assert sum(amount(row["VaR 99%"]) for row in parts) == pytest.approx(whole, abs=0.2)
    assert len(page.table("The positions that are nearest")) <= 20
    scenario = page.table("Profit and loss by scenario")[0]
    columns = [amount(value) for name, value in scenario.items() if name not in ("scenario", "set", "total")]
    assert len(columns) == 8
    assert sum(columns) == pytest.approx(amount(scenario["total"]), abs=0.05)
    assert max(len(rows) for rows in page.tables.values()) <= 41


def test_an_account_under_water_is_said_to_be() -> None:
    page = Page(drawn("drowned", "alone"))
    words = " ".join(page.text)
    assert "LIQUIDATION" in words
    assert "undefined" in words
    assert "there already" in words


def test_a_book_without_positions_has_no_risk() -> None:
    page = Page(paged(EMPTY, closes("BTC")))
    assert [caption for caption in page.tables if caption.startswith("Value at risk")] == []
    assert "there are no open positions" in " ".join(page.text)
