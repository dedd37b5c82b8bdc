"""The Ray of the HTTP tests, on a machine with a GPU."""

from tests.e2e.conftest import serving as serving
