// One judgement of the whole cluster, from its status.
import { plural } from "/ops/format.js";

export function isOnlinePrimary(replica) {
  return replica.state === "online" && replica.role === "primary";
}

export function onlineIn(shard) {
  return shard.replicas.filter(isOnlinePrimary).length;
}

export function totals(status) {
  let online = 0;
  let wanted = 0;
  for (const shard of status.shards) {
    online += onlineIn(shard);
    wanted += shard.wanted;
  }
  const ready = status.engines.filter((engine) => engine.state === "ready").length;
  return { online, wanted, ready, engines: status.engines.length };
}

// {level: "good" | "warn" | "bad", text}
export function health({ link, view }) {
  if (link === "lost") return { level: "bad", text: "Connection lost" };
  if (view.trouble) return { level: "bad", text: "No answer from the router" };
  const { status } = view;
  const { online, wanted, ready } = totals(status);
  if (status.missing_shards.length) {
    return { level: "bad", text: `Shard ${status.missing_shards.join(", ")} without a worker` };
  }
  if (!ready) return { level: "bad", text: "No engine is ready" };
  if (status.engines.some(({ state }) => state === "stalled")) return { level: "warn", text: "Waiting for experts" };
  if (online < wanted) return { level: "warn", text: `${plural(wanted - online, "replica")} missing` };
  return { level: "good", text: "All serving" };
}
