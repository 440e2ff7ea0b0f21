"""The relay, without Ray: what workers told is taken once, and the driver learns how they ended."""

from flux2_core.errors import DataError, SetupError
from stages.relay import Relay


def test_records_are_taken_once() -> None:
    """Records come in the order in which they were put, each one once."""
    relay = Relay()
    relay.put({"step": 1})
    relay.put({"step": 2})
    assert relay.take() == ([{"step": 1}, {"step": 2}], None, False)
    assert relay.take() == ([], None, False)


def test_the_first_error_stays() -> None:
    """A worker that fails takes the others along: what they say then is not what a person must hear."""
    relay, first = Relay(), DataError("a.png: broken")
    relay.fail(first)
    relay.fail(SetupError("the group was lost"))
    assert relay.take()[1] is first


def test_workers_that_began_anew_are_not_gone() -> None:
    """A notice counts only where it was the last thing told: a crash of the next group is no notice."""
    relay = Relay()
    relay.go()
    assert relay.take()[2]
    relay.put({"step": 3})
    assert not relay.take()[2]
