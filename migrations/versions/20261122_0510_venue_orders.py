"""Orders that wait for fills of a venue, and the requests that liquidations make of one."""

from __future__ import annotations

from alembic import op

revision = "20261122_0510"
down_revision: str | None = "20261122_0500"

MARGIN_CALLS = """
ALTER TABLE margin_calls ADD COLUMN attempts INTEGER DEFAULT 0 NOT NULL;
ALTER TABLE margin_calls ADD COLUMN respond_by TIMESTAMP WITH TIME ZONE;
ALTER TABLE margin_calls ADD CONSTRAINT margin_calls_attempts_check
    CHECK (attempts >= 0 AND (attempts = 0) = (respond_by IS NULL));
"""

ORDERS = """
ALTER TABLE orders ADD COLUMN margin_mode TEXT;
ALTER TABLE orders ADD COLUMN fees NUMERIC DEFAULT 0 NOT NULL;
ALTER TABLE orders ADD COLUMN margin_call_id TEXT;
ALTER TABLE orders ADD COLUMN closed_at TIMESTAMP WITH TIME ZONE;
UPDATE orders SET closed_at = created_at;
ALTER TABLE orders DROP CONSTRAINT orders_status_check;
ALTER TABLE orders ADD CONSTRAINT orders_status_check
    CHECK (status IN ('pending', 'partially_filled', 'filled', 'cancelled'));
ALTER TABLE orders ADD CONSTRAINT orders_filled_check
    CHECK ((status = 'filled') = (filled_size = size)
        AND (status <> 'pending' OR filled_size = 0) AND (status <> 'partially_filled' OR filled_size > 0));
ALTER TABLE orders ADD CONSTRAINT orders_closed_check
    CHECK ((status IN ('filled', 'cancelled')) = (closed_at IS NOT NULL));
ALTER TABLE orders ADD CONSTRAINT orders_fees_check CHECK (fees >= 0 AND fees < 1e15);
ALTER TABLE orders ADD CONSTRAINT orders_margin_mode_check CHECK (margin_mode IN ('pooled', 'isolated'));
ALTER TABLE orders ADD CONSTRAINT orders_margin_call_id_fkey
    FOREIGN KEY(margin_call_id) REFERENCES margin_calls (id);
CREATE INDEX orders_pending_idx ON orders (agent_id, seq) WHERE status IN ('pending', 'partially_filled');
"""

ORDER_FILLS = """
CREATE TABLE order_fills (
    order_id TEXT NOT NULL,
    fill_id TEXT NOT NULL,
    size NUMERIC NOT NULL,
    price NUMERIC NOT NULL,
    fee NUMERIC NOT NULL,
    realized_pnl NUMERIC NOT NULL,
    position_id TEXT,
    filled_size NUMERIC NOT NULL,
    status TEXT NOT NULL,
    recorded_at TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT order_fills_pkey PRIMARY KEY (order_id, fill_id),
    CONSTRAINT order_fills_fill_id_check CHECK (length(fill_id) BETWEEN 1 AND 100),
    CONSTRAINT order_fills_size_check CHECK (size > 0 AND size <= filled_size AND filled_size < 1e15),
    CONSTRAINT order_fills_price_check CHECK (price > 0 AND price < 1e15),
    CONSTRAINT order_fills_fee_check CHECK (fee >= 0 AND fee < 1e15),
    CONSTRAINT order_fills_status_check CHECK (status IN ('partially_filled', 'filled', 'cancelled')),
    CONSTRAINT order_fills_order_id_fkey FOREIGN KEY(order_id) REFERENCES orders (id),
    CONSTRAINT order_fills_position_id_fkey FOREIGN KEY(position_id) REFERENCES positions (id)
);
"""


def upgrade() -> None:
    for statement in (MARGIN_CALLS + ORDERS + ORDER_FILLS).split(";\n"):
        if statement.strip():
            op.execute(statement)
