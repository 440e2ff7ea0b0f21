"""Pictures that previews show the model beside a prompt: rows of the samples table that are no samples.

As rows they are encoded, leased, verified and kept like everything else that is named there. Their id is the key of the
configuration that names them, so that whoever misses one says where it comes from.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from flux2_core.config.sections import Config
from flux2_core.data.pictures import load
from flux2_core.data.pictures.buckets import CELL
from flux2_core.data.samples import Keys, reference_area, reference_transform
from flux2_core.errors import DataError
from flux2_core.store import schemas


def beside(samples: pa.Table, config: Config, keys: Keys) -> pa.Table:
    """The samples, and behind them a row for each reference of each prompt, in their order.

    Raises:
        DataError: a picture is missing, broken or too small; names its key.
    """
    side, size, found = config.preview_size, config.data[0].reference_size, []
    area = reference_area(size, side, side * side)
    for number, prompt in enumerate(config.validation.prompt):
        for place, uri in enumerate(prompt.references):
            name = f"validate.prompt.{number}.references.{place}"
            seen = load.inspect(uri, decode=True, latents=config.latents)
            problem = seen.problem or (f"under {CELL} px" if min(seen.width, seen.height) < CELL else None)
            if problem:
                raise DataError(f"{name}={uri!r}: {problem}")
            transform = reference_transform(seen, area, enlarged=size == "target")
            row = {"id": name, "uri": uri, "sha256": seen.sha256, "width": seen.width, "height": seen.height}
            row |= {"variant": 0, "latent_key": keys.latent(seen.sha256, transform), **vars(transform)}
            row |= {"captions": [], "text_keys": [], "roles": [], "references": [], "mask": None}
            row |= {"dataset": 0, "repeats": 0, "weight": 0.0, "regularisation": False, "split": schemas.PREVIEW}
            found.append(row | {"pixels_lost": transform.pixels_lost})
    if not found:
        return samples
    return pa.concat_tables([samples, pa.Table.from_pylist(found, schema=samples.schema)])


def left_out(samples: pa.Table) -> pa.Table:
    """The samples alone, without what previews show."""
    return samples.filter(pc.not_equal(samples.column(schemas.SPLIT), schemas.PREVIEW))
