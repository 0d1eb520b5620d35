"""Compare the store in a bucket with plain boto3 on the same server: the transfer of one large file in both directions.

Run from the repository's root: python -m benchmarks.s3 [--megabytes 100] [--rounds 7] [--endpoint URL] [--json FILE].
Without an endpoint (with its bucket in --bucket) a moto server is started, which emulates S3. Unlike plain boto3, the
store also hashes the bytes that it sends and fetches, and can keep a copy on this machine. The two take turns.
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
    """Start a moto server and yield its URL."""
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


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


Action = Callable[[], Any]


def seconds_of(actions: dict[str, Action], backwards: bool) -> dict[str, float]:
    """Return the seconds that each action took, run in this order or backwards."""
    names = list(actions)
    if backwards:
        names.reverse()
    return {name: seconds(actions[name]) for name in names}


def one_round(endpoint: str, bucket: str, megabytes: int, number: int, scratch: Path) -> dict[str, float]:
    """Return the seconds of each action on new random content. The order alternates from round to round."""
    client = boto3.client("s3", endpoint_url=endpoint)
    address = f"s3://{bucket}/round-{number}?endpoint={endpoint}"
    store, copying = S3Store(address), S3Store(address.replace("round", "copying"), scratch / "copies")
    model = scratch / "model"
    model.mkdir()
    (model / "weights").write_bytes(os.urandom(megabytes * 10**6))
    backwards = number % 2 == 0
    times = seconds_of(
        {
            "put": lambda: store.put(model),
            "upload_file": lambda: client.upload_file(str(model / "weights"), bucket, "plain"),
            "put and keep a copy": lambda: copying.put(model),
        },
        backwards,
    )
    ref = store.put(model)
    times |= seconds_of(
        {
            "fetch": lambda: store.fetch(ref, scratch / "fetched"),
            "download_file": lambda: client.download_file(bucket, "plain", str(scratch / "plain")),
            "fetch a copy": lambda: copying.fetch(ref, scratch / "linked"),
        },
        backwards,
    )
    times["put again"] = seconds(lambda: store.put(model))
    times["commit"] = seconds(lambda: store.commit("results/01", {"a": 1}))
    store.remove(ref)
    copying.remove(ref)
    client.delete_object(Bucket=bucket, Key="plain")
    for path in scratch.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return times


def table(rounds: list[dict[str, float]], megabytes: int) -> Table:
    plain = {"put": "upload_file", "put and keep a copy": "upload_file", "fetch": "download_file"}
    title = (
        f"{megabytes} MB, median of {len(rounds)} rounds ({platform.machine()}, {os.cpu_count()} processors)"
    )
    rows = Table("action", "seconds", "MB/s", "speed against plain boto3", title=title, title_justify="left")
    for name in rounds[0]:
        median_seconds = statistics.median(times[name] for times in rounds)
        speed = relative_speed = ""
        if name != "commit":
            speed = f"{megabytes / median_seconds:.0f}"
        if name in plain:
            ratios = sorted(times[plain[name]] / times[name] for times in rounds)
            relative_speed = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.add_row(name, f"{median_seconds:.3f}", speed, relative_speed)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--endpoint", help="of a running service, instead of moto")
    parser.add_argument("--bucket", default=BUCKET, help="of that service")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        endpoint = options.endpoint or stack.enter_context(moto())
        if options.endpoint is None:
            boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=options.bucket)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        one_round(endpoint, options.bucket, 1, 0, scratch)  # imports and connections that later rounds share
        rounds = [
            one_round(endpoint, options.bucket, options.megabytes, number, scratch)
            for number in range(1, options.rounds + 1)
        ]
    Console(width=120).print(table(rounds, options.megabytes))
    if options.json is not None:
        machine = {
            "megabytes": options.megabytes, "machine": platform.platform(), "processors": os.cpu_count(),
        }  # fmt: skip
        options.json.write_text(json.dumps({**machine, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
