"""python -m tests.told: says what it is and how it came to be, then ends with the status that it is told on stdin."""

import atexit
import json
import os
import sys

if __name__ == "__main__":
    atexit.register(print, "farewell")
    print(json.dumps({"argv": sys.argv, "pid": os.getpid(), "group": os.getpgid(0), "colour": os.environ["COLOUR"]}))
    print("a word", file=sys.stderr)
    sys.stdout.flush()
    sys.exit(int(sys.stdin.readline()))
