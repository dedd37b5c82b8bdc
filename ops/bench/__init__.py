"""`switchyard bench`: the comparison with colocated vLLM, the fault suite, and random checkpoints for them.

Measures over HTTP only, as a user would; what it starts are processes. Nothing here runs in a server.
"""

import argparse

from ops.bench import compare, faults, fit, layer_call, make_model, observe, quality, soak, workers

DESCRIPTION = """\
Measure Switchyard against colocated vLLM on this machine.

  switchyard bench make-model /tmp/bench-mixtral       a random Mixtral, 1.4 GB
  switchyard bench make-model /tmp/grok1-wide --shape grok-1 --layers 1
  switchyard bench compare --model /tmp/bench-mixtral  both sides in turn, three rounds; some minutes
  switchyard bench faults --faults sigkill,sigstop     what users notice when workers die or hang
  switchyard bench layer-call                          what a layer call costs beside the kernel; seconds
  switchyard bench observe                             what metrics cost; some minutes
  switchyard bench workers --model /tmp/bench-mixtral  Switchyard with 1, 2 and 4 workers, as JSON
  switchyard bench compare --model /tmp/bench-mixtral --experts int4
  switchyard bench quality                             perplexity of the demo model with int8 and int4 experts
"""

COMMANDS = {
    "make-model": (make_model, "write a checkpoint with random weights"),
    "compare": (compare, "measure colocated vLLM and Switchyard, and print their ratios"),
    "faults": (faults, "kill, freeze and corrupt processes of a cluster under load, and print what users noticed"),
    "soak": (soak, "random faults under load for a long time, and what has leaked after it"),
    "layer-call": (layer_call, "measure one layer call without a kernel, between two processes"),
    "observe": (observe, "measure throughput with metrics on and off, and print the ratio"),
    "workers": (workers, "measure Switchyard with one, two, .. expert workers, and print JSON"),
    "fit": (fit, "make the constants of plans and simulations from that, and say how far off they are"),
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
