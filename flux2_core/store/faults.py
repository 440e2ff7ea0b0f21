"""What a failing store means to a person, and which failures are worth another try."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from flux2_core.errors import CacheloomError, DataError, SetupError
from flux2_core.store import objects

T = TypeVar("T")

RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # on top of the object-store client's own ten retries
FULL = re.compile(r"no space left|quota exceeded|file too large|os error (27|28|122)\b", re.IGNORECASE)
DENIED = re.compile(
    r"permission denied|read-only file system|access ?denied|forbidden|invalidaccesskeyid|signaturedoesnotmatch",
    re.IGNORECASE,
)
CONFLICT = re.compile(r"commit conflict|concurrent|conflicting transaction", re.IGNORECASE)
# The answer to a HEAD has no body that could say more.
EXPIRED = re.compile(
    r"expired ?token|requestexpired|token.{0,20}expired|performing HEAD .*400 Bad Request", re.IGNORECASE | re.DOTALL
)
NETWORK = re.compile(
    r"generic s3 error|error sending request|max_retries|connection|timed? ?out|slowdown", re.IGNORECASE
)
ABSENT = re.compile(r"not found|nosuchkey|nosuchbucket", re.IGNORECASE)
NO_BUCKET = re.compile(r"nosuchbucket|list request.*404", re.IGNORECASE | re.DOTALL)
ANSWER = re.compile(r"(<\?xml[^>]*>\s*)?<Error>.*?(</Error>|$)", re.DOTALL)  # of an S3 store
DAMAGED = re.compile(r"corrupt|panicked|protobuf|decode|invalid (file|data|input|user input)|magic", re.IGNORECASE)


def patiently(
    operation: Callable[[], T],
    *,
    uri: str,
    waits_s: Sequence[float],
    before_retry: Callable[[], object] | None = None,
) -> T:
    """Run an idempotent operation, again after each wait where the failure may pass.

    Raises:
        DataError: the table is damaged.
        SetupError: disk full, no permission, or the store still fails after the last wait.
    """
    for attempt in range(len(waits_s) + 1):
        try:
            with explained(uri):
                if attempt and before_retry is not None:
                    before_retry()
                return operation()
        except CacheloomError as failure:
            last = attempt == len(waits_s)
            if last or failure.__cause__ is None or not passes(failure.__cause__, uri):
                raise
        time.sleep(waits_s[attempt])
    raise AssertionError("unreachable")


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn what Lance raises, a panic of its Rust code included, into a DataError or SetupError with the way out."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, NotImplementedError, KeyError) as error:
        raise explanation(_cut(error), uri) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3's class cannot be imported
            raise
        raise explanation(_cut(error), uri) from error


def explanation(error: BaseException, uri: str) -> CacheloomError:
    """The error as a person needs it: what was given, what is wrong, what to do."""
    text = _first_line(error)
    remote = objects.is_remote(uri)
    if FULL.search(text):
        return SetupError(f"{uri}: the disk is full or a quota is reached ({text}); free space and run the same again")
    if DENIED.search(text):
        return SetupError(f"{uri}: access denied ({text}); give read and write permission there, or other credentials")
    if remote and NO_BUCKET.search(text):
        return SetupError(f"{uri}: the bucket does not exist; create it, or correct output.cache")
    if CONFLICT.search(text):
        return SetupError(f"{uri}: too many writers at once ({text}); run the same again, nothing is lost")
    if remote and EXPIRED.search(str(error)):
        return SetupError(f"{uri}: the credentials have expired; renew AWS_SESSION_TOKEN or the file and run again")
    if remote and passes(error, uri):
        return SetupError(f"{uri}: the object store did not answer ({text}); check AWS_ENDPOINT_URL and run again")
    return DataError(f"{uri}: cannot be read, the table is damaged ({text}); restore it or remove it, then cache again")


def passes(error: BaseException, uri: str) -> bool:
    """Whether the same operation may succeed a little later."""
    text = str(error)
    if CONFLICT.search(text):
        return True
    if not objects.is_remote(uri):
        return False
    if EXPIRED.search(text) or "NoSuchUpload" in text:  # renewed meanwhile; started anew
        return True
    if any(pattern.search(text) for pattern in (FULL, DENIED, ABSENT, DAMAGED)):
        return False
    return isinstance(error, OSError | RuntimeError) or NETWORK.search(text) is not None


def _cut(error: BaseException) -> BaseException:
    """The error with no more of a store's answer than its code and message.

    AWS answers a wrong signature with all of the request, the session token too, and what one of our errors was raised
    from stands in Prefect's logs.
    """
    if (found := ANSWER.search(text := str(error))) is not None:
        said = " ".join(re.findall(r"<(?:Code|Message)>(.*?)</", found[0], re.DOTALL))
        error.args = (text[: found.start()] + said + text[found.end() :],)
    return error


def _first_line(error: BaseException) -> str:
    """Lance appends the place in its Rust source to every message; a person does not need it."""
    text = re.sub(r",? ?/?[\w./-]*\.rs:\d+:\d+", "", str(error)).strip() or type(error).__name__
    return text.splitlines()[0][:400]
