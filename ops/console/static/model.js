// Model and licence, and the plan against what there is.
import { bytes, clock, number, ranges } from "/ops/format.js";
import { onlineIn } from "/ops/health.js";
import { html } from "/ops/html.js";

export function ModelPage({ view, about }) {
  const { status } = view;
  const { licence, planned } = about;
  const facts = [
    ["Name", about.model], ["Folder", about.folder], ["Served at", `${about.http}/v1`],
      ["Precision", about.dtype.replace("torch.", "")],
    ["Layers with experts", number(about.layers)], ["Experts per layer", `${about.experts}, ${about.top_k} per token`],
    ["Hidden size", number(about.hidden_size)], ["Checkpoint", bytes(about.checkpoint_bytes)],
      ["of that, experts", bytes(about.expert_bytes)],
    ["Tokenizer", about.has_tokenizer ? "yes" : "none: prompts are token ids"], ["Switchyard", about.version],
      ["Started", clock(about.started_s)],
  ];
  const ready = status.engines.filter((engine) => engine.state === "ready").length;
  return html`
    <div class="columns">
      <section class="card" aria-labelledby="model-title"><h2 id="model-title">Model</h2>
        <dl class="facts">${facts.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd>
          </div>`)}</dl></section>
      <section class="card" aria-labelledby="licence-title"><h2 id="licence-title">Licence</h2>
        <p><b>${licence.name}</b></p><ul>${licence.conditions.map((each) => html`<li key=${each}>${each}</li>`)}</ul>
        ${licence.attribution && html`<p>Shown with every answer: <b>${licence.attribution}</b></p>`}
        <p class="sub">Decided by: ${licence.basis}</p></section>
    </div>
    <section aria-labelledby="plan-title"><h2 id="plan-title">The plan against reality</h2>
      <div class="card scroll"><table id="plan"><thead><tr><th>What</th><th>At the start</th><th>Wanted</th>
        <th>Online</th><th>Holds</th><th>Verdict</th></tr></thead><tbody>
        <tr><td>Engines</td><td>${planned.engines}</td><td>${wantedEngines(planned)}</td><td>${ready}</td>
          <td>attention, gate, sampling</td>
          <td><${Verdict} online=${ready} wanted=${planned.engine_range[0]} /></td></tr>
        ${status.shards.map((shard) => html`<tr key=${shard.id}><td>Shard ${shard.id}</td><td>${planned.replicas}</td>
          <td>${shard.wanted}</td>
          <td>${onlineIn(shard)}</td>
          <td>experts ${ranges(shard.experts)} · ${bytes(shard.replicas[0]?.memory_bytes)} each</td>
          <td><${Verdict} online=${onlineIn(shard)} wanted=${shard.wanted} /></td></tr>`)}
      </tbody></table></div></section>`;
}

function wantedEngines({ engine_range: [fewest, most] }) {
  return fewest === most ? most : `${fewest} to ${most}`;
}

function Verdict({ online, wanted }) {
  const level = online >= wanted ? "good" : online ? "warn" : "bad";
  return html`<span class=${`kind ${level}`}>${level === "good" ? "as planned" : `${wanted - online} missing`}</span>`;
}
