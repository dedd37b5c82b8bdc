// The heat map: which experts of which layers are busy, now or over a while.
import { number, rate, seconds } from "/ops/format.js";
import { html, Component } from "/ops/html.js";

const WINDOWS = { 0: "Live", 60: "1 min", 300: "5 min", 900: "15 min" };
const REFRESH_MS = 2000;
const TOP = 8;
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const HOT = 3; // times the mean of the layer: the hottest colour
// From cool to hot, for each theme: [red, green, blue] at equal steps.
const RAMPS = {
  dark: [[24, 34, 46], [17, 78, 92], [20, 148, 136], [190, 200, 90], [250, 190, 60], [255, 244, 214]],
  light: [[241, 245, 249], [170, 222, 216], [45, 170, 158], [28, 110, 120], [140, 70, 40], [190, 40, 20]],
};

// share of 0 to 1 -> "rgb(..)"
function colour(ramp, share) {
  const at = Math.max(0, Math.min(1, share)) * (ramp.length - 1);
  const low = Math.floor(at);
  const high = Math.min(ramp.length - 1, low + 1);
  return `rgb(${ramp[low].map((value, i) => Math.round(value + (ramp[high][i] - value) * (at - low))).join(",")})`;
}

function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme === "dark" || (theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
}

export class ExpertsPage extends Component {
  constructor() {
    super();
    this.state = { window: 60, heat: null, cell: null };
  }

  componentDidMount() {
    this.timer = setInterval(() => this.refresh(), REFRESH_MS);
    this.refresh();
  }

  componentWillUnmount() {
    clearInterval(this.timer);
  }

  componentDidUpdate() {
    if (this.state.heat?.tokens.length) this.draw();
  }

  async refresh() {
    const { window: chosen } = this.state;
    const response = await fetch(`/api/heat?window_s=${chosen}`).catch(() => null);
    if (response?.ok && chosen === this.state.window) this.setState({ heat: await response.json() });
  }

  show(chosen) {
    this.setState({ window: chosen, heat: null }, () => this.refresh());
  }

  draw() {
    const { tokens } = this.state.heat;
    const ramp = RAMPS[isDark() ? "dark" : "light"];
    const [rows, columns] = [tokens.length, tokens[0].length];
    const width = this.canvas.clientWidth * devicePixelRatio;
    const height = rows * Math.max(4, Math.min(34, Math.floor(560 / rows))) * devicePixelRatio;
    Object.assign(this.canvas, { width, height });
    const context = this.canvas.getContext("2d");
    const gap = width / columns > 8 && height / rows > 8 ? devicePixelRatio : 0;
    tokens.forEach((row, layer) => {
      const mean = row.reduce((a, b) => a + b, 0) / columns || 1;
      row.forEach((count, expert) => {
        context.fillStyle = colour(ramp, count / mean / HOT);
        const [x, y, w, h] = box(layer, expert);
        context.fillRect(x, y, w - gap, h - gap);
      });
    });
    function box(layer, expert) {
      const [x, y] = [(expert * width) / columns, (layer * height) / rows].map(Math.round);
      return [x, y, Math.round(((expert + 1) * width) / columns) - x, Math.round(((layer + 1) * height) / rows) - y];
    }
    if (this.state.cell) {
      context.strokeStyle = isDark() ? "#fff" : "#000";
      context.lineWidth = 2 * devicePixelRatio;
      context.strokeRect(...box(this.state.cell.layer, this.state.cell.expert));
    }
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const { tokens } = this.state.heat;
    const layer = ((event.clientY - box.top) / box.height) * tokens.length;
    this.choose(layer, ((event.clientX - box.left) / box.width) * tokens[0].length);
  }

  move(event) {
    const [down, right] = STEPS[event.key] ?? [0, 0];
    if (!down && !right) return;
    event.preventDefault();
    const cell = this.state.cell ?? { layer: 0, expert: 0 };
    this.choose(cell.layer + down, cell.expert + right);
  }

  choose(layer, expert) {
    const { tokens } = this.state.heat;
    const inside = (value, count) => Math.max(0, Math.min(count - 1, Math.floor(value)));
    this.setState({ cell: { layer: inside(layer, tokens.length), expert: inside(expert, tokens[0].length) } });
  }

  render({ view, about }, { window: chosen, heat, cell }) {
    const total = heat?.tokens.flat().reduce((sum, count) => sum + count, 0) ?? 0;
    const reading = total || !heat ? described(heat, cell, view.status) : "No token was computed in that time.";
    return html`<section aria-labelledby="experts-title">
      <div class="bar"><h2 id="experts-title">Expert load</h2>
        <div class="segments" role="group" aria-label="Window">${Object.entries(WINDOWS).map(([key, name]) => html`
          <button key=${key} aria-pressed=${chosen === Number(key)}
            onClick=${() => this.show(Number(key))}>${name}</button>`)}</div>
      </div>
      <p class="sub">Tokens per expert (across) in each layer (down)${heat ? ` over ${seconds(heat.seconds)}` : ""}.
        Colours compare an expert with the mean of its layer. ${about.experts} experts, ${about.top_k} per token.</p>
      <div class="card heat">
        <div class="axis-x" aria-hidden="true"><span>expert 0</span><span>expert ${about.experts - 1}</span></div>
        <div class="heat-body"><div class="axis-y" aria-hidden="true"><span>layer 0</span>
          <span>layer ${about.layers - 1}</span></div>
          <canvas ref=${(node) => (this.canvas = node)} tabindex="0" role="img" id="heat"
            aria-label=${`Heat map of ${about.layers} layers and ${about.experts} experts. ${reading}`}
            onPointerMove=${(e) => heat?.tokens.length && this.point(e)}
              onPointerLeave=${() => this.setState({ cell: null })}
            onKeyDown=${(e) => heat?.tokens.length && this.move(e)}></canvas></div>
        <p class="reading" aria-live="polite">${reading}</p>
        <div class="legend" aria-hidden="true"><span>idle</span><i></i><span>${HOT} times the mean, or more</span></div>
      </div>
      ${total > 0 && html`<${Hottest} heat=${heat} status=${view.status} />`}
    </section>`;
  }
}

function described(heat, cell, status) {
  if (!heat) return "Looking …";
  if (!cell) return "Point at an expert, or use the arrow keys.";
  const row = heat.tokens[cell.layer];
  const sum = row.reduce((a, b) => a + b, 0);
  const share = sum ? row[cell.expert] / sum : 0;
  return `Layer ${cell.layer}, expert ${cell.expert}: ${number(row[cell.expert])} tokens, `
    + `${number(share * 100, 1)}% of its layer, `
    + `${number(share * row.length, 2)} times the mean; shard ${holders(status, cell.layer, cell.expert)}`;
}

function holders(status, layer, expert) {
  const holding = status.shards.filter(
    ({ layers, experts }) => layers[0] <= layer && layer < layers[1] && experts.includes(expert),
  );
  return holding.map((shard) => shard.id).join(", ");
}

function Hottest({ heat, status }) {
  const cells = heat.tokens.flatMap((row, layer) => {
    const sum = row.reduce((a, b) => a + b, 0) || 1;
    return row.map((count, expert) => ({ layer, expert, count, over: (count * row.length) / sum }));
  });
  cells.sort((a, b) => b.over - a.over);
  return html`<section class="card" aria-labelledby="hottest-title">
    <h3 id="hottest-title">Furthest above their layer's mean</h3>
    <div class="scroll"><table><thead><tr><th>Layer</th><th>Expert</th><th>Shard</th><th>Tokens per second</th>
      <th>Times the mean</th></tr></thead>
    <tbody>${cells.slice(0, TOP).map((each) => html`<tr key=${`${each.layer} ${each.expert}`}>
      <td>${each.layer}</td><td>${each.expert}</td><td>${holders(status, each.layer, each.expert)}</td>
      <td>${rate(each.count / (heat.seconds || 1))}</td><td>${number(each.over, 2)}</td></tr>`)}</tbody></table></div>
        </section>`;
}
