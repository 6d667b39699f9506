"""Reading objects over HTTP/1.1: what storages over HTTP share.

- ``requests``: what a request says, and the contract of the code that signs it.
- ``proxies``: which HTTP proxy leads to a server.
- ``connections``: opening, keeping and ending connections; ``nested_tls`` for those through a TLS proxy.
- ``answers``: reading an answer, within bounds.
- ``ranges``: byte ranges into memory, each answer checked.
- ``exchanges``: small requests whose answers are read whole: metadata, listings, tokens.
- ``listings``: listings in pages, within bounds.
- ``tokens``: access tokens, fetched once for all threads and renewed.
- ``failures``: what goes wrong, and what it means for a load; ``service_errors``: what the tables of services share.
- ``storage``: what the storages of all services do in the same way.
- ``digests``, ``opening``: published digests, and URIs.
"""

from __future__ import annotations

from modelexpress_core.storage.http.answers import Answer
from modelexpress_core.storage.http.connections import ConnectionPool, OpenSockets
from modelexpress_core.storage.http.digests import hex_of_base64, md5_of_etag
from modelexpress_core.storage.http.exchanges import BoundedSession, WholeAnswer, exchange, request_of_sdk
from modelexpress_core.storage.http.failures import (
    BadAnswerError,
    Failures,
    Meaning,
    SettingNames,
    http_error,
    meaning_of_answer,
    retry_after_seconds,
)
from modelexpress_core.storage.http.listings import ListingPage, entries_of_pages
from modelexpress_core.storage.http.opening import check_uri, endpoint_of
from modelexpress_core.storage.http.proxies import Proxies, Proxy
from modelexpress_core.storage.http.ranges import RangeReader, VersionHeaders, check_encoding
from modelexpress_core.storage.http.requests import Origin, Refusal, Request, Signer
from modelexpress_core.storage.http.storage import HttpStorage
from modelexpress_core.storage.http.tokens import Token, TokenCache

__all__ = [
    "Answer",
    "BadAnswerError",
    "BoundedSession",
    "ConnectionPool",
    "Failures",
    "HttpStorage",
    "ListingPage",
    "Meaning",
    "OpenSockets",
    "Origin",
    "Proxies",
    "Proxy",
    "RangeReader",
    "Refusal",
    "Request",
    "SettingNames",
    "Signer",
    "Token",
    "TokenCache",
    "VersionHeaders",
    "WholeAnswer",
    "check_encoding",
    "check_uri",
    "endpoint_of",
    "entries_of_pages",
    "exchange",
    "hex_of_base64",
    "http_error",
    "md5_of_etag",
    "meaning_of_answer",
    "request_of_sdk",
    "retry_after_seconds",
]
