"""One embedded Ray for all tests of the stages."""

from collections.abc import Iterator

import pytest

from flux2_core.config.sections import Cluster
from stages import cluster


@pytest.fixture(scope="session")
def ray_runtime() -> Iterator[None]:
    """A real Ray on this machine, with room for two actors of each kind."""
    with cluster.connect(Cluster(encoders=2, workers=2)):
        yield
