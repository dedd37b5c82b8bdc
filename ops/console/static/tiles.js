// One replica, engine or spare each, and the panel that tells more about a replica.
import { ActionButtons } from "/ops/actions.js";
import { bytes, number, rate, seconds, shortName } from "/ops/format.js";
import { html, Component } from "/ops/html.js";

// A sign beside the colour, for those who cannot tell colours apart.
const SIGNS = {
  online: "●", ready: "●", serving: "●", joining: "○", starting: "○", adopting: "◑", draining: "◐",
  stalled: "◐", released: "◐", gone: "✕",
};
const LEVELS = { online: "good", ready: "good", serving: "warn", draining: "warn", stalled: "warn", gone: "bad" };

function State({ state }) {
  return html`<span class=${`state ${LEVELS[state] ?? ""}`}>
    <i aria-hidden="true">${SIGNS[state] ?? "○"}</i> ${state}</span>`;
}

// Drawn again only when something that it shows has changed: there may be hundreds.
export class ReplicaTile extends Component {
  shouldComponentUpdate({ replica: now, busiest }) {
    const { replica } = this.props;
    return (
      now.state !== replica.state || now.load.tokens_per_s !== replica.load.tokens_per_s ||
      now.load.waiting !== replica.load.waiting || busiest !== this.props.busiest
    );
  }

  render({ replica, busiest, choose }) {
    const { id, state, role, load } = replica;
    const speed = load.tokens_per_s ?? 0;
    return html`<button class=${`tile ${LEVELS[state] ?? ""}`} data-worker=${id} data-state=${state}
      onClick=${() => choose(id)}
      aria-label=${`${role} ${id}, ${state}, ${rate(speed)} tokens per second. Details`}>
      <span class="name">${shortName(id)}${role !== "primary" && html` <em>${role}</em>`}</span>
      <${State} state=${state} />
      <span class="load"><i style=${{ width: `${(100 * speed) / busiest}%` }}></i></span>
      <span class="sub">${rate(speed)} tok/s${load.waiting > 0 && ` · ${number(load.waiting)} waiting`}</span>
    </button>`;
  }
}

export function PendingTile({ id, stage }) {
  return html`<div class="tile pending" role="status">
    <span class="name">${id.startsWith("missing") ? "…" : shortName(id)}</span>
    <span class="state"><i aria-hidden="true">○</i> starting</span>
    <span class="load busy"></span>
    <span class="sub">${stage}</span>
  </div>`;
}

export function EngineTile({ engine }) {
  const { id, state, load, age_s } = engine;
  return html`<div class=${`tile ${LEVELS[state] ?? ""}`}>
    <span class="name">${shortName(id)}</span><${State} state=${state} />
    <span class="load" title="KV cache in use"><i style=${{ width: `${100 * (load.kv_cache_used ?? 0)}%` }}></i></span>
    <span class="sub">${number(load.running ?? 0)} running · ${number(load.waiting ?? 0)} waiting ·
      KV ${number(100 * (load.kv_cache_used ?? 0))}% · up ${seconds(age_s)}</span>
  </div>`;
}

export function SpareTile({ spare }) {
  return html`<div class="tile">
    <span class="name">${shortName(spare.id)}</span><${State} state=${spare.state} />
    <span class="sub">${spare.shard === null ? "holds no experts" : `shard ${spare.shard}`}</span>
  </div>`;
}

export class Details extends Component {
  componentDidMount() {
    this.dialog.showModal();
  }

  render({ replica, id, nodes, can, ask, close }) {
    const node = nodes.find((each) => each.id === replica?.node);
    const facts = replica && [
      ["Role", replica.role], ["Device", replica.device || "–"],
      ["Node", node ? `${node.name} (${node.address})` : replica.node], ["Process", replica.pid],
      ["Experts take", bytes(replica.memory_bytes)], ["In service", seconds(replica.age_s)],
      ["Tokens per second", rate(replica.load.tokens_per_s)], ["Tokens in all", number(replica.load.tokens)],
      ["Messages in all", number(replica.load.messages)], ["Messages waiting", number(replica.load.waiting)],
    ];
    const act = (asking) => {
      this.dialog.close();
      ask(asking);
    };
    return html`<dialog ref=${(each) => (this.dialog = each)} onClose=${close} aria-labelledby="details-title"
      class="details">
      <h2 id="details-title">${id}</h2>
      ${replica
        ? html`<p><${State} state=${replica.state} /></p>
          <dl class="facts">${facts.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd>
            </div>`)}</dl>`
        : html`<p role="status">It has left.</p>`}
      <footer>
        <button onClick=${() => this.dialog.close()}>Close</button>
        ${replica?.state === "online" && replica.role === "primary" &&
          html`<${ActionButtons} can=${can} ask=${act} target=${{ kind: "worker", id }} />`}
      </footer>
    </dialog>`;
  }
}
