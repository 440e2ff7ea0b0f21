"""An S3 server on loopback, and one root per kind of storage for tests that must hold on both."""

import os
from collections.abc import Iterator

import pytest

from tests import s3_server
from tests.fault_proxy import Proxy, proxied


@pytest.fixture(scope="session")
def s3_server_environment() -> Iterator[dict[str, str]]:
    """The environment that reaches the tests' S3 server."""
    with s3_server.serve() as reached_by:
        yield reached_by


@pytest.fixture
def s3_root(s3_server_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket, with the environment that reaches it."""
    for name, value in s3_server_environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.new_bucket(s3_server_environment)}/team"


@pytest.fixture
def proxy(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The S3 server of `s3_root` behind a network that can be made bad."""
    with proxied(os.environ["AWS_ENDPOINT_URL"]) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        yield made


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest) -> str:
    """A place for tables: a temporary folder, and an S3 bucket."""
    if request.param == "s3":
        return request.getfixturevalue("s3_root")
    return str(request.getfixturevalue("tmp_path") / "team")
