"""One code path for folders and object storage: the same cache on a real S3 server."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flux2_core.cache.verify import verify_rows
from flux2_core.config.sections import Config
from flux2_core.train.batches import TrainingData
from tests.in_process import fill_cache, process_group

pytestmark = pytest.mark.s3


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


def test_cache_on_s3_serves_the_same_batches(make_config: Callable[..., Config], s3_root: str) -> None:
    """Caching to s3:// and training data read from there give the batches of a local folder, bit for bit."""
    local = make_config()
    remote = make_config(output={"cache": f"{s3_root}/cache"})
    model = fill_cache(local)
    fill_cache(remote)
    ours, theirs = (TrainingData(config, model) for config in (local, remote))
    for step in range(3):
        a, b = ours.batch(step), theirs.batch(step)
        assert a.ids == b.ids
        assert torch.equal(a.latents_Bchw, b.latents_Bchw)
        assert torch.equal(a.prompts_BLD, b.prompts_BLD)
    assert theirs.text.uri.startswith("s3://")
    assert verify_rows(remote, model) == {"rows": 14, "corrupt": [], "missing": []}
