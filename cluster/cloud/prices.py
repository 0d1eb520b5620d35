"""Prices: what an hour of a node costs, by AWS where it may be asked, else by a table of a stated date.

Beside cluster/storage/s3.py the one file that imports boto3; only when AWS is asked.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import yaml

from cluster.executors.executor import NodeType

ASK_SECONDS = 3.0
"""So long at most is waited for each answer of AWS, and once."""
_EC2_TYPE = re.compile(r"[a-z][a-z0-9-]*\.[a-z0-9-]+")
_PRICING_REGION = "us-east-1"
"""One of the few where AWS tells its prices; of all regions."""
_SYSTEM = "Linux/UNIX"


@dataclass(frozen=True)
class Price:
    """What one node costs. source: who says so; date: of which day, as 2026-11-23; at_most: it may be less."""

    per_hour: float
    currency: str
    source: str
    date: str
    at_most: bool = False


@dataclass(frozen=True)
class PriceTable:
    """On-demand prices of one cloud in one region, of the day `as_of`."""

    cloud: str
    as_of: str
    region: str
    currency: str
    per_hour: Mapping[str, float]


def price_of(node: NodeType) -> Price | None:
    """What such a node costs; None where nobody tells.

    AWS is asked where there are credentials, for spot the mean of the region's zones now. Else the table counts: what
    spot costs it does not know, and its on-demand price stands for the most that it may be.
    """
    if not _EC2_TYPE.fullmatch(node.name) or not node.region:
        return tabled(node)
    told = _spot(node) if node.spot else _on_demand(node)
    return told or tabled(node)


def tabled(node: NodeType) -> Price | None:
    """What the table that is shipped says; it has no prices of spot and only one region of each cloud."""
    for table in tables():
        if node.name in table.per_hour and node.region == table.region:
            source = f"the on-demand price in {table.region} by the table that is shipped"
            return Price(table.per_hour[node.name], table.currency, source, table.as_of, at_most=node.spot)
    return None


@functools.cache
def tables() -> tuple[PriceTable, ...]:
    content = yaml.safe_load((files("cluster.templates") / "shipped" / "prices.yaml").read_text("utf-8"))
    return tuple(
        PriceTable(
            cloud, str(one["as_of"]), one["region"], one["currency"], MappingProxyType(dict(one["per_hour"]))
        )
        for cloud, one in content.items()
    )


def _spot(node: NodeType) -> Price | None:
    """The mean over the region's zones of what spot costs now."""
    now = datetime.now(UTC)
    asked = {
        "InstanceTypes": [node.name],
        "ProductDescriptions": [_SYSTEM],
        "StartTime": now - timedelta(minutes=1),  # what holds then, though it was set before
        "EndTime": now,
    }
    answer = _asked("ec2", node.region, "describe_spot_price_history", asked)
    latest: dict[str, dict[str, Any]] = {}
    for one in (answer or {}).get("SpotPriceHistory", []):
        zone = one["AvailabilityZone"]
        if zone not in latest or one["Timestamp"] > latest[zone]["Timestamp"]:
            latest[zone] = one
    if not latest:
        return None
    mean = sum(float(one["SpotPrice"]) for one in latest.values()) / len(latest)
    return Price(mean, "USD", f"the mean spot price of {node.region}'s zones by EC2", f"{now:%Y-%m-%d}")


def _on_demand(node: NodeType) -> Price | None:
    wanted = {
        "instanceType": node.name,
        "regionCode": node.region,
        "operatingSystem": "Linux",
        "preInstalledSw": "NA",
        "tenancy": "Shared",
        "capacitystatus": "Used",
    }
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
    asked = {"ServiceCode": "AmazonEC2", "Filters": filters, "MaxResults": 10}
    answer = _asked("pricing", _PRICING_REGION, "get_products", asked)
    hourly = [
        float(dimension["pricePerUnit"]["USD"])
        for product in (answer or {}).get("PriceList", [])
        for term in json.loads(product)["terms"].get("OnDemand", {}).values()
        for dimension in term["priceDimensions"].values()
        if dimension["unit"] == "Hrs" and "USD" in dimension["pricePerUnit"]
    ]
    # What is free or said twice is not the price of this node: better none than a wrong one.
    if len(set(hourly)) != 1 or hourly[0] <= 0:
        return None
    source = f"the on-demand price in {node.region} by AWS's price list"
    return Price(hourly[0], "USD", source, f"{datetime.now(UTC):%Y-%m-%d}")


def _asked(service: str, region: str, operation: str, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """What AWS answers; None where there are no credentials, they may not ask, or nobody answers in time."""
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
            answer: dict[str, Any] = getattr(client, operation)(**given)
        finally:
            client.close()
    except (BotoCoreError, ClientError):
        return None
    return answer
