"""Prices: by EC2 on moto, by AWS's price list in its own form, and by the table without credentials."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from moto import mock_aws

from cluster.cloud import prices
from cluster.cloud.prices import price_of, tables
from cluster.executors.executor import NodeType
from cluster.templates.instances import table

SPOT = NodeType("g6.2xlarge", "us-east-1", spot=True)
ON_DEMAND = NodeType("g6.2xlarge", "us-east-1")


@pytest.fixture(autouse=True)
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove all credentials that boto3 could use."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    with mock_aws():
        yield


def test_without_credentials_on_demand_prices_come_from_the_table_with_its_date() -> None:
    price = price_of(ON_DEMAND)
    assert price is not None
    assert (price.per_hour, price.currency, price.date) == (0.9776, "USD", "2026-09-24")
    assert "on-demand" in price.source
    assert not price.at_most


def test_without_credentials_the_on_demand_price_is_the_upper_bound_for_spot() -> None:
    price = price_of(SPOT)
    assert price is not None
    assert price.per_hour == 0.9776
    assert price.at_most


@pytest.mark.parametrize(
    "node", [NodeType(), NodeType("gpu-workers"), NodeType("x9.large", "us-east-1"), NodeType("g6.2xlarge"),
             NodeType("g6.2xlarge", "eu-west-1"), NodeType("n1-standard-8", "us-central1")],
)  # fmt: skip
def test_an_unknown_node_has_no_price(node: NodeType) -> None:
    assert price_of(node) is None


def test_with_credentials_the_spot_price_comes_from_ec2(credentials: None) -> None:
    price = price_of(SPOT)
    assert price is not None
    assert price.per_hour == pytest.approx(1e-5)  # moto's
    assert "spot price" in price.source
    assert price.date == f"{datetime.now(UTC):%Y-%m-%d}"
    assert not price.at_most


def test_the_spot_price_is_the_mean_of_the_latest_prices_of_the_zones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [("a", "0.30", 3), ("a", "0.40", 5), ("b", "0.20", 1)]
    history = [
        {"AvailabilityZone": zone, "SpotPrice": price, "Timestamp": datetime(2026, 11, day, tzinfo=UTC)}
        for zone, price, day in rows
    ]
    monkeypatch.setattr(prices, "_ask", lambda *_: {"SpotPriceHistory": history})
    price = price_of(SPOT)
    assert price is not None
    assert price.per_hour == pytest.approx(0.3)


def product(*usd: str, unit: str = "Hrs") -> str:
    """One entry of AWS's price list, as the service gives it."""
    dimensions = {f"S.T.{n}": {"unit": unit, "pricePerUnit": {"USD": amount}} for n, amount in enumerate(usd)}
    return json.dumps({"product": {}, "terms": {"OnDemand": {"S.T": {"priceDimensions": dimensions}}}})


@pytest.mark.parametrize(
    ("listed", "per_hour", "source"),
    [
        ([product("1.2340000000")], 1.234, "AWS's price list"),
        ([product("1.2"), product("1.2")], 1.2, "AWS's price list"),
        ([product("1.2"), product("3.4")], 0.9776, "the table that is shipped"),
        ([product("0.0000000000")], 0.9776, "the table that is shipped"),
        ([product("1.2", unit="Quantity")], 0.9776, "the table that is shipped"),
        ([], 0.9776, "the table that is shipped"),
    ],
)
def test_the_on_demand_price_comes_from_the_price_list_if_that_has_one_price(
    listed: list[str], per_hour: float, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[Any] = []
    monkeypatch.setattr(
        prices, "_ask", lambda *arguments: requests.append(arguments) or {"PriceList": listed}
    )
    price = price_of(ON_DEMAND)
    assert price is not None
    assert (price.per_hour, price.source.endswith(source)) == (per_hour, True)
    service, region, operation, parameters = requests[0]
    assert (service, region, operation) == ("pricing", "us-east-1", "get_products")
    assert {"Type": "TERM_MATCH", "Field": "regionCode", "Value": "us-east-1"} in parameters["Filters"]


def test_the_requests_have_the_form_that_aws_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests are checked by botocore's description of the service, since moto has no price list."""
    from botocore.session import Session
    from botocore.validate import validate_parameters

    requests: list[Any] = []
    monkeypatch.setattr(prices, "_ask", lambda *arguments: requests.append(arguments))
    price_of(SPOT)
    price_of(ON_DEMAND)
    for (service, _, _, parameters), operation in zip(
        requests, ("DescribeSpotPriceHistory", "GetProducts"), strict=True
    ):
        shape = Session().get_service_model(service).operation_model(operation).input_shape
        validate_parameters(parameters, shape)


def test_without_permission_the_table_counts(credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens
    price = price_of(SPOT)
    assert price is not None
    assert "table" in price.source


def test_the_table_has_prices_of_existing_types_only() -> None:
    for prices_of_cloud in tables():
        assert prices_of_cloud.per_hour.keys() <= table(prices_of_cloud.cloud).types.keys()
        assert all(price > 0 for price in prices_of_cloud.per_hour.values())
