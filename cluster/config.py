"""All settings of an application as one frozen tree, parsed once from the ``args`` mapping of ray-config.yaml.

``Settings`` is the tree's root; ``EngineSettings`` and ``WorkerSettings`` belong to the two kinds of process. Field
names are the keys of the YAML file, the text below each field is its documentation. Nothing here reads a clock, a file
or the environment.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.errors import ConfigError

Dtype = Literal["auto", "bfloat16", "float32"]


def _number(default: Any, *, least: float | None = None, above: float | None = None) -> Any:
    """A field with a lower bound: inclusive `least` or exclusive `above`, in the field's own unit."""
    return field(default=default, metadata={"least": least, "above": above})


@dataclass(frozen=True)
class EngineSettings:
    """One vLLM engine: attention, gate, shared experts, sampling. None leaves the choice to Switchyard or vLLM."""

    threads: int | None = _number(None, least=1)
    """Cores that its kernels use. None: every core this process may run on."""
    num_gpus: float | None = _number(None, least=0)
    """GPUs reserved for each engine (Ray's num_gpus). None: 1 where PyTorch sees a GPU, else 0."""
    max_model_len: int | None = _number(None, least=1)
    """Longest prompt plus answer, in tokens. None: what the checkpoint's config.json allows."""
    max_num_seqs: int = _number(64, least=1)
    """Requests that are computed at the same time, a count; more wait in vLLM's queue."""
    max_num_batched_tokens: int = _number(2048, least=1)
    """Tokens in one forward step, a count; also the largest message to an expert worker."""
    kv_cache_gib: float | None = _number(None, above=0)
    """Memory of the paged KV cache, in GiB. None: vLLM's choice on a GPU, 1 GiB on a CPU (less if memory is short)."""
    enforce_eager: bool = False
    """Skip torch.compile: starts sooner, runs slower."""
    log_prompts: bool = False
    """Write prompts and answers to the engine's log, and let it leave core files. Off: they belong to the users."""
    vllm: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of vLLM's engine by their Python names, for example {seed: 1, quantization: fp8}."""


@dataclass(frozen=True)
class WorkerSettings:
    """One expert worker: the experts of one shard."""

    threads: int | None = _number(None, least=1)
    """Threads of its kernels. None: this host's cores divided by `workers`, at least 1."""
    num_gpus: float | None = _number(None, least=0)
    """GPUs reserved for each worker (Ray's num_gpus); 0: host memory. None: 1 where PyTorch sees a GPU, else 0."""
    host: str = "auto"
    """Address its TCP port binds to. auto: its machine's in the Ray cluster, loopback under `switchyard serve`."""
    tls: str = "auto"
    """auto: TLS with a certificate of its own unless `host` is loopback; off; or a PEM file, certificate and key."""
    fault_injection: bool = False
    """Let processes of the same user order faults of it, as `switchyard bench faults` does. Not for production."""


@dataclass(frozen=True)
class ShardSettings:
    """One shard of an explicit layout: what it holds, and where its replicas run."""

    layers: tuple[int, ...]
    """[first, end) of the MoE layers, counted from 0."""
    experts: tuple[int, ...]
    """[first, end) of the experts of each of these layers."""
    nodes: tuple[str, ...]
    """Nodes by name (the Ray label switchyard-node). Replicas divide evenly among them, and go nowhere else."""
    device: Literal["gpu", "cpu"] = "gpu"
    """gpu: every replica has a card of its own; cpu: host memory."""
    replicas: int = _number(1, least=1)
    """Copies, a count; a multiple of the number of nodes."""
    shadow: str | None = None
    """The node of one more copy in host memory, asked only while no replica can be. None: no such copy."""


@dataclass(frozen=True)
class LayoutSettings:
    """Which shard and which engine runs where, node by node, as `switchyard plan` writes it (cluster/layout.py)."""

    shards: tuple[ShardSettings, ...]
    """Together they hold every expert of every layer exactly once."""
    engine_nodes: tuple[str, ...]
    """Nodes of the engines, which divide evenly among them."""


@dataclass(frozen=True)
class TracingSettings:
    """OpenTelemetry spans of requests: HTTP, vLLM's scheduling and the layer calls. They carry no text of anybody."""

    endpoint: str | None = None
    """The OTLP collector's URL: http://localhost:4317, or http://localhost:4318/v1/traces over http. None: no spans."""
    protocol: Literal["grpc", "http"] = "grpc"
    """How the collector is spoken to."""
    sample: float = _number(0.01, least=0)
    """Share of requests that are traced, at most 1; a request that comes with a traceparent header has it decided."""


@dataclass(frozen=True)
class EngineScalingSettings:
    """Engines come and go with the requests that are open, by Ray Serve's own autoscaling."""

    max_replicas: int | None = _number(None, least=1)
    """Most engines, a count. None: there are always `engines`."""
    min_replicas: int = _number(1, least=0)
    """Fewest engines, a count. 0: none without requests; the first one then waits for an engine's start."""
    target_ongoing_requests: float = _number(16.0, above=0)
    """Requests, running and waiting, that each engine shall have."""
    upscale_delay_s: float = _number(10.0, least=0)
    """Seconds for which more engines must have been wanted."""
    downscale_delay_s: float = _number(300.0, least=0)
    """Seconds for which fewer engines must have been wanted."""


@dataclass(frozen=True)
class ExpertScalingSettings:
    """Shards get replicas while their workers are busy (cluster/scaling.py); there are always at least `replicas`."""

    max_replicas: int | None = _number(None, least=1)
    """Most replicas of one shard, a count. None: shards are not scaled by load."""
    max_workers: int | None = _number(None, least=1)
    """Most workers of all shards together, a count; the busiest shard is first. None: no limit of its own."""
    scale_up_at: float = _number(0.7, above=0)
    """Another replica from this busy share on: the time in which a worker's kernels compute, out of all time."""
    scale_down_at: float = _number(0.4, above=0)
    """One replica less if the others stay below this busy share without it."""
    upscale_delay_s: float = _number(10.0, least=0)
    """Seconds for which a shard must have been busy."""
    downscale_delay_s: float = _number(300.0, least=0)
    """Seconds for which it must not have been."""


@dataclass(frozen=True)
class AutoscalingSettings:
    """What grows and shrinks with the load. Off unless a `max_replicas` is set."""

    engines: EngineScalingSettings = field(default_factory=EngineScalingSettings)
    experts: ExpertScalingSettings = field(default_factory=ExpertScalingSettings)


@dataclass(frozen=True)
class Settings:
    """The whole application."""

    model: str
    """Path of the checkpoint: a folder with config.json and *.safetensors, the same on every node."""
    served_model_name: str | None = None
    """The model's name in the HTTP API. None: the last part of `model`."""
    license: Literal["accepted"] | None = None
    """`accepted` once you accept the terms of the weights, where they ask for it (`switchyard license MODEL`)."""
    dtype: Dtype = "auto"
    """Precision of activations and of unquantised weights. auto: what config.json names (float32 becomes bfloat16)."""
    workers: int = _number(2, least=1)
    """Expert shards, a count: the experts of every layer are divided among so many workers."""
    replicas: int = _number(1, least=1)
    """Copies of each shard, a count."""
    spares: int = _number(0, least=0)
    """Warm spares, a count: processes with everything imported that adopt a shard as soon as it has no worker left."""
    shadow: Literal["cpu"] | None = None
    """`cpu`: one more copy of every shard in host memory, asked only while no other replica of it can be."""
    engines: int = _number(1, least=1)
    """vLLM engines that share the workers, a count."""
    expert_timeout_s: float = _number(30.0, above=0)
    """Seconds that a layer call waits for a lost shard to return before its requests fail with 503."""
    start_timeout_s: float = _number(3600.0, above=0)
    """Seconds that engines and workers may take to become ready."""
    worker_lost_after_s: float = _number(5.0, above=0)
    """Seconds without a heartbeat after which the router takes a worker for gone (it sends one every second)."""
    api_keys: str | None = None
    """File of the API keys that HTTP asks for (`switchyard keys`), on the head node. None: no keys are asked for."""
    allow_anonymous: bool = False
    """Serve everybody without a key even where other machines can reach HTTP."""
    metrics: bool = True
    """Count and time layer calls, requests and energy, and serve the whole cluster's metrics at /metrics."""
    tracing: TracingSettings = field(default_factory=TracingSettings)
    autoscaling: AutoscalingSettings = field(default_factory=AutoscalingSettings)
    layout: LayoutSettings | None = None
    """Where everything runs, in place of `workers`, `replicas` and `shadow`. None: Ray finds room."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise ConfigError("model: is empty. Give the path of a checkpoint folder.")
        if self.tracing.sample > 1:
            raise ConfigError(f"tracing.sample: is {self.tracing.sample:g}, must be 1 or less.")
        self._check_autoscaling()
        if self.engine.max_num_seqs > self.engine.max_num_batched_tokens:
            raise ConfigError(
                f"engine.max_num_batched_tokens: {self.engine.max_num_batched_tokens} is less than "
                f"engine.max_num_seqs ({self.engine.max_num_seqs}). Every running request needs one token per step."
            )

    def _check_autoscaling(self) -> None:
        engines, experts = self.autoscaling.engines, self.autoscaling.experts
        if engines.max_replicas is not None and not engines.min_replicas <= self.engines <= engines.max_replicas:
            raise ConfigError(
                f"engines: is {self.engines}, but autoscaling.engines allows {engines.min_replicas} to "
                f"{engines.max_replicas}. It is the number to begin with."
            )
        if experts.scale_down_at >= experts.scale_up_at:
            raise ConfigError(
                f"autoscaling.experts.scale_down_at: {experts.scale_down_at:g} is not less than scale_up_at "
                f"({experts.scale_up_at:g}). Replicas would come and go without end."
            )
        if experts.max_replicas is None:
            return
        if self.layout is None and self.replicas > experts.max_replicas:
            raise ConfigError(f"replicas: is {self.replicas}, but autoscaling.experts allows {experts.max_replicas}.")
        if self.layout is None and self.workers * self.replicas > (experts.max_workers or math.inf):
            raise ConfigError(
                f"autoscaling.experts.max_workers: is {experts.max_workers}, but {self.workers} shards of "
                f"{self.replicas} replicas are {self.workers * self.replicas} workers to begin with."
            )

    @property
    def fewest_engines(self) -> int:
        """How many there are at least."""
        scaling = self.autoscaling.engines
        return self.engines if scaling.max_replicas is None else scaling.min_replicas

    @property
    def most_engines(self) -> int:
        """How many there can be at a time."""
        return self.autoscaling.engines.max_replicas or self.engines

    @property
    def name(self) -> str:
        """The model's name in the HTTP API."""
        return self.served_model_name or self.model.rstrip("/").rsplit("/", 1)[-1]


def parse_settings(args: Mapping[str, Any]) -> Settings:
    """Settings from the `args` mapping of ray-config.yaml. Raises ConfigError, naming the key, for anything else."""
    if not isinstance(args, Mapping):
        raise ConfigError(f"args: must be a mapping of settings, not {_kind(args)}.")
    settings = _parse(Settings, args, "")
    assert isinstance(settings, Settings)
    return settings


def to_args(settings: Settings) -> dict[str, Any]:
    """The inverse of parse_settings: a plain mapping."""
    return dataclasses.asdict(settings)


def setting_names(cls: type = Settings, prefix: str = "") -> Iterator[str]:
    """Every key as a dotted path, for example engine.max_model_len."""
    for name, wanted in _hints(cls).items():
        if dataclasses.is_dataclass(wanted):
            yield from setting_names(typing.cast(type, wanted), f"{prefix}{name}.")
        else:
            yield prefix + name


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _parse(cls: type, values: Mapping[str, Any], path: str) -> Any:
    hints = _hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(_unknown(str(key), path, hints))
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for name, item in fields.items():
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING and name not in values:
            raise ConfigError(f"{path}{name}: is missing. It has no default.")
    return cls(**{key: _convert(hints[key], value, path + key, fields[key].metadata) for key, value in values.items()})


def _convert(wanted: Any, value: Any, path: str, metadata: Mapping[str, Any]) -> Any:
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        if value is None:
            return None
        wanted = next(kind for kind in typing.get_args(wanted) if kind is not type(None))
    if dataclasses.is_dataclass(wanted):
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: must be a mapping of settings, not {_kind(value)}.")
        return _parse(typing.cast(type, wanted), value, path + ".")
    if typing.get_origin(wanted) is tuple:
        return _items(typing.get_args(wanted)[0], value, path)
    if typing.get_origin(wanted) is Literal:
        return _choice(typing.get_args(wanted), value, path)
    if typing.get_origin(wanted) is Mapping:
        return _mapping(value, path)
    return _in_range(_scalar(wanted, value, path), path, metadata)


def _items(wanted: Any, value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{path}: must be a list, not {_kind(value)}.")
    return tuple(_convert(wanted, item, f"{path}[{place}]", {}) for place, item in enumerate(value))


def _scalar(wanted: type, value: Any, path: str) -> Any:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise ConfigError(f"{path}: must be {names[wanted]}, not {_kind(value)}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: must be a finite number, not {value}.")
    return value


def _in_range(value: Any, path: str, metadata: Mapping[str, Any]) -> Any:
    least, above = metadata.get("least"), metadata.get("above")
    if least is not None and value < least:
        raise ConfigError(f"{path}: is {value}, must be {least} or more.")
    if above is not None and value <= above:
        raise ConfigError(f"{path}: is {value}, must be more than {above}.")
    return value


def _choice(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{path}: {value!r} is not one of {', '.join(choices)}.{hint}")


def _mapping(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{path}: must be a mapping with text keys, not {_kind(value)}.")
    return dict(value)


def _unknown(key: str, path: str, siblings: Iterable[str]) -> str:
    """Names the nearest valid key: wherever in the tree it is, but among its siblings in a layout's lists."""
    names = [path + name for name in siblings] if path.startswith("layout") else list(setting_names())
    last_of = {name: name.rsplit(".", 1)[-1] for name in names}
    exact = [name for name, last in last_of.items() if last == key.replace("-", "_")]
    near = difflib.get_close_matches(key, last_of.values(), n=1, cutoff=0.0)
    nearest = exact or [name for name, last in last_of.items() if last == near[0]]
    same_level = [name for name in nearest if name.startswith(path) and "." not in name[len(path) :]]
    return f"{path}{key}: there is no such setting. The nearest is {(same_level or nearest)[0]}."


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true/false", int: "a whole number", float: "a number", list: "a list"}
    names |= {dict: "a mapping", type(None): "nothing"}
    kind = names.get(type(value), type(value).__name__)
    return f"{kind} ({value!r})" if isinstance(value, str | bool | int | float) else kind
