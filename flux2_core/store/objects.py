"""Bytes at a URI: a local folder or s3://bucket/prefix, behind the same seven functions.

Endpoint, region and credentials of S3 come from the standard places (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID,
a credentials file, the instance role, ...), never from the configuration. Traded away: other stores (gs://, az://) and
multipart uploads; one object is one PUT (<= 5 GB).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import socket
import stat
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import boto3
import botocore.config
import botocore.exceptions

from flux2_core.errors import SetupError, UsageError
from flux2_core.store import atomic

READ_ATTEMPTS = 6  # botocore retries requests, but not a connection that is reset in the middle of a body
RETRIES = 10  # of one request: at 50 % SlowDown one in 1,000 still fails, and the whole operation is tried again
TIMEOUT_S = 60.0  # of one request; Lance's own limit of 30 s is too short for 64 MB at 2 MB/s
CONNECT_S = 10.0
RENEWAL_WAITS_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)  # for whoever renews the credentials
EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "400"})  # 400: of a HEAD, without body
UNKNOWN_KEY = frozenset({"InvalidAccessKeyId", "InvalidClientTokenId"})
BAD_SECRET = frozenset({"SignatureDoesNotMatch", "InvalidToken", "AuthorizationHeaderMalformed"})
MISSING = frozenset({"NoSuchKey", "404", "NotFound"})
CHANGED = "has changed since it was planned; run again"
CONDITION_HELD = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409"})


def join(root: str, *parts: str) -> str:
    """Append path parts to a folder or s3:// URI."""
    if is_remote(root):
        return "/".join([root.rstrip("/"), *(part.strip("/") for part in parts)])
    return os.path.join(root, *parts)


def is_remote(uri: str) -> bool:
    """Whether the URI names an object store.

    Raises:
        UsageError: a scheme other than s3://.
    """
    scheme, separator, _ = uri.partition("://")
    if separator and scheme != "s3":
        raise UsageError(f"{uri}: unknown scheme {scheme}://; allowed are a local folder or s3://bucket/prefix")
    return bool(separator)


def opened(path: str, *, of: tuple[int, str] | None = None) -> BinaryIO:
    """A local file, opened for reading.

    Raises:
        OSError: nothing is there, it is no regular file (at a pipe one would wait for ever), or its stamp is not `of`.
    """
    file = open(  # noqa: SIM115 - whoever asked for it closes it
        path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
    )
    status = os.fstat(file.fileno())
    regular = stat.S_ISREG(status.st_mode)
    if regular and of in (None, _stamp(status)):
        return file
    file.close()
    raise OSError(errno.ESTALE, CHANGED if regular else "a pipe, socket or device", path)


def read(uri: str, *, span: tuple[int, int] | None = None, of: tuple[int, str] | None = None) -> bytes:
    """All bytes of one object, or those of a span (start, end) in it; with `of` only while that is its `stamp`.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: another object is there, or no regular file.
        SetupError: the store did not answer.
    """
    if not is_remote(uri):
        with opened(uri, of=of) as file:
            file.seek(span[0] if span else 0)
            return file.read(span[1] - span[0] if span else -1)
    bucket, key = _split(uri)
    part = ({"Range": f"bytes={span[0]}-{span[1] - 1}"} if span else {}) | ({"IfMatch": of[1]} if of else {})

    def get(client: Any) -> bytes:
        for attempt in range(READ_ATTEMPTS):
            try:
                return bytes(client.get_object(Bucket=bucket, Key=key, **part)["Body"].read())
            except (
                botocore.exceptions.IncompleteReadError,
                botocore.exceptions.ResponseStreamingError,
                botocore.exceptions.ReadTimeoutError,
            ):
                if attempt == READ_ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    try:
        return bytes(_call(uri, get))
    except FileExistsError:
        raise OSError(errno.ESTALE, CHANGED, uri) from None


def write(uri: str, data: bytes | memoryview) -> None:
    """Put bytes at a URI, whole or not at all (`atomic`; one PUT on S3).

    Raises:
        SetupError: the disk is full, or the store refuses.
    """
    if is_remote(uri):
        bucket, key = _split(uri)
        _call(uri, lambda client: client.put_object(Bucket=bucket, Key=key, Body=bytes(data)))
    else:
        atomic.write(Path(uri), data)


def exists(uri: str) -> bool:
    """Whether an object (not a folder) is at the URI."""
    with contextlib.suppress(FileNotFoundError):
        return bool(stamp(uri)) if is_remote(uri) else Path(uri).is_file()
    return False


def stamp(uri: str) -> tuple[int, str]:
    """Size in bytes of one object, and a text that changes when its bytes do (times and inode; ETag).

    Raises:
        FileNotFoundError: nothing is there.
    """
    if not is_remote(uri):
        return _stamp(os.stat(uri))
    bucket, key = _split(uri)
    head = _call(uri, lambda client: client.head_object(Bucket=bucket, Key=key))
    return int(head["ContentLength"]), str(head["ETag"])


def _stamp(status: os.stat_result) -> tuple[int, str]:
    return status.st_size, f"{status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"  # mtime alone can be restored


def listing(prefix: str) -> Iterator[tuple[str, int]]:
    """(uri, size_bytes) of every object below a folder, in sorted order; nothing where the folder is missing."""
    if not is_remote(prefix):
        for path in sorted(Path(prefix).rglob("*")):
            if path.is_file() and not path.name.startswith(atomic.TEMPORARY):
                yield str(path), path.stat().st_size
        return
    yield from ((uri, size) for uri, (size, _) in stamps(prefix))


def stamps(prefix: str) -> Iterator[tuple[str, tuple[int, str]]]:
    """(uri, `stamp`) of every object below a prefix of a store, in sorted order."""
    bucket, key = _split(prefix)
    query: dict[str, str] = {"Bucket": bucket, "Prefix": key.rstrip("/") + "/" if key else ""}
    while True:
        page = _call(prefix, lambda client: client.list_objects_v2(**query))
        for entry in page.get("Contents", []):
            yield f"s3://{bucket}/{entry['Key']}", (int(entry["Size"]), str(entry["ETag"]))
        if not page.get("IsTruncated"):
            return
        query["ContinuationToken"] = page["NextContinuationToken"]


def delete(uri: str) -> None:
    """Remove one object; nothing happens where there is none."""
    if is_remote(uri):
        bucket, key = _split(uri)
        _call(uri, lambda client: client.delete_object(Bucket=bucket, Key=key))
    else:
        Path(uri).unlink(missing_ok=True)


def delete_below(prefix: str) -> int:
    """Remove every object below a folder, and the folder itself where there are folders; returns the bytes freed."""
    freed = 0
    for uri, size in list(listing(prefix)):
        delete(uri)
        freed += size
    if not is_remote(prefix):
        shutil.rmtree(prefix, ignore_errors=True)
    return freed


def probe(root: str) -> None:
    """Write, read and remove one small object, and see that the store keeps what exactly-once commits rest on.

    Raises:
        SetupError: not writable; or a store that ignores If-None-Match (two writers would lose each other's
            commits), or answers a ranged read with the whole object. The message says what to do.
    """
    uri = join(root, f"probe-{uuid.uuid4().hex}")
    try:
        write(uri, b"0123456789")
        if read(uri) != b"0123456789":
            raise SetupError(f"{root}: read back other bytes than were written; use another store")
        if is_remote(root):
            _probe_conditions(root, uri)
    except OSError as error:
        raise SetupError(
            f"{root}: cannot write there ({error}); give write permission or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(SetupError, OSError):  # the probe's own error, raised already, says more
            delete(uri)


def storage_options() -> dict[str, str]:
    """What Lance needs to reach the same S3 as boto3 does here; it finds the credentials in the same places itself.

    Raises:
        SetupError: there are no credentials.
    """
    _client(_endpoint(), _region(), os.environ.get("AWS_ACCESS_KEY_ID"))
    options = {"client_max_retries": str(RETRIES), "timeout": f"{TIMEOUT_S}s", "connect_timeout": f"{CONNECT_S}s"}
    if endpoint := _endpoint():
        options["aws_endpoint"] = endpoint
        options["allow_http"] = str(endpoint.startswith("http://")).lower()
    if region := _region() or (endpoint and "us-east-1"):  # Lance would ask AWS where the bucket is
        options["aws_region"] = region
    return options


def _probe_conditions(root: str, uri: str) -> None:
    bucket, key = _split(uri)
    try:
        _call(uri, lambda client: client.put_object(Bucket=bucket, Key=key, Body=b"second", IfNoneMatch="*"))
    except FileExistsError:
        pass
    else:
        raise SetupError(
            f"{root}: the store ignores If-None-Match on PUT, so concurrent writers would lose rows; use a store with "
            "conditional writes (AWS S3, Ceph, MinIO, R2, ...) or a shared folder"
        )
    part = _call(uri, lambda client: client.get_object(Bucket=bucket, Key=key, Range="bytes=2-5")["Body"].read())
    if part != b"2345":
        raise SetupError(
            f"{root}: a ranged read of 4 bytes was answered with {len(part)} bytes; rows could not be read one by one; "
            "use a store that honours Range"
        )


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket or "@" in bucket:
        raise UsageError(f"{uri}: no bucket; write s3://bucket/prefix, credentials come from the environment")
    return bucket, key


def _endpoint() -> str | None:
    """The endpoint; one with a password is refused unseen: boto3 and Lance would put it into each of their errors."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "@" in endpoint:
        raise SetupError(
            "AWS_ENDPOINT_URL has a name or password in it: write https://host:port, and put the credentials into "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return endpoint


def _region() -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


@functools.cache
def _client(endpoint: str | None, region: str | None, _access_key: str | None) -> Any:
    """One client a process and identity (boto3 clients are thread-safe, their creation is not and takes 0.1 s)."""
    config = botocore.config.Config(
        retries={"mode": "standard", "max_attempts": RETRIES},
        connect_timeout=CONNECT_S,
        read_timeout=TIMEOUT_S,
        max_pool_connections=32,
    )
    try:
        if endpoint and not urllib.request.getproxies():
            _knock(endpoint)
        session = boto3.session.Session()
        if session.get_credentials() is None:
            raise botocore.exceptions.NoCredentialsError
        return session.client("s3", endpoint_url=endpoint, region_name=region, config=config)
    except (botocore.exceptions.BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no URL
        raise SetupError(f"object storage: {error}; {_advice(error)}") from error


def _knock(endpoint: str) -> None:
    """See whether anything listens there: both clients would try for minutes."""
    parts = urllib.parse.urlsplit(endpoint)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S).close()
    except OSError as error:
        raise SetupError(f"AWS_ENDPOINT_URL={endpoint}: nothing answers there ({error}); correct it") from None


def _call(uri: str, operation: Callable[[Any], Any]) -> Any:
    """Run one request; credentials that are refused are read anew; botocore's errors become ours."""
    for wait_s in (*RENEWAL_WAITS_S, None):
        try:
            return operation(_client(_endpoint(), _region(), os.environ.get("AWS_ACCESS_KEY_ID")))
        except botocore.exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            stale = code in EXPIRED or (code in UNKNOWN_KEY and wait_s == 0.0)
            if wait_s is None or not stale:
                raise _translated(uri, code, error) from error
        except botocore.exceptions.BotoCoreError as error:
            raise SetupError(f"{uri}: the object store did not answer ({error}); {_advice(error)}") from error
        time.sleep(wait_s)
        _client.cache_clear()
    raise AssertionError("unreachable")


def _advice(error: Exception) -> str:
    """Which variable to look at."""
    if isinstance(error, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError):
        return (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE or AWS_SHARED_CREDENTIALS_FILE, or give "
            "the machine a role"
        )
    if isinstance(error, botocore.exceptions.ProfileNotFound):
        return "correct AWS_PROFILE"
    if isinstance(error, botocore.exceptions.NoRegionError | botocore.exceptions.InvalidRegionError):
        return "set AWS_REGION"
    return f"check AWS_ENDPOINT_URL (now {_endpoint()}) and AWS_REGION (now {_region()})"


def _translated(uri: str, code: str, error: botocore.exceptions.ClientError) -> Exception:
    if code in MISSING:
        return FileNotFoundError(errno.ENOENT, "no such object", uri)
    if code in CONDITION_HELD:
        return FileExistsError(errno.EEXIST, "object exists", uri)
    if code == "NoSuchBucket":
        return SetupError(f"{uri}: the bucket does not exist; create it, or correct output.cache or output.mirror")
    advice = f"check AWS_ENDPOINT_URL (now {_endpoint()}) and that the credentials may read, write, list and delete"
    if code in EXPIRED:
        advice = "the credentials have expired: renew them (AWS_SESSION_TOKEN, the credentials file) and run again"
    elif code in UNKNOWN_KEY:
        advice = f"AWS_ACCESS_KEY_ID is not known at AWS_ENDPOINT_URL (now {_endpoint()}): correct one of them"
    elif code in BAD_SECRET:
        advice = "correct AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_REGION"
    return SetupError(f"{uri}: the object store refused ({code or error}); {advice}")
