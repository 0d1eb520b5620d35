"""S3Store: requests that fail, lost answers, killed writers, objects of other programs, and copies on this machine."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cluster.storage.manifest import ArtifactRef
from cluster.storage.open import artifact_url, open_store
from cluster.storage.s3_address import parse
from cluster.storage.s3_store import S3Store
from cluster.storage.s3_upload import PART_BYTES, part_size

# botocore leaves it to the garbage collector to close connections whose answer was cut short.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

Fault = Callable[[str, str], int | str | None]
"""The fault for a method and a path with its query: a status to answer instead of the service, `drop` to lose the
answer, `half` to lose half of it, `strip` to remove the condition from the request, or None."""


class Proxy:
    """A proxy between a store and its service: it records all requests and injects faults."""

    def __init__(self, service: str) -> None:
        proxy = self
        self.requests: list[str] = []
        self.fault: Fault = lambda method, path: None

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.requests.append(f"{self.command} {self.path}")
                fault = proxy.fault(self.command, self.path)
                if isinstance(fault, int):
                    code = {
                        403: "AccessDenied",
                        404: "NoSuchUpload",
                        409: "ConditionalRequestConflict",
                        503: "SlowDown",
                    }.get(fault, "InternalError")
                    self.send(
                        fault,
                        {},
                        f"<Error><Code>{code}</Code><Message>user/jane may not</Message></Error>".encode(),
                    )
                    return
                headers = {name: value for name, value in self.headers.items() if name != "Expect"}
                if fault == "strip":
                    headers.pop("If-None-Match", None)
                connection = http.client.HTTPConnection(urlsplit(service).netloc, timeout=60)
                try:
                    connection.request(self.command, self.path, body, headers)
                    response = connection.getresponse()
                    content = response.read()
                finally:
                    connection.close()
                if response.status == 500 and "uploadId=" in self.path:
                    # moto fails if a part comes after the end of its upload; S3 answers that there is no such upload.
                    self.send(404, {}, b"<Error><Code>NoSuchUpload</Code></Error>")
                    return
                if fault == "half" and len(content) > 1:
                    self.send(
                        response.status, {"Content-Length": str(len(content))}, content[: len(content) // 2]
                    )
                if fault in ("drop", "half"):
                    self.close_connection = True
                    return
                dropped = ("connection", "transfer-encoding", "date", "server", "content-length")
                passed = {name: value for name, value in response.getheaders() if name.lower() not in dropped}
                length = response.getheader("Content-Length")
                if self.command == "HEAD" and length:
                    passed["Content-Length"] = length
                self.send(response.status, passed, content)

            def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda request, client: None  # of clients that were killed
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def requests_with(self, *words: str) -> list[str]:
        """Return the requests so far that contain all of these words."""
        matching = []
        for request in self.requests:
            if all(word in request for word in words):
                matching.append(request)
        return matching


@pytest.fixture
def proxy(s3_server: str) -> Iterator[Proxy]:
    started = Proxy(s3_server)
    yield started
    started.server.shutdown()
    started.server.server_close()


@pytest.fixture
def address(s3_address: str, s3_server: str, proxy: Proxy) -> str:
    """The address of an empty store, through the proxy."""
    return s3_address.replace(s3_server, f"http://127.0.0.1:{proxy.server.server_port}")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


def bucket_of(address: str) -> str:
    return parse(address).bucket


def test_if_a_third_of_all_requests_fails_nothing_is_lost_or_counted_twice(
    address: str, proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    draw = random.Random(0)
    injected: list[int] = []

    def fault(method: str, path: str) -> int | str | None:
        if draw.random() >= 0.3:
            return None
        injected.append(1)
        # The request of a lost answer has had its effect.
        return draw.choice([500, 503, "drop", "half"])

    proxy.fault = fault
    (model / "sub" / "large").write_bytes(os.urandom(2 * PART_BYTES + 5))
    store = S3Store(address)
    store.check()
    ref = store.put(model)
    store.fetch(ref, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(model)
    for number in range(12):
        assert store.commit(f"results/{number}", {"number": number})
        assert not store.commit(f"results/{number}", {"number": -1})
        assert store.record(f"results/{number}") == {"number": number}
    assert len(list(store.records("results/"))) == 12
    assert len(store.holdings().artifacts) == 1
    store.remove(ref)
    assert not store.has(ref)
    assert len(injected) > 25


def test_a_commit_whose_answer_was_lost_has_won_and_the_same_content_of_another_has_not(
    address: str, proxy: Proxy
) -> None:
    lost: list[str] = []

    def fault(method: str, path: str) -> int | str | None:
        if method == "PUT" and not lost:
            lost.append(path)
            return "drop"
        return None

    proxy.fault = fault
    store = S3Store(address)
    assert store.commit("results/01", {"a": 1})
    assert len(proxy.requests_with("PUT", "results/01")) == 2
    assert not store.commit("results/01", {"a": 1})


def test_a_commit_that_collides_with_another_is_tried_again(address: str, proxy: Proxy) -> None:
    proxy.fault = lambda method, path: 409 if len(proxy.requests) < 3 else None
    assert S3Store(address).commit("results/01", {"a": 1})
    assert len(proxy.requests) == 3


def test_processes_that_put_the_same_folder_at_once_all_succeed(
    address: str, model: Path, tmp_path: Path
) -> None:
    (model / "sub" / "large").write_bytes(os.urandom(PART_BYTES + 5))
    with ThreadPoolExecutor(4) as pool:
        refs = {*pool.map(lambda _: S3Store(address, tmp_path / "here").put(model), range(4))}
    (ref,) = refs
    store = S3Store(address)
    assert [artifact.ref for artifact in store.holdings().artifacts] == [ref]
    store.fetch(ref, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(model)


def test_an_upload_resumes_with_its_missing_parts(
    address: str, proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    (model / "sub" / "large").write_bytes(os.urandom(4 * PART_BYTES + 5))
    proxy.fault = lambda method, path: 503 if "partNumber=4" in path else None
    with pytest.raises(
        TimeoutError, match=r"s3:PutObject on .*large.* failed 1 times, the last time with SlowDown"
    ):
        S3Store(address, attempts=1).put(model)
    sent = {path for path in proxy.requests_with("PUT", "partNumber=") if "partNumber=4" not in path}
    assert sent
    proxy.fault = lambda method, path: None
    proxy.requests.clear()
    store = S3Store(address)
    ref = store.put(model)
    again = proxy.requests_with("PUT", "files/")
    assert len(again) == 5 - len(sent)
    assert not sent & {*again}
    assert store.holdings().unfinished_bytes == 0
    proxy.requests.clear()
    assert store.put(model) == ref
    assert proxy.requests_with("PUT", "files/") == []
    store.fetch(ref, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(model)


@pytest.mark.parametrize("swept", [True, False])
def test_an_upload_that_another_process_ended_is_complete_or_starts_anew(
    address: str, proxy: Proxy, s3: Any, model: Path, tmp_path: Path, swept: bool
) -> None:
    (model / "sub" / "large").write_bytes(os.urandom(PART_BYTES + 5))
    ended: list[str] = []

    def fault(method: str, path: str) -> int | None:
        if "partNumber=2" not in path or ended:
            return None
        ended.append(path)
        if swept:
            S3Store(address).sweep(0)
        else:
            S3Store(address).put(model)
        return 404

    proxy.fault = fault
    store = S3Store(address)
    ref = store.put(model)
    assert ended
    store.fetch(ref, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(model)


def test_a_part_with_other_content_is_sent_again(address: str, s3: Any, model: Path, tmp_path: Path) -> None:
    (model / "sub" / "large").write_bytes(os.urandom(PART_BYTES + 5))
    ref = S3Store(address).put(model)
    key = next(
        item["Key"]
        for item in s3.list_objects_v2(Bucket=bucket_of(address))["Contents"]
        if "large" in item["Key"]
    )
    bucket = bucket_of(address)
    s3.delete_object(Bucket=bucket, Key=key)
    upload = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    s3.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=os.urandom(PART_BYTES))
    store = S3Store(address)
    assert store.put(model) == ref
    store.fetch(ref, tmp_path / "copy")


KILLED_WRITER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from cluster.storage.s3_store import S3Store

    store = S3Store(sys.argv[1])
    ref = store.put(Path(sys.argv[2]))
    store.commit("results/01", {"perplexity": 12.5})
    store.remove(ref)
    """
)


def test_a_writer_killed_at_any_request_leaves_all_or_nothing(
    address: str, proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    ref = S3Store(address).put(model)
    S3Store(address).remove(ref)
    states = set()
    for fatal in range(1, 30):
        store_address = address.replace("/of/a/team", f"/{fatal}")
        first_request = len(proxy.requests)
        arguments = [sys.executable, "-c", KILLED_WRITER, store_address, str(model)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with subprocess.Popen(arguments, env=environment) as writer:

            def fault(
                method: str, path: str, fatal: int = first_request + fatal, pid: int = writer.pid
            ) -> str | None:
                if len(proxy.requests) == fatal:
                    os.kill(pid, signal.SIGKILL)
                return None

            proxy.fault = fault
        proxy.fault = lambda method, path: None
        store = S3Store(store_address)
        if store.has(ref):
            store.fetch(ref, tmp_path / f"copy-{fatal}")
            assert contents(tmp_path / f"copy-{fatal}") == contents(model)
        states.add(store.has(ref))
        record = store.record("results/01")
        assert record in (None, {"perplexity": 12.5})
        assert store.put(model) == ref
        assert store.commit("results/01", {}) == (record is None)
        if writer.returncode == 0:
            break
        assert writer.returncode == -signal.SIGKILL
    assert writer.returncode == 0
    assert fatal > 5
    assert states == {True, False}


def test_unfinished_writes_of_killed_writers_are_counted_and_swept_and_recent_ones_stay(
    address: str, proxy: Proxy, model: Path
) -> None:
    store = S3Store(address)
    ref = store.put(model)
    (model / "sub" / "large").write_bytes(os.urandom(2 * PART_BYTES))
    proxy.fault = lambda method, path: 503 if method == "POST" and "uploadId=" in path else None
    with pytest.raises(TimeoutError, match="s3:PutObject"):
        S3Store(address, attempts=1).put(model)
    proxy.fault = lambda method, path: None
    expected_bytes = 2 * PART_BYTES + 100_002
    assert store.holdings().unfinished_bytes == expected_bytes
    store.sweep(60)
    assert store.holdings().unfinished_bytes == expected_bytes
    store.sweep(0)
    assert store.holdings().unfinished_bytes == 0
    assert [artifact.ref for artifact in store.holdings().artifacts] == [ref]
    store.put(model)


def test_a_missing_bucket_or_object_is_one_line(address: str, s3: Any, model: Path) -> None:
    bucket = bucket_of(address)
    absent = S3Store(address.replace(bucket, "no-such-bucket"))
    for do in (absent.check, lambda: absent.put(model), lambda: absent.record("results/01")):
        with pytest.raises(
            FileNotFoundError, match=r"^there is no bucket no-such-bucket at http://\S+: create it"
        ):
            do()
    denied = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:PutObject",
        "Resource": f"arn:aws:s3:::{bucket}/*",
    }
    s3.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [denied]}))
    store = S3Store(address)
    for do in (store.check, lambda: store.put(model), lambda: store.commit("results/01", {})):
        with pytest.raises(
            PermissionError, match=r"^these credentials may not do s3:PutObject on s3://b-.*$"
        ):
            do()


@pytest.mark.parametrize(
    ("method", "query", "permission"),
    [("GET", "list-type=2", "s3:ListBucket"), ("GET", "probe/", "s3:GetObject"),
     ("DELETE", "probe/", "s3:DeleteObject"), ("DELETE", "uploadId", "s3:AbortMultipartUpload"),
     ("GET", "?uploads", "s3:ListBucketMultipartUploads")]
)  # fmt: skip
def test_the_check_uses_each_permission_that_a_study_needs(
    address: str, proxy: Proxy, method: str, query: str, permission: str
) -> None:
    S3Store(address).check()
    proxy.fault = lambda request_method, path: 403 if request_method == method and query in path else None
    with pytest.raises(PermissionError, match=f"may not do {permission} on s3://"):
        S3Store(address).check()


def test_a_service_that_overwrites_in_spite_of_the_condition_is_refused(address: str, proxy: Proxy) -> None:
    proxy.fault = lambda method, path: "strip"
    with pytest.raises(OSError, match="If-None-Match"):
        S3Store(address).check()


def test_a_check_leaves_no_object_and_no_upload(address: str, s3: Any) -> None:
    S3Store(address).check()
    bucket = bucket_of(address)
    assert s3.list_objects_v2(Bucket=bucket)["KeyCount"] == 0
    assert not s3.list_multipart_uploads(Bucket=bucket).get("Uploads")


def test_missing_credentials_or_services_are_one_line(
    address: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.fault = lambda method, path: 500
    with pytest.raises(
        TimeoutError, match=r"s3:GetObject on .* failed 2 times, the last time with InternalError"
    ) as raised:
        S3Store(address, attempts=2).record("results/01")
    assert len(proxy.requests) == 2
    # The record of a failure contains its whole traceback.
    assert "jane" not in "".join(traceback.format_exception(raised.value))
    with pytest.raises(TimeoutError, match="failed 2 times, the last time with EndpointConnectionError"):
        S3Store("s3://bucket?endpoint=http://127.0.0.1:9", attempts=2).record("results/01")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(PermissionError, match="no AWS credentials were found"):
        S3Store(address).check()
    monkeypatch.setenv("AWS_PROFILE", "unheard-of")
    with pytest.raises(OSError, match="unheard-of"):
        S3Store(address)


def forged(s3: Any, address: str, entries: list[list[object]]) -> ArtifactRef:
    """Write an artifact with any manifest, as S3Store would not."""
    content = json.dumps(entries).encode()
    digest = hashlib.sha256(content).hexdigest()
    s3.put_object(Bucket=bucket_of(address), Key=f"of/a/team/objects/{digest}/manifest.json", Body=content)
    return ArtifactRef(digest, 1)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "", "a//b", ".", "a\n"])
def test_names_from_the_bucket_that_would_leave_the_folder_are_refused(
    address: str, s3: Any, tmp_path: Path, name: str
) -> None:
    ref = forged(s3, address, [[name, 1, "0" * 64]])
    with pytest.raises(OSError, match="no name of a file"):
        S3Store(address).fetch(ref, tmp_path / "below" / "copy")
    assert not list(tmp_path.rglob("*evil*"))
    assert not (tmp_path / "below" / "copy").exists()


def test_the_url_of_an_artifact_is_the_prefix_of_its_files(address: str, s3: Any, model: Path) -> None:
    bucket, _, key = (
        artifact_url(address, open_store(address).put(model).digest).removeprefix("s3://").partition("/")
    )
    content = s3.get_object(Bucket=bucket, Key=f"{key}/sub/weights")["Body"].read()
    assert content == (model / "sub" / "weights").read_bytes()


def test_a_name_that_a_bucket_cannot_list_is_not_put(address: str, model: Path) -> None:
    (model / "a\x01b").write_bytes(b"x")
    with pytest.raises(ValueError, match="no name of a file"):
        S3Store(address).put(model)


def test_objects_of_other_programs_are_no_records_and_no_artifacts(address: str, s3: Any) -> None:
    for key in ("records/results/", "records/results/../x.json", "records/results/.a.json", "objects/readme",
                "records/results/a.txt", "objects/../x/manifest.json"):  # fmt: skip
        s3.put_object(Bucket=bucket_of(address), Key=f"of/a/team/{key}", Body=b"{}")
    store = S3Store(address)
    assert store.commit("results/01", {})
    assert list(store.records("")) == ["results/01"]
    assert store.holdings().artifacts == ()


@pytest.mark.parametrize("changed", ["files/sub/weights", "manifest.json"])
def test_damaged_content_is_not_fetched(
    address: str, s3: Any, model: Path, tmp_path: Path, changed: str
) -> None:
    store = S3Store(address)
    ref = store.put(model)
    location = {"Bucket": bucket_of(address), "Key": f"of/a/team/objects/{ref.digest}/{changed}"}
    content = bytearray(s3.get_object(**location)["Body"].read())
    content[50] ^= 1
    s3.put_object(**location, Body=bytes(content))
    with pytest.raises(OSError, match="damaged"):
        store.fetch(ref, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    store.remove(ref)
    store.put(model)
    store.fetch(ref, tmp_path / "copy")


def test_an_artifact_that_lacks_a_file_is_absent_and_can_be_put_again(
    address: str, s3: Any, model: Path, tmp_path: Path
) -> None:
    store = S3Store(address)
    ref = store.put(model)
    s3.delete_object(Bucket=bucket_of(address), Key=f"of/a/team/objects/{ref.digest}/files/sub/weights")
    with pytest.raises(LookupError, match=ref.digest):
        store.fetch(ref, tmp_path / "copy")
    assert not store.has(ref)
    store.put(model)
    store.fetch(ref, tmp_path / "copy")


def test_an_artifact_that_was_put_or_fetched_on_this_machine_is_not_downloaded_again(
    address: str, proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    ref = open_store(address).put(model)
    first, second = (S3Store(address, tmp_path / name) for name in ("first", "second"))
    second.put(model)
    proxy.requests.clear()
    second.fetch(ref, tmp_path / "copy-0")
    assert proxy.requests_with("GET", "files/") == []
    first.fetch(ref, tmp_path / "copy-1")
    assert len(proxy.requests_with("GET", "files/")) == 2
    again = S3Store(address, tmp_path / "first")  # as another process of this machine
    again.fetch(ref, tmp_path / "copy-2")
    assert len(proxy.requests_with("GET", "files/")) == 2
    assert contents(tmp_path / "copy-2") == contents(tmp_path / "copy-0") == contents(model)
    assert (tmp_path / "copy-2" / "config.json").stat().st_nlink == 3
    (copy,) = (tmp_path / "first" / "objects").rglob("config.json")
    copy.chmod(0o644)
    copy.write_bytes(b"[]")
    again.fetch(ref, tmp_path / "third")
    assert contents(tmp_path / "third") == contents(model)
    assert len(proxy.requests_with("GET", "files/")) == 4
    second.remove(ref)
    with pytest.raises(LookupError, match=ref.digest):
        again.fetch(ref, tmp_path / "fourth")


def test_copies_beyond_the_limit_are_removed_the_longest_unused_first(
    address: str, model: Path, tmp_path: Path
) -> None:
    store = S3Store(f"{address}&cache_gb=0.00025", tmp_path / "here")  # 250 kB
    refs = []
    for number in range(4):
        (model / "number").write_text(str(number))
        refs.append(store.put(model))
        for folder in (tmp_path / "here" / "objects").glob(f"*/{refs[-1].digest}"):
            os.utime(folder, (1000 + number, 1000 + number))
    copies = {folder.name for folder in (tmp_path / "here" / "objects").glob("*/*")}
    assert copies == {refs[2].digest, refs[3].digest}
    store.fetch(refs[0], tmp_path / "copy")


def test_a_fetch_counts_as_a_use(address: str, s3: Any, model: Path, tmp_path: Path) -> None:
    store = S3Store(address, tmp_path / "here")
    ref = store.put(model)
    location = {"Bucket": bucket_of(address), "Key": f"of/a/team/objects/{ref.digest}/manifest.json"}
    first = s3.get_object(**location)
    store.fetch(ref, tmp_path / "copy")
    last = s3.get_object(**location)
    assert "used" in last["Metadata"]
    assert "used" not in first["Metadata"]
    assert first["Body"].read() == last["Body"].read()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://", "is no bucket's name"),
        ("s3:///prefix", "is no bucket's name"),
        ("s3://Bucket_", "is no bucket's name"),
        ("s3://bucket/a/../b", "is no prefix"),
        ("s3://bucket/a b", "is no prefix"),
        (
            "s3://bucket/a?region=x",
            "region is no option of a store; there are endpoint, path_style, cache_gb",
        ),
        ("s3://bucket?path_style=yes", "path_style=yes is neither true nor false"),
        ("s3://bucket?endpoint=minio:9000", "endpoint is no http:// or https:// address"),
        ("s3://bucket?cache_gb=-1", "cache_gb=-1 is no number of gigabytes"),
    ],
)
def test_an_invalid_address_is_refused(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_store(address)


@pytest.mark.parametrize("address", ["s3://me:hidden@bucket/a", "s3://bucket?endpoint=http://me:hidden@host"])
def test_credentials_in_an_address_are_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(ValueError, match="credentials") as raised:
        open_store(address)
    assert "hidden" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ("", "https://bucket.s3.amazonaws.com/k"),
        ("?path_style=true", "https://s3.amazonaws.com/bucket/k"),
        ("?endpoint=https://s3.example.org", "https://s3.example.org/bucket/k"),
        ("?endpoint=https://s3.example.org&path_style=false", "https://bucket.s3.example.org/k"),
    ],
)
def test_the_options_of_an_address_choose_the_url_of_the_bucket(
    s3: Any, monkeypatch: pytest.MonkeyPatch, options: str, url: str
) -> None:
    client = S3Store(f"s3://bucket/a{options}")._bucket._client
    assert client.generate_presigned_url("get_object", {"Bucket": "bucket", "Key": "k"}).split("?")[0] == url
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://elsewhere.example.org")
    elsewhere = S3Store("s3://bucket/a")._bucket._client
    assert elsewhere.meta.endpoint_url == "https://elsewhere.example.org"


def test_a_huge_file_is_sent_in_no_more_parts_than_s3_allows() -> None:
    assert part_size(1) == part_size(160 * 10**9) == PART_BYTES
    size_bytes = 5 * 2**40
    assert -(-size_bytes // part_size(size_bytes)) <= 10_000
