"""What a margin call was of its own before it became one of the fleet's: that goes on when the fleet's has ended."""

from __future__ import annotations

from alembic import op

revision = "20261127_0920"
down_revision: str | None = "20261127_0910"

OWN = "(own_cause IS NULL) = (own_deadline_at IS NULL) AND own_cause IN ('utilization', 'maintenance', 'isolated')"


def upgrade() -> None:
    op.execute("ALTER TABLE margin_calls ADD COLUMN own_cause TEXT")
    op.execute("ALTER TABLE margin_calls ADD COLUMN own_deadline_at TIMESTAMP WITH TIME ZONE")
    op.execute(f"ALTER TABLE margin_calls ADD CONSTRAINT margin_calls_own_check CHECK ({OWN}) NOT VALID")
    op.execute("ALTER TABLE margin_calls VALIDATE CONSTRAINT margin_calls_own_check")
