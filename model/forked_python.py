"""`python -m model.forked_python MODULE [ARGUMENT ..]`: what `python -m MODULE ..` is, as a fork of the node's nursery.

For whoever starts Pythons by a command, and so can be told another: Ray, whose replicas would import for ten seconds
and more what the nursery has imported already (model/nursery.py). Without a nursery, or one that forks no modules, it
becomes the Python that was asked for. It does not wait for the fork, whose pid is not its own.
"""

import os
import runpy
import socket
import sys
from collections.abc import Sequence

from model import nursery_client


def main() -> None:
    """Returns when there is a fork; else it is Python from then on."""
    arguments = sys.argv[1:]
    name = os.environ.get(nursery_client.NURSERY)
    nursery = nursery_client.connect(name) if name is not None else None
    if nursery is None or not _has_forked(nursery, arguments):
        os.execv(sys.executable, [sys.executable, "-m", *arguments])


def _has_forked(nursery: socket.socket, arguments: Sequence[str]) -> bool:
    try:
        nursery_client.ask(nursery, nursery_client.MODULE, os.environ, (0, 1, 2), arguments)
    except nursery_client.NurseryFailed as error:
        print(f"{error}; {arguments[0]} starts without it, and takes longer", file=sys.stderr, flush=True)
        return False
    return True


def run(arguments: Sequence[str]) -> int:
    """In the fork: be that module. Returns its exit status."""
    os.setsid()  # whoever signals its group means nobody else
    sys.argv = list(arguments)
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    main()
