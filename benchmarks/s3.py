"""How fast the store in a bucket is against plain boto3 on the same server, in turns: one large file there and back.

Run from the repository's root: python -m benchmarks.s3 [--megabytes 100] [--rounds 7] [--endpoint URL] [--json FILE].
Without an endpoint (whose bucket is then named by --bucket) a moto server is started, which does what S3 does. The
store hashes what it sends besides, keeps a copy on this machine where that is asked for, and hashes what it fetched.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
from rich.console import Console
from rich.table import Table

from cluster.storage.s3_store import S3Store

BUCKET = "slimfront-benchmark"


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """The URL of a moto server of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def seconds(do: Callable[[], Any]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def one_round(endpoint: str, bucket: str, megabytes: int, number: int, scratch: Path) -> dict[str, float]:
    """Seconds of each, on content that was never there before; who is first alternates."""
    client = boto3.client("s3", endpoint_url=endpoint)
    place = f"s3://{bucket}/round-{number}?endpoint={endpoint}"
    store, copying = S3Store(place), S3Store(place.replace("round", "copying"), scratch / "copies")
    model = scratch / "model"
    model.mkdir()
    (model / "weights").write_bytes(os.urandom(megabytes * 10**6))
    found: dict[str, float] = {}
    sends: list[tuple[str, Callable[[], Any]]] = [
        ("put", lambda: store.put(model)),
        ("upload_file", lambda: client.upload_file(str(model / "weights"), bucket, "plain")),
        ("put and keep a copy", lambda: copying.put(model)),
    ]
    for name, do in sends if number % 2 else reversed(sends):
        found[name] = seconds(do)
    ref = store.put(model)
    gets: list[tuple[str, Callable[[], Any]]] = [
        ("fetch", lambda: store.fetch(ref, scratch / "fetched")),
        ("download_file", lambda: client.download_file(bucket, "plain", str(scratch / "plain"))),
        ("fetch a copy", lambda: copying.fetch(ref, scratch / "linked")),
    ]
    for name, do in gets if number % 2 else reversed(gets):
        found[name] = seconds(do)
    found["put again"] = seconds(lambda: store.put(model))
    found["commit"] = seconds(lambda: store.commit("results/01", {"a": 1}))
    for one in (store, copying):
        one.remove(ref)
    client.delete_object(Bucket=bucket, Key="plain")
    for place_ in scratch.iterdir():
        shutil.rmtree(place_) if place_.is_dir() else place_.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--endpoint", help="of a service that runs already, instead of moto")
    parser.add_argument("--bucket", default=BUCKET, help="there")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    given = parser.parse_args()
    with contextlib.ExitStack() as ending:
        endpoint = given.endpoint or ending.enter_context(moto())
        if given.endpoint is None:
            boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=given.bucket)
        scratch = Path(ending.enter_context(tempfile.TemporaryDirectory()))
        one_round(endpoint, given.bucket, 1, 0, scratch)  # what is imported and connected only once
        rounds = [
            one_round(endpoint, given.bucket, given.megabytes, number, scratch)
            for number in range(1, given.rounds + 1)
        ]
    plain = {"put": "upload_file", "put and keep a copy": "upload_file", "fetch": "download_file"}
    title = f"{given.megabytes} MB, median of {given.rounds} rounds ({platform.machine()}, {os.cpu_count()} processors)"
    table = Table("what", "seconds", "MB/s", "speed against plain boto3", title=title, title_justify="left")
    for name in rounds[0]:
        taken = statistics.median(one[name] for one in rounds)
        ratios = sorted(one[plain[name]] / one[name] for one in rounds) if name in plain else []
        against = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios else ""
        table.add_row(
            name, f"{taken:.3f}", "" if name == "commit" else f"{given.megabytes / taken:.0f}", against
        )
    Console(width=120).print(table)
    if given.json is not None:
        about = {"megabytes": given.megabytes, "machine": platform.platform(), "processors": os.cpu_count()}
        given.json.write_text(json.dumps({**about, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
