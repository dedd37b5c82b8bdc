"""The worked plans: inventories and, for each case, what `switchyard plan` says. `python -m tests.worked_plans` writes
the latter anew, after a change that is meant to change them."""

import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

from ops.cli import main

FOLDER = Path(__file__).with_name("plans")


@dataclass(frozen=True)
class Case:
    """`fits` is what is expected; `options` are more words of the command."""

    model: str
    inventory: str
    experts: str
    fits: bool
    options: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.model}.{self.inventory}.{self.experts}.txt"

    @property
    def command(self) -> list[str]:
        inventory = f"tests/plans/{self.inventory}.yaml"
        return ["plan", "--model", self.model, "--experts", self.experts, "--inventory", inventory, *self.options]


CASES = (
    Case("grok-1", "8x80gb", "bf16", False),
    Case("grok-1", "8x80gb", "int8", True),
    Case("grok-1", "8x40gb", "int8", False),
    Case("grok-1", "8x40gb", "int4", True),
    Case("grok-1", "4x24gb-512gb-host", "int8", True, ("--host-experts",)),
    Case("grok-1", "two-unequal", "int8", True),
    Case("grok-2", "8x80gb", "bf16", True),
    Case("grok-2", "8x40gb", "bf16", False),
    Case("grok-2", "8x40gb", "int4", True),
    Case("grok-2", "4x24gb-512gb-host", "int4", False, ("--host-experts",)),
    Case("grok-2", "two-unequal", "int8", True),
)


def said(case: Case) -> tuple[int, str]:
    """Exit status and what is printed, after the command itself."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.chdir(FOLDER.parents[1]):
        status = main(case.command)
    return status, f"$ switchyard {' '.join(case.command)}\n{output.getvalue()}"


if __name__ == "__main__":
    for case in CASES:
        status, text = said(case)
        assert (status == 0) == case.fits, f"{case}: {text}"
        case.path.write_text(text, encoding="utf-8")
        print(os.path.relpath(case.path))
