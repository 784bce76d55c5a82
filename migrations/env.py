"""Run by alembic for `app.db.migrate.upgrade`, whose connection holds the lock and sets lock_timeout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alembic import context

if TYPE_CHECKING:
    from sqlalchemy import Connection

connection: Connection = context.config.attributes["connection"]
context.configure(connection=connection, transaction_per_migration=True)

with context.begin_transaction():
    context.run_migrations()
