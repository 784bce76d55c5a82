"""What is deployed, checked as far as that goes without a container engine: by linters and schemas of its makers."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.cli import read_settings
from tests import prometheus

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())  # anchors and merges resolved
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("migrate", "api", "worker")


def _run(*command: str, **given: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=60, **given)


def _tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def test_hadolint_has_nothing_to_say_of_the_dockerfile() -> None:
    done = _run(_tool("hadolint"), "Dockerfile")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_image_is_made_of_the_hashed_lock_and_runs_as_nobody() -> None:
    stages = (ROOT / "Dockerfile").read_text().split("\nFROM ")
    assert len(stages) == 3, "a stage to build, and one to run"
    assert "--require-hashes -r requirements.lock" in stages[1]
    assert "pip install --no-deps" in stages[1], "and nothing else"
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", stages[2], re.MULTILINE)
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.*)$", stages[1], re.MULTILINE) for name in line.split()[:-1]
    }
    assert copied == set(kept)


def test_the_compose_file_is_valid() -> None:
    done = _run(_tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    shutil.which("docker") is None or _run("docker", "compose", "version").returncode != 0,
    reason="no docker compose here",
)
def test_docker_compose_itself_can_read_it(tmp_path: Path) -> None:
    done = _run("docker", "compose", "config", "--quiet")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined_bounded_and_watched(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service
    assert {"cpus", "memory", "pids"} <= service["deploy"]["resources"]["limits"].keys()
    assert re.search(r":v?\d+\.\d+(\.\d+)?(-[a-z]+)?$", service["image"]), "pinned"
    assert name == "migrate" or {"test", "interval", "timeout", "retries"} <= service["healthcheck"].keys()


def test_what_services_name_is_there() -> None:
    for service in SERVICES.values():
        assert set(service.get("secrets", ())) <= COMPOSE["secrets"].keys()
        assert set(service["networks"]) <= COMPOSE["networks"].keys()
        assert set(service.get("depends_on", ())) <= SERVICES.keys()
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume


def test_secrets_are_files_and_stand_in_no_environment() -> None:
    assert all(secret.keys() == {"file"} for secret in COMPOSE["secrets"].values())
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            hidden = re.search(r"password|secret|key|token|url", variable, re.IGNORECASE)
            assert not hidden or value.startswith("/run/secrets"), (name, variable)


def test_nothing_is_published_but_on_loopback() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    assert "outside" not in SERVICES["postgres"]["networks"] + SERVICES["api"]["networks"]


def test_the_secrets_are_made_once(tmp_path: Path) -> None:
    place = tmp_path / "secrets"
    for _ in range(2):
        assert _run("sh", "ops/secrets.sh", str(place)).returncode == 0
        made = {path.name: path.read_text() for path in place.iterdir()}
        assert made.keys() == COMPOSE["secrets"].keys()
    assert {path.name: path.read_text() for path in place.iterdir()} == made, "kept"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert len(set(made.values())) == len(made)
    assert all(len(value) >= 64 for value in made.values())
    assert made["postgres_password"] in made["primerisk_database_url"]


def test_settings_come_from_files_of_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "primerisk_admin_key").write_text("a key that came in a file\n")
    (tmp_path / "primerisk_database_url").write_text("postgresql://someone:hidden@postgres/primerisk")
    monkeypatch.setenv("PRIMERISK_SECRETS_DIR", str(tmp_path))
    found = read_settings()
    assert found.admin_key is not None
    assert found.admin_key.get_secret_value() == "a key that came in a file"
    assert found.database_url is not None
    assert "hidden" in found.database_url.get_secret_value()
    shown = _run(_tool("primerisk"), "settings", env={**os.environ, "PRIMERISK_SECRETS_DIR": str(tmp_path)})
    assert shown.returncode == 0, shown.stderr
    assert "hidden" not in shown.stdout
    assert "came in a file" not in shown.stdout


def test_the_proxy_bounds_what_a_stranger_may_take() -> None:
    config = (ROOT / "ops/proxy/nginx.conf").read_text()
    for limit in ("client_header_timeout", "client_body_timeout", "client_max_body_size", "limit_conn "):
        assert limit in config
    assert "location ~ ^/(metrics|readyz)" in config, "what is the operator's stays inside"
    assert config.count("{") == config.count("}")


@prometheus.needed
def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    config = (ROOT / "ops/prometheus/prometheus.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(config.replace("/etc/prometheus/rules.yml", str(prometheus.RULES)))
    done = _run("promtool", "check", "config", str(tmp_path / "prometheus.yml"))
    assert done.returncode == 0, done.stdout + done.stderr
    ports = {job["job_name"]: job["dns_sd_configs"][0] for job in yaml.safe_load(config)["scrape_configs"]}
    assert {of["names"][0] for of in ports.values()} <= SERVICES.keys()
    assert str(ports["primerisk-worker"]["port"]) == SERVICES["worker"]["environment"]["PRIMERISK_WORKER_METRICS_PORT"]
