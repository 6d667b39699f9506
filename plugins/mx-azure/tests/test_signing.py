"""Signatures of account keys are those of Microsoft's SDK, and cost a fraction of its time."""

from __future__ import annotations

import base64
import time
from types import SimpleNamespace
from urllib.parse import parse_qsl

import pytest
from azure.storage.blob._shared.authentication import SharedKeyCredentialPolicy

from modelexpress_core.testing.storage_contract import UNUSUAL_NAMES
from modelexpress_core.uri import ModelURI
from mx_azure._accounts import Location, locate
from mx_azure._signing import AzureRequests, Target
from mx_azure.settings import AzureSettings

KEY = base64.b64encode(b"not a real key").decode()
URI = ModelURI.parse("az://models")


def location(**changes: str | None) -> Location:
    values = {"account_name": "models1", "account_key": KEY, **changes}
    return locate(URI, AzureSettings(**values))  # type: ignore[arg-type]


def signature_of_the_sdk(method: str, url: str, headers: dict[str, str]) -> str:
    """What the SDK puts into the header Authorization of a request."""
    query = {
        name: value for name, _, value in (part.partition("=") for part in url.partition("?")[2].split("&")) if name
    }
    sent = {name: value for name, value in headers.items() if name != "Authorization"}
    # The SDK never sends Range, and takes another name for its place.
    sent["byte_range"] = sent.pop("Range", "")
    request = SimpleNamespace(method=method, url=url, headers=sent, query=query)
    policy = SharedKeyCredentialPolicy("models1", KEY)
    policy.on_request(SimpleNamespace(http_request=request, context=SimpleNamespace(transport=None)))
    return str(sent["Authorization"])


@pytest.mark.parametrize("name", ["model.safetensors", *UNUSUAL_NAMES])
@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=0-9", "If-Match": '"0x1"'}])
def test_reads_are_signed_as_by_the_sdk(name: str, headers: dict[str, str]) -> None:
    """For every name that occurs, with and without range and version."""
    request = AzureRequests(location(), None, time.time).request(f"a/{name}", headers)

    sent = dict(request.headers)
    assert signature_of_the_sdk("GET", f"{request.origin}{request.target}", sent) == sent["Authorization"]
    assert "bm90" not in repr(request)


def test_listings_are_signed_as_by_the_sdk() -> None:
    """The parameters of the query are a part of the signature, in their order and decoded."""
    parameters = {"restype": "container", "comp": "list", "prefix": "a b/ü+%/", "marker": "2!72!x=", "maxresults": "9"}
    here = location()

    request = AzureRequests(here, None, time.time).prepared("GET", Target.of(here, "models", parameters), {})

    sent = dict(request.headers)
    assert signature_of_the_sdk("GET", f"{request.origin}{request.target}", sent) == sent["Authorization"]
    assert parameters == dict(parse_qsl(request.target.partition("?")[2]))


def test_a_sas_token_is_in_the_query_and_in_no_repr() -> None:
    """It is sent as it was given, behind the other parameters."""
    here = location(account_key=None, sas_token="sv=1&sig=a%2Bb")

    read = AzureRequests(here, None, time.time).request("a", {})
    listed = AzureRequests(here, None, time.time).prepared("GET", Target.of(here, "models", {"comp": "list"}), {})

    assert "/models/a?sv=1&sig=a%2Bb" == read.target
    assert "/models?comp=list&sv=1&sig=a%2Bb" == listed.target
    assert "Authorization" not in dict(read.headers)
    assert "sig" not in repr(read)


def test_each_request_has_its_own_time() -> None:
    """A signature is valid for a quarter of an hour, and a load may take longer."""
    clock = iter([0.0, 1.0])
    requests = AzureRequests(location(), None, lambda: next(clock))

    first, second = (dict(requests.request("a", {}).headers) for _ in range(2))

    assert "Thu, 01 Jan 1970 00:00:00 GMT" == first["x-ms-date"]
    assert "Thu, 01 Jan 1970 00:00:01 GMT" == second["x-ms-date"]
    assert first["Authorization"] != second["Authorization"]
