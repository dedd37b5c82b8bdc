"""The ``switchyard`` command: a table of subcommands, each in a module of its own that is imported only when used.

A subcommand's module has DESCRIPTION, add_arguments(parser) and run(arguments) -> exit status.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence

from cluster.errors import ConfigError, SwitchyardError

# name -> (module, one line for --help)
COMMANDS = {
    "serve": ("ops.serve", "start a model on this machine and serve it over HTTP"),
    "plan": ("ops.plan", "say whether a model fits, what runs where, how fast; write the ray-config.yaml"),
    "simulate": ("ops.simulate", "predict how a planned cluster behaves under a load, and when nodes are lost"),
    "up": ("ops.up", "start the head of a cluster of several machines, and serve a model on it"),
    "join": ("ops.join", "give this machine to a cluster"),
    "down": ("ops.down", "stop a cluster, or take this machine out of one"),
    "status": ("ops.status", "show a running cluster: shards, replicas, engines, what happened"),
    "events": ("ops.events", "print what happened in a running cluster, and what happens next"),
    "scale": ("ops.scale", "change how many replicas a shard has"),
    "drain": ("ops.drain", "take a worker out, without losing a request"),
    "restart": ("ops.restart", "replace workers one after the other"),
    "rotate-secret": ("ops.rotate_secret", "change the secret that engines and workers prove to each other"),
    "keys": ("ops.keys", "make, list, replace and revoke API keys"),
    "top": ("ops.top", "watch a running cluster, as htop does a machine"),
    "console": ("ops.console.command", "print a link that opens the web console"),
    "doctor": ("ops.doctor", "check installation, machine and running clusters, and say what to do"),
    "energy": ("ops.energy", "measure joules per token and tokens per kWh of a running cluster"),
    "observe": ("ops.observe.prometheus", "start Prometheus against a running cluster"),
    "convert": (
        "ops.convert",
        "turn Grok-1 as released, or a model's experts into int8 or int4, into a folder to serve",
    ),
    "models": ("ops.models", "list the known models with their shapes and the memory they take"),
    "license": ("ops.license", "print the licence terms that apply to a model"),
    "bench": ("ops.bench", "measure against colocated vLLM, and make benchmark checkpoints"),
    "completion": ("ops.completion", "print a script that completes commands in bash, zsh or fish"),
    "version": ("ops.version", "print the versions of Switchyard and what it stands on"),
}

FAILED = 1
USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. 0: done, 1: it failed, 2: something in the command or the settings is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in words if word in COMMANDS), None)
    arguments = _parser(chosen).parse_args(words)
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(f"switchyard: {error}", file=sys.stderr)
        return USAGE_ERROR
    except SwitchyardError as error:
        print(f"switchyard: {error}", file=sys.stderr)
        return FAILED


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """Imports the chosen subcommand only, so that --help and mistakes are quick."""
    parser = argparse.ArgumentParser(
        prog="switchyard",
        description="Serve mixture-of-experts models with the experts in workers of their own.",
        epilog="switchyard COMMAND --help says more about one command.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        if importlib.util.find_spec(module_name) is None:
            continue
        if name != chosen:
            commands.add_parser(name, help=summary)
            continue
        module = importlib.import_module(module_name)
        command = commands.add_parser(
            name,
            help=summary,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def options_of(name: str) -> list[str]:
    """Every option of a subcommand, in the order of its --help."""
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


if __name__ == "__main__":
    sys.exit(main())
