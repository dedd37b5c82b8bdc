"""One Ray for all HTTP tests; an application is deployed when the first test that wants it comes."""

from collections.abc import Iterator

import pytest

from tests.nurseries import nursery_of_tests
from tests.serving import Serving


@pytest.fixture(scope="package")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For vLLM in the test's own process, and in modules that it runs."""
    with nursery_of_tests(tmp_path_factory.mktemp("nursery") / "log"):
        yield


@pytest.fixture(scope="package")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A running local Ray; call serving.deploy(args) and talk to serving.url."""
    serving = Serving(tmp_path_factory.mktemp("serving") / "log")
    yield serving
    serving.close()
