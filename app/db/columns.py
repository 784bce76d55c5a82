"""Columns and checks as every table writes them."""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Column, DateTime, Numeric, Text


def check(name: str, rule: str) -> CheckConstraint:
    """Return a rule of a table under a name of its own."""
    return CheckConstraint(rule, name=name)


def moment(name: str, *, nullable: bool = False) -> Column[object]:
    """Return a column of moments, with their zone."""
    return Column(name, DateTime(timezone=True), nullable=nullable)


def number(name: str, *, nullable: bool = False) -> Column[object]:
    """Return a column of exact numbers: unconstrained, so that digits stay as posted."""
    return Column(name, Numeric, nullable=nullable)


def string(name: str) -> Column[str]:
    """Return a column of text that is never null."""
    return Column(name, Text, nullable=False)
