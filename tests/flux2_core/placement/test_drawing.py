"""Where a transformer that draws lies."""

import pytest

from flux2_core.errors import UsageError
from flux2_core.placement import drawing, planner
from tests.flux2_core.jobs import CARD_24, CARD_48, H100, H200, asked, described, limit


@pytest.mark.parametrize(
    ("memory", "wanted"),
    [
        (H200, ("ddp", "bf16")),
        (H100, ("ddp", "bf16")),
        (CARD_48, ("ddp", "int8")),
        (CARD_24, ("stream", "bf16")),
        (10, ("stream", "bf16")),
    ],
)
def test_drawing_fits_every_card_that_trains(memory: float, wanted: tuple[str, str]) -> None:
    """One picture at a time on one card, down to 10 GiB, whatever many cards were told to train with; nothing is kept
    for a backward pass, and an adapter is only its weights."""
    train = {"recompute": "selective", "batch_size": 64, "compile": True}
    many = asked(workers=8, train=train, cluster={"strategy": "fsdp"})
    job = drawing.job(many.config, described("dev"), adapter=100_000_000)
    assert (job.world, job.tokens, job.config.train.compile) == (1, 4096 + 512, False)
    best = planner.decide(job, limit(memory))
    whole = job.tokens * max(planner.block_costs(job, best.precision)["none"])
    assert (best.strategy, best.precision) == wanted
    assert (best.activations, best.adapter) == (0, 4e8)
    assert best.decodes == (memory > 10), "a picture is decoded beside the base, else by the CPU"
    if best.precision == "bf16":
        decoding = 0.34e9 + 3072 * 1024**2 if best.decodes else 0
        assert best.margin == pytest.approx(2e9 + max(decoding, 1.3 * whole))
    if memory < CARD_48:
        whole = drawing.job(asked(cluster={"strategy": "ddp"}).config, described("dev"), adapter=0)
        with pytest.raises(UsageError, match="no placement fits"):
            planner.decide(whole, limit(memory))


def test_a_preview_of_its_own_size_is_planned() -> None:
    """`validate.size` decides where it is set, else the first resolution; references are not drawn from."""
    data = [{"path": "x", "resolutions": [512, 1024], "references": ["y"]}]
    for size, tokens in ((None, 1024), (256, 256)):
        config = asked(data=data, validate={"size": size}).config
        assert drawing.job(config, described("dev"), adapter=0).tokens == tokens + 512
