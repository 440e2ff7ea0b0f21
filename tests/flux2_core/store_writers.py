"""What the writer processes of test_store.py run: a module that imports neither pytest nor torch starts sooner."""

import hashlib
import random

from flux2_core import objects
from flux2_core.errors import DataError
from flux2_core.rows import Row
from flux2_core.store import Table, Writer
from flux2_core.store_reader import Reader

FINGERPRINT = {"layers": [10, 20, 30], "template": "v1"}
SMALL = {"batch_rows": 10, "batch_bytes": 1 << 20}


def row(number: int, *, size: int = 50) -> Row:
    """The one row that belongs to a number: its bytes are a function of the key."""
    key = hashlib.sha256(str(number).encode()).hexdigest()
    return Row(key, random.Random(key).randbytes(size), {"text": f"caption {number} ü", "tokens": number})


def keys_of(numbers) -> list[str]:
    return [row(number).key for number in numbers]


def create(root: str) -> Table:
    return Table.open_or_create(objects.join(root, "text.lance"), kind="text", fingerprint=FINGERPRINT)


def fill(table: Table, numbers, **options) -> int:
    with Writer(table, **{**SMALL, **options}) as writer:
        for number in numbers:
            writer.add(row(number))
    return writer.inserted


def assert_exactly(uri: str, numbers) -> None:
    """The table holds each number's row once and verified, and nothing else."""
    table = Table.open(uri)
    found = list(table.keys())
    assert sorted(found) == sorted(keys_of(numbers))
    expected = {one.key: one for one in map(row, numbers)}
    for one in Reader(table, found).fetch(found):
        assert (bytes(one.payload), one.attributes) == (expected[one.key].payload, expected[one.key].attributes)


def write_share(uri: str, first: int, barrier, results) -> None:
    """Create the table at once with the others, then write 80 of 120 rows."""
    barrier.wait()
    table = Table.open_or_create(uri, kind="text", fingerprint=FINGERPRINT)
    order = [(first + step) % 120 for step in range(80)]
    results.put(fill(table, order))


def race_to_create(uri: str, template: str, barrier, results) -> None:
    """Create a table with a fingerprint of its own; report whose it is, or the refusal."""
    barrier.wait()
    try:
        table = Table.open_or_create(uri, kind="text", fingerprint={"template": template})
        results.put(table.fingerprint["template"])
    except DataError as error:
        results.put(str(error))


def write_until_killed(uri: str, started) -> None:
    """Write what is missing of 400 rows in many small commits."""
    table = Table.open_or_create(uri, kind="text", fingerprint=FINGERPRINT)
    started.set()
    numbers = [number for number in range(400) if row(number).key not in table.present(keys_of(range(400)))]
    fill(table, numbers, batch_rows=5)
