// Actions: buttons for whatever the server's table offers, a question before, and what is said meanwhile.
import { html, Component } from "/ops/html.js";
import { lines, post } from "/ops/store.js";

// Buttons for everything that can be done to a target: {kind: "worker" | "shard" | "cluster", id, ...initial values}.
export function ActionButtons({ can, ask, target }) {
  return Object.entries(can)
    .filter(([, action]) => action.offered[target.kind])
    .map(([name, action]) => html`
      <button key=${name} data-action=${name} onClick=${() => ask({ name, action, target })}
        aria-label=${inWords(action, target)}>${action.offered[target.kind]}</button>`);
}

function inWords(action, target) {
  const whom = { cluster: "", shard: ` shard ${target.id}`, worker: ` ${target.id}` }[target.kind];
  return action.offered[target.kind] + whom;
}

// Fields without a label are the target: one id, or a list of ids for those in the plural.
function initialBody(action, target) {
  const body = {};
  for (const [name, { kind, label }] of Object.entries(action.fields)) {
    if (!label) body[name] = kind !== "list" ? target.id : target.kind === "cluster" ? [] : [target.id];
    else body[name] = target[name] ?? { bool: false, int: 1, str: "" }[kind];
  }
  return body;
}

export class ActionDialog extends Component {
  constructor(props) {
    super(props);
    this.state = { body: initialBody(props.action, props.target), phase: "asking", words: [] };
  }

  componentDidMount() {
    this.dialog.showModal();
  }

  async perform() {
    this.setState({ phase: "running" });
    const outcome = await this.follow().catch(() => ({ error: "The connection was lost; the action goes on." }));
    this.setState({ phase: outcome.error ? "failed" : "done", error: outcome.error });
  }

  async follow() {
    const response = await post(`/api/${this.props.name}`, this.state.body);
    if (!response.ok) return response.json();
    for await (const line of lines(response)) {
      const message = JSON.parse(line);
      if (!message.say) return message;
      this.setState(({ words }) => ({ words: [...words, message.say] }));
    }
    return { error: "The answer broke off; the events say how it went." };
  }

  render({ action, target, close }, { phase, words, error, body }) {
    return html`<dialog ref=${(node) => (this.dialog = node)} onClose=${close} aria-labelledby="asking" class="action">
      <h2 id="asking">${inWords(action, target)}${phase === "asking" ? "?" : ""}</h2>
      ${phase === "asking" && html`
        <p>${action.explain}</p>
        ${Object.entries(action.fields).filter(([, field]) => field.label).map(([name, field]) =>
          this.input(name, field, body[name]))}`}
      <ol class="words" role="log" aria-live="polite">
        ${words.map((text, index) => html`<li key=${index}>${text}</li>`)}
        ${phase === "done" && html`<li class="good"><b>Done.</b></li>`}
        ${phase === "failed" && html`<li class="bad"><b>Failed.</b> ${error}</li>`}
      </ol>
      ${phase === "running" && html`<div class="busy" role="progressbar" aria-label="Under way"></div>`}
      <footer>
        <button onClick=${() => this.dialog.close()}>${phase === "asking" ? "Cancel" : "Close"}</button>
        ${phase === "asking" && html`
          <button class="primary" id="confirm" onClick=${() => this.perform()}>${action.offered[target.kind]}</button>`}
      </footer>
      ${phase === "running" && html`<p class="hint">It goes on when you close this.</p>`}
    </dialog>`;
  }

  input(name, { kind, label }, value) {
    const change = (changed) => this.setState(({ body }) => ({ body: { ...body, [name]: changed } }));
    if (kind === "bool") {
      return html`<label class="check" key=${name}>
        <input type="checkbox" name=${name} checked=${value} onChange=${(e) => change(e.target.checked)} />${label}
      </label>`;
    }
    return html`<label key=${name}>${label}
      <input name=${name} type=${kind === "int" ? "number" : "text"} min="1" value=${value}
        onInput=${(e) => change(kind === "int" ? Number(e.target.value) : e.target.value)} />
    </label>`;
  }
}

// In the header: the action under way, whoever asked for it.
export function RunningAction({ actions }) {
  const running = actions.find((action) => action.end_s === null);
  if (!running) return null;
  return html`<span class="pill busy-pill" role="status"><i aria-hidden="true"></i>
    ${running.name}: ${running.words[running.words.length - 1] ?? "beginning"}</span>`;
}
