"""What is made from the catalogue: committed as made, accepted by promtool, and naming only what the catalogue has."""

import json
import shutil
import subprocess

import pytest
import yaml

from cluster.catalogue import BY_NAME, METRICS, Kind
from ops.observe.__main__ import ROOT, RULES, files
from ops.observe.alerts import ALERTS
from ops.observe.dashboards import DASHBOARDS, to_grafana
from ops.observe.prometheus import config
from ops.observe.query import gauge, rate, unknown_series

PROMTOOL_TESTS = {
    "rule_files": [str(ROOT / RULES)],
    "evaluation_interval": "5s",
    "tests": [
        {
            "interval": "5s",
            "input_series": [{"series": "switchyard_shards_missing", "values": "0x3 1x20"}],
            "alert_rule_test": [
                {"eval_time": "10s", "alertname": "SwitchyardShardMissing", "exp_alerts": []},
                {
                    "eval_time": "60s",
                    "alertname": "SwitchyardShardMissing",
                    "exp_alerts": [{"exp_labels": {"severity": "critical"}}],
                },
            ],
        },
        {
            "interval": "1m",
            "input_series": [
                {"series": 'switchyard_replicas_wanted{shard="3"}', "values": "2x20"},
                {"series": 'switchyard_replicas{shard="3", state="online"}', "values": "1x20"},
                {"series": 'switchyard_replicas_wanted{shard="4"}', "values": "2x20"},
                {"series": 'switchyard_replicas{shard="4", state="online"}', "values": "2x20"},
                {"series": 'switchyard_retries_total{reason="lost"}', "values": "0+10x20"},
                {"series": 'switchyard_retries_total{reason="failed"}', "values": "0x20"},
                {"series": "switchyard_messages_total", "values": "0+100x20"},
                {"series": 'switchyard_engine_epoch{engine="old"}', "values": "5x20"},
                {"series": 'switchyard_engine_epoch{engine="new"}', "values": "6x20"},
                {"series": "switchyard_routing_epoch", "values": "6x20"},
            ],
            "alert_rule_test": [
                {
                    "eval_time": "15m",
                    "alertname": "SwitchyardReplicasTooFew",
                    "exp_alerts": [{"exp_labels": {"severity": "warning", "shard": "3"}}],
                },
                {
                    "eval_time": "15m",
                    "alertname": "SwitchyardRetries",
                    "exp_alerts": [{"exp_labels": {"severity": "warning", "reason": "lost"}}],
                },
                {
                    "eval_time": "15m",
                    "alertname": "SwitchyardTableOutdated",
                    "exp_alerts": [{"exp_labels": {"severity": "warning", "engine": "old"}}],
                },
            ],
        },
    ],
}


def promtool(*words: str) -> str:
    program = shutil.which("promtool")
    assert program, "promtool is missing; install it (on Debian and Ubuntu: apt install prometheus)"
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("path", "content"), [pytest.param(*file, id=file[0]) for file in files()])
def test_what_is_committed_is_what_is_made(path, content):
    assert (ROOT / path).read_text(encoding="utf-8") == content, "run `python -m ops.observe` and commit"


def test_no_page_is_left_of_an_alert_that_is_gone():
    made = {path for path, _ in files()}
    for folder in ("ops/runbooks", "ops/grafana", "ops/prometheus"):
        assert {str(path.relative_to(ROOT)) for path in (ROOT / folder).iterdir()} <= made


def test_promtool_accepts_the_rules_and_the_configuration(tmp_path):
    assert f"{len(ALERTS)} rules found" in promtool("check", "rules", str(ROOT / RULES))
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump(config("127.0.0.1:8000")))
    promtool("check", "config", str(file))


def test_alerts_fire_when_they_should(tmp_path):
    """With their annotations left out of what is expected, promtool wants them: they are filled in from the rules."""
    for group in PROMTOOL_TESTS["tests"]:
        for rule in group["alert_rule_test"]:
            for expected in rule["exp_alerts"]:
                expected["exp_annotations"] = annotations_of(rule["alertname"], expected["exp_labels"])
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump(PROMTOOL_TESTS))
    promtool("test", "rules", str(file))


def annotations_of(name: str, labels: dict[str, str]) -> dict[str, str]:
    (group,) = yaml.safe_load((ROOT / RULES).read_text())["groups"]
    texts = dict(next(rule for rule in group["rules"] if rule["alert"] == name)["annotations"])
    for label, value in labels.items():
        texts["summary"] = texts["summary"].replace(f"{{{{ $labels.{label} }}}}", value)
    return texts


def test_queries_name_only_what_the_catalogue_has():
    for alert in ALERTS:
        assert not unknown_series(alert.expr), alert.name
    for dashboard in DASHBOARDS:
        assert not unknown_series(json.dumps(to_grafana(dashboard))), dashboard.uid
    assert unknown_series("rate(switchyard_no_such_thing[5m])") == {"switchyard_no_such_thing"}


def test_a_query_that_the_catalogue_contradicts_is_refused():
    with pytest.raises(KeyError):
        rate("switchyard_no_such_thing")
    with pytest.raises(ValueError, match="is a gauge"):
        rate("switchyard_replicas")
    with pytest.raises(ValueError, match="by"):
        gauge("switchyard_replicas", "engine")


def test_the_catalogue_follows_prometheus_naming():
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        assert metric.help.endswith("."), metric.name
        if metric.is_ours:
            assert metric.name.startswith("switchyard_")
            assert metric.unit != "seconds" or "seconds" in metric.name
