"""``switchyard observe``."""

import argparse
import os
import shutil
import subprocess
import tempfile
import urllib.parse
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError
from ops.runs import find_run

DESCRIPTION = """\
Start Prometheus against the cluster that runs on this machine. Ctrl-C stops it and removes what it has stored.

  switchyard observe                      http://127.0.0.1:9090
  switchyard observe --listen 9191 --keep /var/tmp/switchyard-metrics

It scrapes /metrics every 5 s and evaluates the alert rules of ops/prometheus. ops/grafana has dashboards to import.
"""

RULES = Path(__file__).resolve().parents[1] / "prometheus" / "alerts.yml"
SCRAPE_EVERY = "5s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, help="port of the cluster's HTTP API, where several run on this machine")
    parser.add_argument("--listen", type=int, default=9090, metavar="PORT", help="Prometheus' own port (default 9090)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="store series there, and keep them")


def run(arguments: argparse.Namespace) -> int:
    """Prometheus' exit status. Raises ConfigError where it is not installed or no cluster runs."""
    program = shutil.which("prometheus")
    if program is None:
        raise ConfigError("prometheus is not installed (on Debian and Ubuntu: apt install prometheus).")
    target = urllib.parse.urlsplit(find_run(arguments.port).http).netloc
    with tempfile.TemporaryDirectory(prefix="switchyard-prometheus-") as folder:
        file = Path(folder, "prometheus.yml")
        file.write_text(yaml.safe_dump(config(target), sort_keys=False), encoding="utf-8")
        storage = arguments.keep or Path(folder, "data")
        print(f"Prometheus on http://127.0.0.1:{arguments.listen}, scraping {target}", flush=True)
        command = [program, f"--config.file={file}", f"--storage.tsdb.path={storage}", "--log.level=warn"]
        try:
            return subprocess.run(
                [*command, f"--web.listen-address=127.0.0.1:{arguments.listen}"], check=False
            ).returncode
        except KeyboardInterrupt:
            return 0


def config(target: str) -> dict[str, Any]:
    """A Prometheus configuration that scrapes `target`, host:port, and knows the alerts."""
    return {
        "global": {"scrape_interval": SCRAPE_EVERY, "evaluation_interval": SCRAPE_EVERY},
        "rule_files": [os.fspath(RULES)],
        "scrape_configs": [{"job_name": "switchyard", "static_configs": [{"targets": [target]}]}],
    }
