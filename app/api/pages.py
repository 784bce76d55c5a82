"""What lists share: the size of a page, and cursors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import Query

from app.errors import InvalidError, invalid

PAGE_MAX = 200
NUMBER_MAX = 2**63 - 1

Limit = Annotated[int, Query(ge=1, le=PAGE_MAX, description="items a page")]
Cursor = Annotated[str, Query(max_length=64, pattern=r"^[ -~]*$", description="next_cursor of the page before")]


def number_cursor(cursor: str) -> int | None:
    """Return the number of a cursor, None for the first page. Raises InvalidError."""
    if not cursor:
        return None
    if not (cursor.isascii() and cursor.isdecimal() and int(cursor) <= NUMBER_MAX):
        raise invalid_cursor()
    return int(cursor)


def next_cursor(numbers: Sequence[int], limit: int) -> str | None:
    """Return the cursor after a page of items with these numbers, None where the page is not full."""
    return str(numbers[-1]) if len(numbers) == limit else None


def invalid_cursor() -> InvalidError:
    """Return the refusal of a cursor that this list never gave."""
    return invalid("/cursor", "invalid_cursor", "not a cursor of this list")
