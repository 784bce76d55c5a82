"""`python -m ops.grafana` writes the dashboards."""

from ops.grafana.build import write

write()
