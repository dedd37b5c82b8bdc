"""ops/metrics.md: the catalogue for people."""

from cluster.catalogue import MAX_EXPERT_SERIES, METRICS, Metric
from cluster.histogram import BOUNDS_S

_HEAD = f"""\
# Metrics

`GET /metrics` on the HTTP API's port covers the whole cluster, whichever engine answers: each engine asks the expert
router, which has heard of every worker within the last second and asks every engine. `metrics: false` switches all of
it off. Prompts, answers and anything else that a request brings along are never in a metric.

This page is made from `cluster/catalogue.py` by `python -m ops.observe`, as are the dashboards in `ops/grafana`, the
alert rules in `ops/prometheus` and the pages in `ops/runbooks`.

    make observe          # Prometheus on 127.0.0.1:9090, scraping the cluster that runs on this machine
    switchyard energy     # joules per token and tokens per kWh, by model and by worker

Ray's service discovery (`prom_metrics_service_discovery.json` in the session folder of a Ray with a dashboard) leads to
the same numbers: the router hands them to Ray's metrics agent every 10 s, as `ray_switchyard_...`; of histograms, sum
and count.

How many series there are: at most {MAX_EXPERT_SERIES} for the experts' load (where layers x experts are more,
neighbouring layers share a series and the label is a range), {len(BOUNDS_S) + 3} for each histogram of each worker or
engine, and a handful for each shard. Buckets are powers of two of nanoseconds, from {BOUNDS_S[0] * 1e6:.0f} us to
{BOUNDS_S[-1]:.0f} s. A dense model has no router: each engine shows itself.

"""
_VLLMS = """\
Everything that vLLM measures is passed on, with the engine's id as the label `engine`. Dashboards and alerts use these:

"""
_TABLE = "| name | kind | unit | labels | meaning |\n|---|---|---|---|---|\n"


def metrics_page() -> str:
    """The whole page."""
    ours = "\n".join(_row(metric) for metric in METRICS if metric.is_ours)
    vllm = "\n".join(_row(metric) for metric in METRICS if not metric.is_ours)
    return f"{_HEAD}## Ours\n\n{_TABLE}{ours}\n\n## vLLM's\n\n{_VLLMS}{_TABLE}{vllm}\n"


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind.value} | {metric.unit} | {labels} | {metric.help} |"
