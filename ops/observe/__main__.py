"""`python -m ops.observe`: write everything that is made from the catalogue."""

import json
from collections.abc import Iterator
from pathlib import Path

import yaml

from ops.observe.alerts import ALERTS, RUNBOOK_FOLDER, rules, runbook
from ops.observe.dashboards import DASHBOARDS, to_grafana
from ops.observe.documents import metrics_page

ROOT = Path(__file__).resolve().parents[2]
RULES = "ops/prometheus/alerts.yml"
_MADE = "# Made by `python -m ops.observe` from ops/observe/alerts.py.\n"


def files() -> Iterator[tuple[str, str]]:
    """(path in the repository, content) of every file."""
    yield "ops/metrics.md", metrics_page()
    yield RULES, _MADE + yaml.safe_dump(rules(), sort_keys=False, width=1000)
    for dashboard in DASHBOARDS:
        yield f"ops/grafana/{dashboard.uid}.json", json.dumps(to_grafana(dashboard), indent=1) + "\n"
    for alert in ALERTS:
        yield f"{RUNBOOK_FOLDER}/{alert.name}.md", runbook(alert)


def main() -> None:
    for path, content in files():
        file = ROOT / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
