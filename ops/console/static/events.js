// What failed, what was done about it, and how long that took; actions among it; every single event on request.
import { clock, seconds } from "/ops/format.js";
import { html, Component } from "/ops/html.js";

const SHOWN = 300;
const BAD = ["worker_lost", "shard_missing", "engine_lost", "worker_refused", "spare_lost", "stall_began"];
const WARN = [
  "worker_suspected", "worker_blamed", "engine_blamed", "blame_ignored", "worker_draining", "scaled", "drain", "restart",
];

export class EventsPage extends Component {
  constructor() {
    super();
    this.state = { find: "" };
  }

  render({ view }, { find }) {
    const stories = [...view.incidents, ...view.actions.map(story)].sort((a, b) => b.begin_s - a.begin_s);
    const wanted = find.trim().toLowerCase();
    const found = view.events.filter((e) => `${e.kind} ${e.subject} ${e.text}`.toLowerCase().includes(wanted));
    const events = found.slice(-SHOWN).reverse();
    const longest = Math.max(1, ...stories.map((each) => (each.end_s ?? view.time_s) - each.begin_s));
    return html`<section aria-labelledby="stories-title">
      <h2 id="stories-title">What happened, and how long it took</h2>
      ${!stories.length && html`<p class="empty">Nothing has failed, and nobody has asked for anything.</p>`}
      <ol class="rail" id="stories">${stories.map((each) => html`
        <${Story} key=${each.begin_s + each.title + each.subject} story=${each} now=${view.time_s}
          longest=${longest} />`)}</ol>
    </section>
    <section aria-labelledby="events-title">
      <div class="bar"><h2 id="events-title">Every event</h2>
        <input type="search" placeholder="Find" aria-label="Find an event" value=${find}
          onInput=${(e) => this.setState({ find: e.target.value })} /></div>
      <div class="card scroll"><table class="events"><thead><tr><th>Time</th><th>What</th><th>Whom</th><th>Words</th>
        </tr></thead>
        <tbody>${events.map((e) => html`<tr key=${e.time_s + e.kind + e.subject}><td>${clock(e.time_s)}</td>
          <td><span class=${`kind ${level(e.kind)}`}>${e.kind.replaceAll("_", " ")}</span></td>
            <td class="mono">${e.subject}</td><td>${e.text}</td></tr>`)}
        </tbody></table></div>
    </section>`;
  }
}

function level(kind) {
  return BAD.includes(kind) ? "bad" : WARN.includes(kind) ? "warn" : "good";
}

function story(action) {
  const words = action.words[action.words.length - 1];
  return {
    title: `Asked for, ${action.asked_by}: ${action.name}`,
    severity: action.error ? "bad" : "info",
    subject: Object.entries(action.body).map(([key, value]) => `${key} ${[value].flat().join(" ")}`).join(", "),
    why: action.error,
    begin_s: action.begin_s,
    end_s: action.end_s,
    done: action.error ? "failed" : words,
  };
}

function Story({ story: { title, severity, subject, why, begin_s, end_s, done }, now, longest }) {
  const took = (end_s ?? now) - begin_s;
  return html`<li class=${`card ${end_s === null ? "open" : "closed"} ${severity}`}>
    <time>${clock(begin_s)}</time>
    <div><h3>${title}</h3><p class="mono">${subject}</p>
      ${why && html`<p>${why}</p>`}
      ${done && html`<p class="done"><span aria-hidden="true">→ </span>${done}</p>`}</div>
    <div class="took"><b>${end_s === null ? `for ${seconds(took)}` : seconds(took)}</b>
      <span class="load"><i style=${{ width: `${Math.max(2, (100 * took) / longest)}%` }}></i></span></div>
  </li>`;
}
