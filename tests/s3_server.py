"""A real S3 server on loopback for tests, in a process of its own: moto's, which keeps objects in memory.

`python -m tests.s3_server` prints what reaches it as export lines and serves until its standard input ends, so it goes
when whoever started it goes; with an ADDRESS it serves there, as slowly as a store that is far (tests/fault_proxy.py).
Tests use another server instead where TEST_S3_ENDPOINT names one (its credentials in AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY): Ceph's gateway, MinIO, ministack, ...
"""

import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import boto3

from tests.fault_proxy import proxied

GIVEN = "TEST_S3_ENDPOINT"
FAR_S, FAR_BYTES_PER_S = 0.03, 20e6  # of another region, over a busy line
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@contextmanager
def serve() -> Iterator[dict[str, str]]:
    """The environment that reaches a server, which is ended at the end unless it was given."""
    if GIVEN in os.environ:
        yield environment(os.environ[GIVEN], *(os.environ[name] for name in SECRETS))
        return
    with subprocess.Popen([sys.executable, "-m", "tests.s3_server"], stdin=-1, stdout=-1, text=True) as process:
        line = process.stdout.readline().removeprefix("export ")
        yield dict(part.split("=", 1) for part in line.split())
        process.stdin.close()
        process.wait(20)


def environment(endpoint: str, key: str = "test", secret: str = "test") -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        **dict(zip(SECRETS, (key, secret), strict=True)),
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def new_bucket(reached_by: dict[str, str]) -> str:
    """A fresh bucket's name."""
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    key, secret = (reached_by[name] for name in SECRETS)
    session = boto3.session.Session(aws_access_key_id=key, aws_secret_access_key=secret)
    client = session.client("s3", endpoint_url=reached_by["AWS_ENDPOINT_URL"], region_name=reached_by["AWS_REGION"])
    client.create_bucket(Bucket=bucket)
    return bucket


def main() -> None:
    """Serve until standard input ends."""
    from moto.server import ThreadedMotoServer  # a second to import

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with ExitStack() as stack:
        url = f"http://{host}:{port}"
        if address := next(iter(sys.argv[1:]), None):
            proxy = stack.enter_context(proxied(url, address=address))
            proxy.delay_s, proxy.bytes_per_s, url = FAR_S, FAR_BYTES_PER_S, proxy.url
        sys.stdout.write(f"export {' '.join(f'{name}={value}' for name, value in environment(url).items())}\n")
        sys.stdout.flush()
        sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
