"""``switchyard license``."""

import argparse

from deployments.models import describe_licence

DESCRIPTION = """\
Print the licence terms that apply to a model: a checkpoint folder, or a name of `switchyard models`.

The licence file in the folder decides, and is printed. Without one, weights with the dimensions of a release of xAI
have that release's terms; for other weights the model card's `license:` counts.

  switchyard license /models/grok-2
  switchyard license grok-1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help='folder of a checkpoint, a known model, or "demo"')


def run(arguments: argparse.Namespace) -> int:
    print(describe_licence(arguments.model))
    return 0
