"""Grafana's dashboards as code: `make dashboards` writes the JSON beside this that Grafana is provisioned with.

A capability adds a module with a `dashboard()` and its name to `build.DASHBOARDS`; its series come from
`app/services/figures`, its alerts stand in `ops/prometheus/rules.yml`.
"""
