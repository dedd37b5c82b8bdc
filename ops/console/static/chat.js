// A test chat with the model. Nothing of it is kept anywhere: it is gone with the page.
import { number, rate, seconds } from "/ops/format.js";
import { html, Component } from "/ops/html.js";
import { lines, post } from "/ops/store.js";

export class ChatPage extends Component {
  constructor() {
    super();
    const settings = { mode: "chat", maxTokens: 200, temperature: 0.7, key: "" };
    this.state = { ...settings, text: "", turns: [], isBusy: false, note: "" };
  }

  componentWillUnmount() {
    this.abort?.abort();
  }

  async send(event) {
    event.preventDefault();
    const { text, turns, isBusy } = this.state;
    if (isBusy || !text.trim()) return;
    const asked = [...turns, { role: "user", content: text }];
    this.setState({ turns: [...asked, { role: "assistant", content: "" }], text: "", isBusy: true, note: "" });
    this.abort = new AbortController();
    try {
      await this.receive(await post("/api/chat", this.question(asked), this.abort.signal));
    } catch (error) {
      this.setState({ note: error.name === "AbortError" ? "Stopped." : error.message });
    }
    this.setState({ isBusy: false });
  }

  question(asked) {
    const { mode, maxTokens, temperature, key } = this.state;
    const content = mode === "chat" ? { messages: asked } : { prompt: asked[asked.length - 1].content };
    return { mode, ...content, max_tokens: maxTokens, temperature, key };
  }

  async receive(response) {
    if (!response.ok) throw new Error((await response.json()).error);
    const begin = performance.now();
    let first = null;
    for await (const line of lines(response)) {
      if (!line.startsWith("data: {")) continue;
      const message = JSON.parse(line.slice(6));
      if (message.error) throw new Error(message.error.message);
      const piece = message.choices[0]?.delta?.content ?? message.choices[0]?.text ?? "";
      if (piece) first ??= performance.now();
      this.add(piece);
      if (message.usage) this.tell(message.usage, begin, first ?? begin);
    }
  }

  add(piece) {
    this.setState(({ turns }) => {
      const last = turns[turns.length - 1];
      return { turns: [...turns.slice(0, -1), { ...last, content: last.content + piece }] };
    });
  }

  tell(usage, begin, first) {
    const spent = (performance.now() - first) / 1000;
    const parts = [
      `${number(usage.prompt_tokens)} + ${number(usage.completion_tokens)} tokens`,
      `first after ${seconds((first - begin) / 1000)}`,
      usage.completion_tokens > 1 && `${rate((usage.completion_tokens - 1) / spent)} tokens per second`,
    ];
    this.setState({ note: parts.filter(Boolean).join(" · ") });
  }

  render({ about }, { mode, maxTokens, temperature, key, text, turns, isBusy, note }) {
    const set = (name, read = (value) => value) => (event) => this.setState({ [name]: read(event.target.value) });
    return html`<section class="chat" aria-labelledby="chat-title">
      <div class="bar"><h2 id="chat-title">Test chat with ${about.model}</h2>
        <button onClick=${() => this.setState({ turns: [], note: "" })} disabled=${isBusy}>Clear</button></div>
      <details class="card settings"><summary>Settings</summary><div>
        <label>Ask for<select value=${mode} onChange=${set("mode")}><option value="chat">a chat</option>
          <option value="completion">a completion</option></select></label>
        <label>Tokens at most<input type="number" min="1" max="4096" value=${maxTokens}
          onInput=${set("maxTokens", Number)} /></label>
        <label>Temperature<input type="number" min="0" max="2" step="0.1" value=${temperature}
          onInput=${set("temperature", Number)} /></label>
        <label>API key, if it asks for one<input type="password" autocomplete="off" value=${key}
          onInput=${set("key")} /></label></div></details>
      <ol class="turns" role="log" aria-live="polite" aria-busy=${isBusy}>
        ${turns.map(({ role, content }, index) => html`<li key=${index} class=${role}>
          <span class="sub">${role === "user" ? "You" : about.model}</span>
          <p>${content}${isBusy && index === turns.length - 1 && html`<i class="caret" aria-hidden="true"></i>`}</p>
            </li>`)}
        ${!turns.length && html`<li class="empty">
          Ask something. The question goes through the OpenAI API as any other, and is kept nowhere.</li>`}
      </ol>
      <p class="sub" role="status" id="chat-note">${[note, about.licence.attribution].filter(Boolean).join(" · ")}</p>
      <form onSubmit=${(event) => this.send(event)}>
        <label class="hidden" for="question">Your question</label>
        <textarea id="question" rows="2" placeholder="Your question" value=${text} onInput=${set("text")}
          onKeyDown=${(e) => e.key === "Enter" && !e.shiftKey && this.send(e)}></textarea>
        ${isBusy ? html`<button type="button" onClick=${() => this.abort.abort()}>Stop</button>`
          : html`<button class="primary" type="submit">Send</button>`}
      </form>
    </section>`;
  }
}
