#!/bin/sh
# Run once, when the database is made: the role that Grafana reads with. It is granted the views after the migrations.
set -eu
psql --set=ON_ERROR_STOP=1 --set=password="$(cat /run/secrets/grafana_database_password)" \
    --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
CREATE ROLE primerisk_reader LOGIN PASSWORD :'password' CONNECTION LIMIT 10;
ALTER ROLE primerisk_reader SET default_transaction_read_only = on;
ALTER ROLE primerisk_reader SET statement_timeout = '5s';
SQL
