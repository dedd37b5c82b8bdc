// The frame around the pages: sign-in, navigation, health, what is going on.
import { ActionDialog, RunningAction } from "/ops/actions.js";
import { ChatPage } from "/ops/chat.js";
import { EventsPage } from "/ops/events.js";
import { ExpertsPage } from "/ops/experts.js";
import { clock, seconds } from "/ops/format.js";
import { health } from "/ops/health.js";
import { html, Component, render } from "/ops/html.js";
import { ModelPage } from "/ops/model.js";
import { PerformancePage } from "/ops/performance.js";
import { signOut, start, subscribe } from "/ops/store.js";
import { TopologyPage } from "/ops/topology.js";

const PAGES = [
  { path: "topology", title: "Topology", icon: "M4 6h6v5H4zM14 13h6v5h-6zM7 11v4.5h7", page: TopologyPage },
  { path: "experts", title: "Experts", icon: "M4 4h5v5H4zM10 4h5v5h-5zM4 10h5v5H4zM10 10h9v9h-9z", page: ExpertsPage },
  { path: "performance", title: "Performance", icon: "M4 19V5M4 19h16M7 15l4-5 3 3 5-7", page: PerformancePage },
  { path: "events", title: "Events", icon: "M12 4a8 8 0 1 0 .01 0M12 8v4l3 2", page: EventsPage },
  { path: "model", title: "Model", icon: "M12 3l8 4.5v9L12 21l-8-4.5v-9zM4 7.5l8 4.5 8-4.5M12 12v9", page: ModelPage },
  { path: "chat", title: "Chat", icon: "M4 5h16v11H9l-5 4z", page: ChatPage },
];
const THEMES = { auto: "Theme: as the system", light: "Theme: light", dark: "Theme: dark" };
const ALERT_SECONDS = 20;

class App extends Component {
  constructor() {
    super();
    this.state = { route: route(), theme: localStorage.getItem("theme") ?? "auto", asking: null };
    this.ask = (asking) => this.setState({ asking });
  }

  componentDidMount() {
    subscribe((store) => this.setState({ store: { ...store } }));
    window.addEventListener("hashchange", () => this.setState({ route: route() }));
    this.applyTheme(this.state.theme);
    start();
  }

  applyTheme(theme) {
    localStorage.setItem("theme", theme);
    document.documentElement.dataset.theme = theme;
    this.setState({ theme });
  }

  render() {
    const { store, asking } = this.state;
    if (store?.link === "signed out") return html`<${SignedOut} error=${store.signInError} />`;
    if (!store?.view?.status?.shards) {
      const known = store?.link === "lost" ? "The console's server does not answer." : "Looking at the cluster …";
      return html`<p class="splash" role="status">${store?.view?.trouble || known}</p>`;
    }
    const { page: Page, title } = PAGES.find(({ path }) => path === this.state.route) ?? PAGES[0];
    return html`
      <a class="skip" href="#main" onClick=${skipToMain}>Skip to content</a>
      <${TopBar} app=${this} store=${store} />
      <${Navigation} route=${this.state.route} />
      <main id="main" tabindex="-1" aria-label=${title}>
        <${Alerts} view=${store.view} />
        <${Page} ...${store} ask=${this.ask} />
      </main>
      ${asking && html`<${ActionDialog} ...${asking} close=${() => this.ask(null)} />`}
    `;
  }
}

function route() {
  const path = location.hash.replace(/^#\//, "");
  return PAGES.some((page) => page.path === path) ? path : PAGES[0].path;
}

function skipToMain(event) {
  event.preventDefault();
  document.getElementById("main").focus();
}

function SignedOut({ error }) {
  return html`<section class="splash card">
    <img src="/ops/icon.svg" alt="" width="48" height="48" />
    <h1>Switchyard</h1>
    <p role="alert">${error || "This browser is not signed in."}</p>
    <p>Run <code>switchyard console</code> on the machine of the cluster, and open the link that it prints.</p>
  </section>`;
}

function TopBar({ app, store }) {
  const { level, text } = health(store);
  const { theme } = app.state;
  const next = { auto: "light", light: "dark", dark: "auto" }[theme];
  return html`<header class="top">
    <a class="brand" href="#/topology"><img src="/ops/icon.svg" alt="" width="28" height="28" /><b>Switchyard</b></a>
    <span class="model" title="Model that is served">${store.about.model}</span>
    <span class=${`pill ${level}`} role="status" id="health"><i aria-hidden="true"></i>${text}</span>
    <span class="epoch" title="Number of the routing table">epoch <b id="epoch">${store.view.status.epoch}</b></span>
    <${RunningAction} actions=${store.view.actions} />
    <button class="plain" onClick=${() => app.applyTheme(next)} aria-label=${`${THEMES[theme]}. Change it`}
      title=${THEMES[theme]}>${{ auto: "◐", light: "☀", dark: "☾" }[theme]}</button>
    <button class="plain" onClick=${signOut} aria-label="Sign out" title="Sign out">
      <svg viewBox="0 0 24 24" aria-hidden="true"><path d="M10 4H5v16h5M14 8l4 4-4 4M18 12H9" /></svg></button>
  </header>`;
}

function Navigation({ route: active }) {
  return html`<nav aria-label="Pages">
    ${PAGES.map(({ path, title, icon }) => html`
      <a key=${path} href=${`#/${path}`} aria-current=${path === active ? "page" : null}>
        <svg viewBox="0 0 24 24" aria-hidden="true"><path d=${icon} /></svg><span>${title}</span>
      </a>`)}
  </nav>`;
}

// What is wrong now, or was a moment ago; a screen reader says it.
function Alerts({ view }) {
  const shown = view.incidents.filter(
    ({ severity, begin_s, end_s }) =>
      severity !== "info" && (end_s === null ? view.time_s - begin_s < 300 : view.time_s - end_s < ALERT_SECONDS),
  );
  return html`<div class="alerts" role="alert" id="alerts">
    ${view.trouble && html`<p class="alert bad"><b>No answer from the router.</b> ${view.trouble}</p>`}
    ${shown.slice(-3).map((incident) => html`
      <p key=${incident.begin_s + incident.subject} class=${`alert ${incident.end_s ? "good" : incident.severity}`}>
        <b>${incident.title}: ${incident.subject}</b>
        <span>${incident.why}</span>
        <span class="when">${incident.end_s
          ? `made good after ${seconds(incident.end_s - incident.begin_s)}`
          : `since ${clock(incident.begin_s)}`}</span>
      </p>`)}
  </div>`;
}

render(html`<${App} />`, document.getElementById("app"));
