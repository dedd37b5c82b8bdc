// Latency and throughput of the last quarter of an hour.
import { Chart } from "/ops/charts.js";
import { number, rate, seconds } from "/ops/format.js";
import { html } from "/ops/html.js";

const LATENCY = (name) => [{ key: `${name}_p50_s`, name: "median" }, { key: `${name}_p99_s`, name: "99th percentile" }];
const CHARTS = [
  { title: "Tokens per second", show: rate,
    series: [{ key: "generated_per_s", name: "generated" }, { key: "prompt_per_s", name: "prompt" }] },
  { title: "Requests in flight", show: (value) => number(value, 1),
    series: [{ key: "running", name: "running" }, { key: "waiting", name: "waiting" }] },
  { title: "Time to first token", show: seconds, series: LATENCY("first_token") },
  { title: "Time between tokens", show: seconds, series: LATENCY("inter_token") },
  { title: "Workers online", show: (value) => number(value, 1), series: [{ key: "workers", name: "workers" }] },
  { title: "KV cache in use", show: (value) => `${number(value * 100, 1)}%`,
    series: [{ key: "kv_cache_used", name: "fullest engine" }] },
];

export function PerformancePage({ view }) {
  return html`<section aria-labelledby="performance-title">
    <h2 id="performance-title">Performance</h2>
    <p class="sub">Counted over 8 seconds each, up to 15 minutes back. Percentiles are as fine as vLLM's histogram
      buckets; a gap means that no request finished a token. Arrow keys move the cursor.</p>
    <div class="charts">${CHARTS.map((each) => html`<${Chart} key=${each.title} ...${each}
      samples=${view.samples} />`)}</div>
  </section>`;
}
