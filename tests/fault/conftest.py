"""One Ray for all tests of faults; an application is deployed when the first test that wants it comes."""

from collections.abc import Iterator

import pytest

from tests.serving import REPLICATED, Serving


@pytest.fixture(scope="package")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A running local Ray; call serving.deploy(args) and talk to serving.url."""
    serving = Serving(tmp_path_factory.mktemp("serving") / "log")
    yield serving
    serving.close()


@pytest.fixture(scope="package")
def replicated(serving: Serving) -> Serving:
    """Two shards of two replicas each."""
    serving.deploy(REPLICATED)
    return serving
