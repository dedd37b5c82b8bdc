"""How each side is started, from one Settings: colocated vLLM at its best, and `switchyard serve` as a user would.

Same model, dtype, cores, scheduler limits and KV cache; prefix caching is off on both, because prompts
repeat between rounds.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.config import Settings, to_args

HOST = "127.0.0.1"
# vLLM's own server. `vllm serve` does not start from the CPU package, whose metadata has another name.
VLLM_SERVER = "vllm.entrypoints.launchers.api_server.entry"


def bench_args(model: str, *, num_workers: int, dtype: str, streams: int, tokens: int) -> dict[str, Any]:
    """Settings of the benchmark, as the `args` mapping of ray-config.yaml.

    One worker with every core by default: engine and worker take turns, as the layers of a colocated engine do.
    """
    return {
        "model": str(Path(model).expanduser().resolve()),
        "dtype": dtype,
        "workers": num_workers,
        "engine": {
            "max_model_len": max(512, 2 * tokens),
            "max_num_seqs": max(64, streams),
            "max_num_batched_tokens": 2048,
            "kv_cache_gib": 1.0,
            "vllm": {"enable_prefix_caching": False},
        },
    }


def override(args: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """`args` with dotted key=value assignments applied; values are YAML. Raises ValueError for one without `=`."""
    result: dict[str, Any] = json.loads(json.dumps(args))
    for assignment in assignments:
        path, separator, value = assignment.partition("=")
        if not separator or not path:
            raise ValueError(f"--set {assignment}: must look like engine.threads=2")
        *parents, last = path.split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"--set {assignment}: {parent} is not a section")
        node[last] = yaml.safe_load(value)
    return result


def environment_assignments(assignments: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE words as a mapping. Raises ValueError for one without `=`."""
    pairs = [assignment.partition("=") for assignment in assignments]
    for name, separator, _ in pairs:
        if not separator or not name:
            raise ValueError(f"{name}: must look like NAME=VALUE")
    return {name: value for name, _, value in pairs}


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """vLLM's command-line options for its arguments by Python names."""
    words: list[str] = []
    for name, value in arguments.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif value is False:
            # What disables something is a plain switch of vLLM's, off when it is left out.
            words += [] if name.startswith("disable_") else ["--no-" + name.replace("_", "-")]
        elif isinstance(value, list | tuple):
            words += [option, *map(str, value)]
        elif isinstance(value, Mapping):
            words += [option, json.dumps(value)]
        else:
            words += [option, str(value)]
    return words


def plain_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment without what would turn vLLM into an engine of ours."""
    return {name: value for name, value in inherited.items() if not name.startswith("SWITCHYARD_")}


def colocated_command(settings: Settings, port: int) -> list[str]:
    """Plain vLLM with the arguments that Switchyard's engine gets from these settings."""
    from deployments.vllm_app import engine_arguments

    cache_gib = settings.engine.kv_cache_gib
    cache_bytes = None if cache_gib is None else int(cache_gib * (1 << 30))
    arguments = engine_arguments(settings, remote_experts=False, kv_cache_bytes=cache_bytes, on_gpu=False)
    return [sys.executable, "-m", VLLM_SERVER, *command_line({**arguments, "host": HOST, "port": port})]


def colocated_environment(settings: Settings, inherited: Mapping[str, str]) -> dict[str, str]:
    """Every core bound to vLLM's kernels, which is not its default.

    Its compiled graphs are kept apart from ours: the key under which vLLM keeps them does not name the experts' kind.
    """
    from deployments.cores import allowed_cores
    from deployments.environment import cache_folder, engine_environment

    environment = engine_environment(settings, allowed_cores())
    return {**plain_environment(inherited), **environment, "VLLM_CACHE_ROOT": str(cache_folder() / "colocated")}


def switchyard_command(config: Path, port: int) -> list[str]:
    """`switchyard serve`, from the same Python environment."""
    return [sys.executable, "-m", "ops.cli", "serve", "--config", str(config), "--host", HOST, "--port", str(port)]


def switchyard_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """The user's environment; the repository is importable wherever the benchmark was started from."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [inherited.get("PYTHONPATH")])]
    return {**inherited, "PYTHONPATH": os.pathsep.join(paths)}


def write_config(path: Path, settings: Settings) -> None:
    """A ray-config.yaml with these settings."""
    application = {
        "name": "switchyard",
        "route_prefix": "/",
        "import_path": "deployments.app:build_app",
        "args": to_args(settings),
    }
    path.write_text(yaml.safe_dump({"applications": [application]}, sort_keys=False), encoding="utf-8")


def vocabulary_size(model: Path) -> int:
    """vocab_size of config.json, which multimodal checkpoints keep under text_config. Raises OSError or ValueError."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise ValueError(f"{model / 'config.json'} has no vocab_size")
    return size
