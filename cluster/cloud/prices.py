"""Prices: the price of a node-hour, from AWS if it answers, else from a table with a stated date.

Besides cluster/storage/s3.py the only file that imports boto3, at the first request to AWS.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import yaml

from cluster.executors.executor import NodeType

ASK_SECONDS = 3.0
"""The time limit of each request to AWS; none is repeated."""
_EC2_TYPE = re.compile(r"[a-z][a-z0-9-]*\.[a-z0-9-]+")
_PRICING_REGION = "us-east-1"
"""One of the few regions with the price list API, which knows the prices of all regions."""
_SYSTEM = "Linux/UNIX"


@dataclass(frozen=True)
class Price:
    """The price of one node."""

    per_hour: float
    currency: str
    source: str
    """The origin of the number, in words."""
    date: str
    """The day on which it was valid, as 2026-11-23."""
    at_most: bool = False
    """True if the actual price may be lower."""


@dataclass(frozen=True)
class PriceTable:
    """On-demand prices of one cloud in one region."""

    cloud: str
    as_of: str
    """The day on which the prices were valid."""
    region: str
    currency: str
    per_hour: Mapping[str, float]


def price_of(node: NodeType) -> Price | None:
    """Return the price of such a node; None if it is unknown.

    If there are credentials, AWS is asked; for spot nodes the price is the current mean over the region's zones.
    Otherwise the table counts. It has no spot prices: its on-demand price is then an upper bound.
    """
    if not _EC2_TYPE.fullmatch(node.name) or not node.region:
        return tabled(node)
    if node.spot:
        return _spot(node) or tabled(node)
    return _on_demand(node) or tabled(node)


def tabled(node: NodeType) -> Price | None:
    """Return the price in the shipped table, which has one region of each cloud and no spot prices."""
    for table in tables():
        if node.name in table.per_hour and node.region == table.region:
            source = f"the on-demand price in {table.region} by the table that is shipped"
            return Price(table.per_hour[node.name], table.currency, source, table.as_of, at_most=node.spot)
    return None


@functools.cache
def tables() -> tuple[PriceTable, ...]:
    content = yaml.safe_load((files("cluster.templates") / "shipped" / "prices.yaml").read_text("utf-8"))
    return tuple(_table(cloud, fields) for cloud, fields in content.items())


def _table(cloud: str, fields: Mapping[str, Any]) -> PriceTable:
    per_hour = MappingProxyType(dict(fields["per_hour"]))
    return PriceTable(cloud, str(fields["as_of"]), fields["region"], fields["currency"], per_hour)


def _spot(node: NodeType) -> Price | None:
    """Return the mean spot price over the region's zones."""
    now = datetime.now(UTC)
    parameters = {
        "InstanceTypes": [node.name],
        "ProductDescriptions": [_SYSTEM],
        "StartTime": now - timedelta(minutes=1),  # AWS returns prices that are valid then, though set before
        "EndTime": now,
    }
    answer = _ask("ec2", node.region, "describe_spot_price_history", parameters)
    latest: dict[str, dict[str, Any]] = {}
    for entry in (answer or {}).get("SpotPriceHistory", []):
        zone = entry["AvailabilityZone"]
        if zone not in latest or entry["Timestamp"] > latest[zone]["Timestamp"]:
            latest[zone] = entry
    if not latest:
        return None
    mean = sum(float(entry["SpotPrice"]) for entry in latest.values()) / len(latest)
    return Price(mean, "USD", f"the mean spot price of {node.region}'s zones by EC2", f"{now:%Y-%m-%d}")


def _on_demand(node: NodeType) -> Price | None:
    fields = {
        "instanceType": node.name,
        "regionCode": node.region,
        "operatingSystem": "Linux",
        "preInstalledSw": "NA",
        "tenancy": "Shared",
        "capacitystatus": "Used",
    }
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in fields.items()]
    parameters = {"ServiceCode": "AmazonEC2", "Filters": filters, "MaxResults": 10}
    answer = _ask("pricing", _PRICING_REGION, "get_products", parameters)
    hourly = list(_hourly_prices((answer or {}).get("PriceList", [])))
    # A price of zero, or several prices, are not the price of this node: no price is better than a wrong one.
    if len(set(hourly)) != 1 or hourly[0] <= 0:
        return None
    source = f"the on-demand price in {node.region} by AWS's price list"
    return Price(hourly[0], "USD", source, f"{datetime.now(UTC):%Y-%m-%d}")


def _hourly_prices(products: list[str]) -> Iterator[float]:
    """Return all hourly on-demand prices in USD of AWS's price list entries."""
    for product in products:
        for term in json.loads(product)["terms"].get("OnDemand", {}).values():
            for dimension in term["priceDimensions"].values():
                if dimension["unit"] == "Hrs" and "USD" in dimension["pricePerUnit"]:
                    yield float(dimension["pricePerUnit"]["USD"])


def _ask(service: str, region: str, operation: str, parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """Send one request to AWS; return None without credentials, permission, or an answer in time."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    config = Config(
        connect_timeout=ASK_SECONDS,
        read_timeout=ASK_SECONDS,
        retries={"total_max_attempts": 1, "mode": "standard"},
    )
    try:
        session = boto3.Session()
        if session.get_credentials() is None:
            return None
        client = session.client(service, region_name=region, config=config)
        try:
            answer: dict[str, Any] = getattr(client, operation)(**parameters)
        finally:
            client.close()
    except (BotoCoreError, ClientError):
        return None
    return answer
