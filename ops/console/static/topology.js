// Who holds what, where, and how busy it is.
import { ActionButtons } from "/ops/actions.js";
import { Sparkline } from "/ops/charts.js";
import { number, plural, ranges, rate, seconds } from "/ops/format.js";
import { onlineIn, totals } from "/ops/health.js";
import { html, Component } from "/ops/html.js";
import { Details, EngineTile, PendingTile, ReplicaTile, SpareTile } from "/ops/tiles.js";

export class TopologyPage extends Component {
  constructor() {
    super();
    this.state = { by: "shard", find: "", chosen: null };
    this.choose = (chosen) => this.setState({ chosen });
  }

  render({ view, can, ask }, { by, find, chosen }) {
    const { status } = view;
    const found = filtered(view.nodes, find.trim().toLowerCase());
    const selected = chosen && status.shards.flatMap((s) => s.replicas).find((replica) => replica.id === chosen);
    return html`
      <${Figures} view=${view} />
      <section aria-labelledby="engines-title">
        <h2 id="engines-title">Engines</h2>
        <div class="tiles wide">${status.engines.map((each) => html`<${EngineTile} key=${each.id} engine=${each} />`)}
        ${!status.engines.length && html`<p class="empty">No engine has reported yet.</p>`}</div>
      </section>
      <section aria-labelledby="workers-title">
        <div class="bar">
          <h2 id="workers-title">Expert workers</h2>
          <input type="search" placeholder="Find a worker, node or state" aria-label="Find a worker, node or state"
            value=${find} onInput=${(event) => this.setState({ find: event.target.value })} />
          <div class="segments" role="group" aria-label="Arrange">
            ${["shard", "node"].map((each) => html`
              <button key=${each} aria-pressed=${by === each}
                onClick=${() => this.setState({ by: each })}>By ${each}</button>`)}
          </div>
          <${ActionButtons} can=${can} ask=${ask} target=${{ kind: "cluster" }} />
        </div>
        ${by === "shard"
          ? html`<${Shards} status=${status} found=${found} can=${can} ask=${ask} choose=${this.choose} />`
          : html`<${Nodes} nodes=${view.nodes} status=${status} found=${found} choose=${this.choose} />`}
      </section>
      ${status.spares.length > 0 && html`<section aria-labelledby="spares-title">
        <h2 id="spares-title">Warm spares</h2>
        <div class="tiles">${status.spares.map((each) => html`<${SpareTile} key=${each.id} spare=${each} />`)}</div>
      </section>`}
      ${chosen && html`<${Details} replica=${selected} id=${chosen} nodes=${view.nodes} can=${can}
        ask=${ask} close=${() => this.choose(null)} />`}
    `;
  }
}

// A function that says whether a replica is meant by what was typed.
function filtered(nodes, text) {
  const names = Object.fromEntries(nodes.map((node) => [node.id, node.name.toLowerCase()]));
  return ({ id, state, role, node }) => [id, state, role, names[node] ?? ""].some((each) => each.includes(text));
}

function Figures({ view }) {
  const { status, samples } = view;
  const { online, wanted, ready, engines } = totals(status);
  const last = samples[samples.length - 1] ?? {};
  const over = (key) => samples.map((sample) => sample[key]);
  return html`<dl class="figures">
    <${Figure} id="online" name="Workers online" value=${number(online)} of=${`of ${number(wanted)}`}
      level=${online < wanted ? "warn" : "good"} values=${over("workers")} />
    <${Figure} name="Engines ready" value=${number(ready)} of=${`of ${number(engines)}`}
      level=${ready ? "good" : "bad"} />
    <${Figure} name="Requests in flight" value=${number(last.running)} of=${`${number(last.waiting)} waiting`}
      values=${over("running")} />
    <${Figure} name="Tokens per second" value=${rate(last.generated_per_s)} values=${over("generated_per_s")} />
    <${Figure} name="First token" of="median" value=${seconds(last.first_token_p50_s)}
      values=${over("first_token_p50_s")} />
    <${Figure} name="Between tokens" of="median" value=${seconds(last.inter_token_p50_s)}
      values=${over("inter_token_p50_s")} />
  </dl>`;
}

function Figure({ id, name, value, of, level = "", values }) {
  return html`<div class=${`card figure ${level}`} id=${id}>
    <dt>${name}</dt><dd><b>${value}</b> ${of && html`<span>${of}</span>`}</dd>
    ${values && html`<${Sparkline} values=${values} />`}
  </div>`;
}

function Shards({ status, found, can, ask, choose }) {
  const busiest = Math.max(1, ...status.shards.flatMap((s) => s.replicas.map((r) => r.load.tokens_per_s ?? 0)));
  return html`<div class="shards">
    ${status.shards.map((shard) => {
      const replicas = shard.replicas.filter(found);
      const online = onlineIn(shard);
      const pending = stagesOfMissing(status, shard, online);
      const level = online === 0 ? "bad" : online < shard.wanted ? "warn" : "good";
      return (replicas.length > 0 || found({ id: "", state: "", role: "", node: "" })) && html`
        <article key=${shard.id} class=${`card shard ${level}`} aria-label=${`Shard ${shard.id}`}
          data-shard=${shard.id}>
          <header>
            <h3>Shard ${shard.id}</h3>
            <span class="meter" aria-label=${`${online} of ${shard.wanted} replicas online`}>
              ${shard.wanted <= 8 && Array.from({ length: Math.max(shard.wanted, online) }, (_, index) =>
                html`<i key=${index} class=${index < online ? "on" : ""}></i>`)}
              ${online} of ${shard.wanted}</span>
            <${ActionButtons} can=${can} ask=${ask} target=${{ kind: "shard", id: shard.id, replicas: shard.wanted }} />
          </header>
          <p class="sub">experts ${ranges(shard.experts)} in layers ${shard.layers[0]}–${shard.layers[1] - 1}</p>
          <div class="tiles">
            ${replicas.map((replica) => html`
              <${ReplicaTile} key=${replica.id} replica=${replica} busiest=${busiest} choose=${choose} />`)}
            ${pending.map(([id, stage]) => html`<${PendingTile} key=${id} id=${id} stage=${stage} />`)}
          </div>
        </article>`;
    })}
  </div>`;
}

// [name, stage] for every replica that is wanted but not online: what the newest starting workers say.
function stagesOfMissing(status, shard, online) {
  const known = new Set(shard.replicas.map((replica) => replica.id));
  const starting = Object.entries(status.progress).filter(
    ([source, stage]) => source.startsWith(`experts-${shard.id}-`) && !known.has(source) && stage !== "ready",
  );
  const missing = Math.max(0, shard.wanted - online);
  const newest = missing ? starting.slice(-missing) : [];
  while (newest.length < missing) newest.push([`missing-${newest.length}`, "waiting for a process"]);
  return newest;
}

function Nodes({ nodes, status, found, choose }) {
  const replicas = status.shards.flatMap((shard) => shard.replicas).filter(found);
  const busiest = Math.max(1, ...replicas.map((replica) => replica.load.tokens_per_s ?? 0));
  return html`<div class="shards">
    ${nodes.map((node) => {
      const here = replicas.filter((replica) => replica.node === node.id);
      const engines = status.engines.filter((engine) => engine.node === node.id);
      const deviceOf = (replica) => replica.device || "unknown device";
      const devices = [...new Set(here.map(deviceOf))].sort();
      return html`<article key=${node.id} class=${`card shard ${node.alive ? "good" : "bad"}`}
        aria-label=${`Node ${node.name}`}>
        <header><h3>${node.name}</h3><span class="meter">${node.alive ? "alive" : "lost"}</span></header>
        <p class="sub">${node.address} · ${plural(node.cpus, "core")} · ${plural(node.gpus, "GPU")} ·
          ${plural(here.length, "worker")} · ${plural(engines.length, "engine")}</p>
        ${devices.map((device) => html`<div key=${device}>
          <h4>${device}</h4>
          <div class="tiles">${here.filter((replica) => deviceOf(replica) === device).map((replica) => html`
            <${ReplicaTile} key=${replica.id} replica=${replica} busiest=${busiest} choose=${choose} />`)}</div>
        </div>`)}
      </article>`;
    })}
  </div>`;
}
