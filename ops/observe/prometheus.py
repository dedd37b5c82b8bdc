"""``switchyard observe``."""

import argparse
import os
import shutil
import signal
import subprocess
import tempfile
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError
from ops.runs import find_run

DESCRIPTION = """\
Start Prometheus against the cluster that runs on this machine. Ctrl-C stops it and removes what it has stored.

  switchyard observe                      http://127.0.0.1:9090
  switchyard observe --listen 9191 --keep /var/tmp/switchyard-metrics

It scrapes /metrics every 15 s and evaluates the alert rules of ops/prometheus. ops/grafana has dashboards to import.
"""

RULES = Path(__file__).resolve().parents[1] / "prometheus" / "alerts.yml"
SCRAPE_EVERY_S = 15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, help="port of the cluster's HTTP API, where several run on this machine")
    parser.add_argument("--listen", type=int, default=9090, metavar="PORT", help="Prometheus' own port (default 9090)")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="file with an API key, where the cluster asks")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="store series there, and keep them")


def run(arguments: argparse.Namespace) -> int:
    """Prometheus' exit status. Raises ConfigError where it is not installed or no cluster runs."""
    program = shutil.which("prometheus")
    if program is None:
        raise ConfigError("prometheus is not installed (on Debian and Ubuntu: apt install prometheus).")
    url = find_run(arguments.port).http
    with tempfile.TemporaryDirectory(prefix="switchyard-prometheus-") as folder:
        file = Path(folder, "prometheus.yml")
        file.write_text(yaml.safe_dump(config(url, arguments.key_file), sort_keys=False), encoding="utf-8")
        storage = arguments.keep or Path(folder, "data")
        print(f"Prometheus on http://127.0.0.1:{arguments.listen}, scraping {url}", flush=True)
        command = [program, f"--config.file={file}", f"--storage.tsdb.path={storage}", "--log.level=warn"]
        return _run([*command, f"--web.listen-address=127.0.0.1:{arguments.listen}"])


def _run(command: Sequence[str]) -> int:
    """Until it ends by itself, or Ctrl-C or SIGTERM end it in good order."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return 0


def config(url: str, key_file: Path | None = None) -> dict[str, Any]:
    """A Prometheus configuration that scrapes the HTTP API at `url`, with the key in the file, and knows the alerts."""
    address = urllib.parse.urlsplit(url)
    job: dict[str, Any] = {"job_name": "switchyard", "scheme": address.scheme}
    if key_file is not None:
        job["authorization"] = {"credentials_file": os.fspath(key_file.resolve())}
    return {
        "global": {"scrape_interval": f"{SCRAPE_EVERY_S}s", "evaluation_interval": f"{SCRAPE_EVERY_S}s"},
        "rule_files": [os.fspath(RULES)],
        "scrape_configs": [{**job, "static_configs": [{"targets": [address.netloc]}]}],
    }
