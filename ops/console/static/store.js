// What the page knows: pushed by the server as it changes, and handed to whoever subscribed.

const KEPT_EVENTS = 1000;
const KEPT_SECONDS = 900;

const state = { view: null, about: null, can: {}, link: "connecting", signInError: "" };
const listeners = new Set();
let source = null;

export function current() {
  return state;
}

export function subscribe(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function update(changes) {
  Object.assign(state, changes);
  for (const listener of listeners) listener(state);
}

export async function start() {
  const code = location.hash.match(/^#([\w-]{40,})$/)?.[1];
  if (code) {
    history.replaceState(null, "", "/ops");
    const response = await post("/api/session", { code });
    if (!response.ok) {
      update({ link: "signed out", signInError: (await response.json()).error });
      return;
    }
  }
  listen();
}

function listen() {
  source = new EventSource("/api/stream");
  source.onmessage = (message) => take(JSON.parse(message.data));
  source.onerror = () => {
    // A refusal closes the source for good; otherwise the browser tries again by itself.
    update({ link: source.readyState === EventSource.CLOSED ? "signed out" : "lost" });
  };
}

function take(news) {
  const before = state.view;
  if (!news.about && before) {
    news.events = [...before.events, ...news.events].slice(-KEPT_EVENTS);
    const from = news.time_s - KEPT_SECONDS;
    news.samples = [...before.samples, ...news.samples].filter((sample) => sample.time_s > from);
  }
  update({
    view: news,
    about: news.about ?? state.about,
    can: news.can ?? state.can,
    link: "live",
  });
}

export function post(path, body, signal) {
  return fetch(path, { method: "POST", body: JSON.stringify(body), signal });
}

export async function signOut() {
  source?.close();
  await post("/api/sign-out", {});
  update({ link: "signed out", view: null });
}

export async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts;
  }
  if (rest) yield rest;
}
