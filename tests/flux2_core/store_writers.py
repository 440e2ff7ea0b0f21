"""What the writer processes of test_store_processes.py run; imports neither pytest nor torch, which take seconds."""

import hashlib
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path

from flux2_core.errors import DataError, SetupError
from flux2_core.store import objects
from flux2_core.store.reader import Reader
from flux2_core.store.row import Row
from flux2_core.store.table import Table
from flux2_core.store.writer import Writer

FINGERPRINT = {"layers": [10, 20, 30], "template": "v1"}
SMALL = {"batch_rows": 10, "batch_bytes": 1 << 20}


def row(number: int, *, size: int = 50) -> Row:
    """The one row that belongs to a number: its bytes are a function of the key."""
    key = hashlib.sha256(str(number).encode()).hexdigest()
    return Row(key, random.Random(key).randbytes(size), {"text": f"caption {number} ü", "tokens": number})


def like_text(number: int) -> Row:
    """A row of the sizes of prompt rows: ragged, 20 to 100 kB."""
    return row(number, size=1_024 * (20 + 8 * (number % 11)))


def keys_of(numbers) -> list[str]:
    return [row(number).key for number in numbers]


def create(root: str) -> Table:
    return Table.open_or_create(objects.join(root, "text.lance"), kind="text", fingerprint=FINGERPRINT)


def fill(table: Table, numbers, **options) -> int:
    with Writer(table, **{**SMALL, **options}) as writer:
        for number in numbers:
            writer.add(row(number))
    return writer.inserted


def assert_exactly(uri: str, numbers, *, make=row) -> None:
    """The table holds each number's row once and verified, and nothing else."""
    table = Table.open(uri)
    found = list(table.keys())
    assert sorted(found) == sorted(keys_of(numbers))
    expected = {one.key: one for one in map(make, numbers)}
    for one in Reader(table, found).fetch(found):
        assert (bytes(one.payload), one.attributes) == (expected[one.key].payload, expected[one.key].attributes)


def race_to_create(uri: str, template: str, barrier, results) -> None:
    """Create a table with a fingerprint of its own; report whose it is, or the refusal."""
    barrier.wait()
    try:
        table = Table.open_or_create(uri, kind="text", fingerprint={"template": template})
        results.put(table.fingerprint["template"])
    except DataError as error:
        results.put(str(error))


def reaching(storage: dict[str, str], function, *given) -> None:
    """Run a function with an environment: a process of the fork server has the one that the server began with."""
    os.environ.update(storage)
    function(*given)


def encoded(log: str) -> list[int]:
    """Numbers that a writer process encoded, as it noted them before it handed each row over."""
    return [int(line) for line in Path(log).read_text().split()] if Path(log).exists() else []


def write_until_killed(uri: str, order: list[int], log: str, die_at: int, die_after_s: float) -> None:
    """Encode what is missing of `order`; a moment after row `die_at` the process kills itself, wherever it then is."""
    table = Table.open_or_create(uri, kind="text", fingerprint=FINGERPRINT)
    there = table.present(keys_of(order))
    with Path(log).open("a", buffering=1) as notes, Writer(table, **SMALL) as writer:
        for place, number in enumerate(number for number in order if row(number).key not in there):
            if place == die_at:
                threading.Timer(die_after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
            made = like_text(number)
            notes.write(f"{number}\n")
            writer.add(made)
    time.sleep(die_after_s if die_at >= 0 else 0)


def write_into_little(uri: str, limit_bytes: int, results) -> None:
    """Write 40 rows where no file may grow beyond a limit, as on a disk that fills; report the refusal."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    try:
        table = Table.open_or_create(uri, kind="text", fingerprint=FINGERPRINT)
        with Writer(table, **SMALL) as writer:
            for number in range(40):
                writer.add(like_text(number))
    except SetupError as error:
        results.put(str(error))
    results.put("")
