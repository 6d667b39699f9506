"""Pages of a listing, as the Blob service writes them in XML."""

from __future__ import annotations

from urllib.parse import unquote
from xml.etree.ElementTree import Element, ParseError, fromstring

from attrs import frozen

from modelexpress_core.storage.http import ListingPage

__all__ = ["Entry", "parsed_page"]


@frozen
class Entry:
    """One blob of a listing.

    Attributes:
        name: Its name.
        size: In bytes.
        etag: As headers have it; empty where the listing lacks it.
        md5: In Base64; None where there is none.
        crc64: Likewise.
        block: Whether it is a block blob.
        directory: Whether it stands for a directory of a hierarchical account.
    """

    name: str
    size: int
    etag: str
    md5: str | None
    crc64: str | None
    block: bool
    directory: bool


def parsed_page(content: bytes) -> ListingPage[Entry]:
    """The page that ``content`` is.

    Raises:
        ValueError: It is not the listing of a Blob service.
    """
    if b"<!DOCTYPE" in content:  # no listing has one, and entities could make a small text huge
        message = "the listing has a document type"
        raise ValueError(message)
    try:
        root = fromstring(content)  # noqa: S314 - bounded in size, and without entities
        if root.tag != "EnumerationResults":
            message = "the answer is not a listing"
            raise ValueError(message)
        return ListingPage([_entry(blob) for blob in root.iterfind("Blobs/Blob")], root.findtext("NextMarker"))
    except (ParseError, LookupError) as exc:
        message = "the listing cannot be read"
        raise ValueError(message) from exc


def _entry(blob: Element) -> Entry:
    name = blob.find("Name")
    if name is None or not name.text:
        message = "a blob without a name"
        raise ValueError(message)
    text = unquote(name.text) if name.get("Encoded") == "true" else name.text
    properties = "Properties/"
    metadata = {entry.tag.lower(): entry.text for entry in blob.iterfind("Metadata/*")}
    kind = blob.findtext(f"{properties}ResourceType")
    etag = blob.findtext(f"{properties}Etag") or ""
    return Entry(
        text,
        int(blob.findtext(f"{properties}Content-Length") or ""),
        etag if not etag or etag.startswith('"') else f'"{etag}"',
        blob.findtext(f"{properties}Content-MD5"),
        blob.findtext(f"{properties}Content-CRC64"),
        blob.findtext(f"{properties}BlobType") == "BlockBlob",
        kind == "directory" or metadata.get("hdi_isfolder") == "true",
    )
