"""`python -m deployments.ray_worker SCRIPT [ARGUMENT ..]`: Ray's worker script, in a fork of the node's nursery.

Ray titles its processes by what they do, but finds no room for a title where the nursery has set its own.
"""

import runpy
import sys


def main() -> None:
    from ray import _raylet
    from setproctitle import setproctitle

    _raylet.setproctitle = setproctitle  # type: ignore[attr-defined]
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
