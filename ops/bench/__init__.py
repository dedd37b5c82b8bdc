"""`switchyard bench`: the comparison with colocated vLLM, and the random checkpoint it is made with.

Measures over HTTP only, as a user would; what it starts are processes. Nothing here runs in a server.
"""

import argparse

from ops.bench import compare, make_model, quality

DESCRIPTION = """\
Measure Switchyard against colocated vLLM on this machine.

  switchyard bench make-model /tmp/bench-mixtral       a random Mixtral, 1.4 GB
  switchyard bench compare --model /tmp/bench-mixtral  both sides in turn, three rounds; some minutes
  switchyard bench compare --model /tmp/bench-mixtral --experts int4
  switchyard bench quality                             perplexity of the demo model with int8 and int4 experts
"""

COMMANDS = {
    "make-model": (make_model, "write a random Mixtral checkpoint"),
    "compare": (compare, "measure colocated vLLM and Switchyard, and print their ratios"),
    "quality": (quality, "measure what int8 and int4 experts cost the demo model in perplexity"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `switchyard bench`."""
    commands = parser.add_subparsers(dest="bench_command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=summary, description=summary.capitalize() + "."))


def run(arguments: argparse.Namespace) -> int:
    """Exit status of the chosen subcommand."""
    module, _ = COMMANDS[arguments.bench_command]
    return int(module.run(arguments))
