// Line charts in SVG: small ones beside a figure, and large ones with axes and a cursor.
import { clock } from "/ops/format.js";
import { html, Component } from "/ops/html.js";

const WIDTH = 600;
const HEIGHT = 180;
const LEFT = 52;
const BOTTOM = 22;
const TOP = 8;

// Where a value is null the line is broken.
function path(points) {
  let pen = "M";
  let drawn = "";
  for (const [x, y] of points) {
    if (y === null) pen = "M";
    else {
      drawn += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
      pen = "L";
    }
  }
  return drawn;
}

export function Sparkline({ values }) {
  const recent = values.slice(-60);
  const most = Math.max(...recent.map((value) => value ?? 0)) || 1;
  const step = 100 / Math.max(1, recent.length - 1);
  const points = recent.map((value, index) => [index * step, value === null ? null : 22 - (20 * value) / most]);
  return html`<svg class="spark" viewBox="0 0 100 24" preserveAspectRatio="none" aria-hidden="true">
    <path d=${path(points)} /></svg>`;
}

// The smallest of 1, 2, 5 x 10^n that is not below the value.
export function niceCeiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((each) => each * power).find((each) => each >= value * 0.999);
}

// series: [{key, name}], keys of samples; show(value) is a value with its unit.
export class Chart extends Component {
  constructor() {
    super();
    this.state = { at: null };
  }

  point(event) {
    const box = event.currentTarget.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH;
    const { samples } = this.props;
    const share = (x - LEFT) / (WIDTH - LEFT);
    this.setState({ at: Math.max(0, Math.min(samples.length - 1, Math.round(share * (samples.length - 1)))) });
  }

  move(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const last = this.props.samples.length - 1;
    this.setState({ at: Math.max(0, Math.min(last, (this.state.at ?? last) + step)) });
  }

  render({ title, samples, series, show }, { at }) {
    const most = niceCeiling(Math.max(...samples.flatMap((s) => series.map(({ key }) => s[key] ?? 0))));
    const last = samples.length - 1;
    const x = (index) => LEFT + ((WIDTH - LEFT) * index) / Math.max(1, last);
    const y = (value) => (value === null ? null : HEIGHT - BOTTOM - ((HEIGHT - BOTTOM - TOP) * value) / most);
    const index = Math.min(at ?? last, last);
    const sample = samples[index] ?? {};
    const spoken = series.map(({ key, name }) => `${name} ${show(sample[key])}`).join(", ");
    return html`<figure class="card chart">
      <figcaption><h3>${title}</h3>
        <span>${series.map(({ key, name }, i) => html`<span key=${key} class=${`key s${i}`}>
          <i aria-hidden="true"></i>${name}
          <b>${show(sample[key])}</b></span>`)}</span>
      </figcaption>
      <svg viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} role="img" tabindex="0"
        aria-label=${`${title}. ${at === null ? "Now" : clock(sample.time_s)}: ${spoken}`}
        onPointerMove=${(e) => this.point(e)} onPointerLeave=${() => this.setState({ at: null })}
          onKeyDown=${(e) => this.move(e)}>
        ${[0, 0.5, 1].map((share) => html`<g key=${share} class="axis">
          <line x1=${LEFT} x2=${WIDTH} y1=${y(most * share)} y2=${y(most * share)} />
          <text x=${LEFT - 8} y=${y(most * share) + 4} text-anchor="end">${show(most * share)}</text></g>`)}
        ${[0, last].map((each, i) => samples[each] && html`
          <text key=${i} class="time" x=${x(each)} y=${HEIGHT - 4}
            text-anchor=${i ? "end" : "start"}>${clock(samples[each].time_s)}</text>`)}
        ${series.map(({ key }, i) => html`<path key=${key} class=${`line s${i}`}
          d=${path(samples.map((s, j) => [x(j), y(s[key] ?? null)]))} />`)}
        ${at !== null && html`<line class="cursor" x1=${x(index)} x2=${x(index)} y1=${TOP} y2=${HEIGHT - BOTTOM} />
          <text class="time now" x=${x(index)} y=${HEIGHT - 4} text-anchor="middle">${clock(sample.time_s)}</text>`}
      </svg>
    </figure>`;
  }
}
