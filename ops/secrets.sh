#!/bin/sh
# Make the secrets of docker-compose.yml, those that are not there yet, for `docker compose` to mount as files.
set -eu
place=${1:-secrets}
umask 077
mkdir -p "$place"

make_secret() { # name: 32 random bytes in hexadecimal
    [ -s "$place/$1" ] || head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$place/$1"
}

for name in postgres_password primerisk_admin_key grafana_admin_password grafana_database_password; do
    make_secret "$name"
done
if [ ! -s "$place/primerisk_database_url" ]; then
    printf 'postgresql://primerisk:%s@postgres:5432/primerisk' "$(cat "$place/postgres_password")" \
        >"$place/primerisk_database_url"
fi
# Compose mounts the files themselves, with their modes, for users of the containers to read; on this machine the
# directory keeps everybody else out.
chmod 0444 "$place"/*
chmod 0700 "$place"
