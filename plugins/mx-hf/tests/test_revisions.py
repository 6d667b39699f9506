"""Which content a URI means: revisions, commits that stay, directories, files, versions and digests."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence

import pytest

from devtools.fake_hub import FakeHub, HubAnswer, HubRequest
from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.errors import InvalidURIError, NotFoundError, SourceChangedError, UnsupportedError
from mx_hf._repositories import Place
from mx_hf._storage import HfStorage

WEIGHTS = "model.safetensors"


def read(storage: HfStorage, info: ObjectInfo) -> bytes:
    buffer = bytearray(info.size)
    assert info.size == storage.read_into(info.path, 0, memoryview(buffer), version=info.version)
    return bytes(buffer)


def sent(hub: FakeHub, kind: str) -> Sequence[HubRequest]:
    """The requests to the Hub whose path has ``kind``."""
    return [request for request in hub.requests if f"/{kind}/" in request.path]


@pytest.mark.parametrize(
    ("path", "revision", "expected"),
    [
        ("name", None, Place("org/name", "name", "main", "")),
        ("name/a/b", None, Place("org/name", "name", "main", "a/b")),
        ("name", "v1.0", Place("org/name", "name", "v1.0", "")),
        ("name/a", "feature/x", Place("org/name", "name", "feature/x", "a")),
        ("name@v1/a", None, Place("org/name", "name@v1", "v1", "a")),
        ("name@v1/a", "v1", Place("org/name", "name@v1", "v1", "a")),
        ("name@refs/pr/7/a/b", None, Place("org/name", "name@refs/pr/7", "refs/pr/7", "a/b")),
        ("name@refs/convert/parquet", None, Place("org/name", "name@refs/convert/parquet", "refs/convert/parquet", "")),
    ],
)
def test_a_path_names_repository_revision_and_file(path: str, revision: str | None, expected: Place) -> None:
    """In each of the forms that the page of the package lists."""
    assert expected == Place.of("org", path, revision)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("hf://", "no org"),
        ("hf://gpt2", "openai-community/gpt2"),
        ("hf://datasets/org/name", "hf:// means models"),
        ("hf://models/org/name", "write hf://org/name"),
        ("hf://org/na me", "no repository can have this name"),
        ("hf://org/a..b", "no repository can have this name"),
        ("hf://org/name?revision=", "no revision can have this name"),
        ("hf://org/name?revision=a..b", "no revision can have this name"),
        ("hf://org/name?revision=../../x", "no revision can have this name"),
        ("hf://org/name@v1?revision=v2", "two revisions"),
        ("hf://org/name@refs/heads", "refs/pr/1"),
        ("hf://org/name?token=hf_secret", "unknown parameters"),
        ("hf://user:hf_secret@org/name", "credentials"),
    ],
)
def test_a_uri_that_names_no_model_is_refused(uri: str, words: str, opened: Callable[..., HfStorage]) -> None:
    """Before any request, with what to write, and without secrets."""
    with pytest.raises(InvalidURIError) as caught:
        opened(uri)

    told = f"{caught.value} {caught.value.cause} {caught.value.hint}"
    assert words in told
    assert "hf_secret" not in told


def test_a_branch_that_moves_is_not_mixed(hub: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """Listings, metadata and reads stay with the commit of the first request; a new storage has the new one."""
    hub.put("org/model", WEIGHTS, b"old" * 1000)
    hub.put("org/model", "other.safetensors", b"old")
    storage = on_hub()
    (old,) = [info for info in storage.list("model") if info.path.endswith(f"/{WEIGHTS}")]

    hub.put("org/model", WEIGHTS, b"new" * 1000)
    hub.put("org/model", "other.safetensors", b"new")
    hub.put("org/model", "added.safetensors", b"new")

    assert b"old" * 1000 == read(storage, old)
    assert b"old" == read(storage, storage.stat("model/other.safetensors"))
    with pytest.raises(NotFoundError):
        storage.stat("model/added.safetensors")
    buffer = bytearray(3)
    storage.read_into("model/other.safetensors", 0, memoryview(buffer), version=None)
    assert b"old" == bytes(buffer)
    assert b"new" * 1000 == read(on_hub(), on_hub().stat(f"model/{WEIGHTS}"))


def test_a_listing_that_fails_half_way_goes_on_with_its_commit(hub: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """Pages before and after a failure, and a new commit between them, are of one commit."""
    hub.page_entries = 1
    for name in "abc":
        hub.put("org/model", f"{name}.safetensors", b"old")
    storage = on_hub()
    listing = storage.list("model")
    first = next(listing)

    hub.put("org/model", "b.safetensors", b"new")
    again = list(storage.list("model"))

    assert first == again[0]
    assert 1 == len({str(info.version).partition("/")[0] for info in again})


@pytest.mark.parametrize("form", ["?revision={}", "@{}"])
@pytest.mark.parametrize("revision", ["v1", "refs/pr/7", "commit"])
def test_a_revision_selects_the_content(
    hub: FakeHub, on_hub: Callable[..., HfStorage], form: str, revision: str
) -> None:
    """A tag, a reference of a pull request, or a commit; in both forms."""
    commit = hub.put("org/model", WEIGHTS, b"of the revision", branch="v1" if revision == "commit" else revision)
    hub.put("org/model", WEIGHTS, b"of main")
    name = form.format(commit if revision == "commit" else revision)
    storage = on_hub(f"hf://org/model{name}")

    head = f"model{name}" if form.startswith("@") else "model"
    (info,) = storage.list(head)

    assert f"{head}/{WEIGHTS}" == info.path
    assert f"{commit}/" in str(info.version)
    assert b"of the revision" == read(storage, info)


def test_a_commit_needs_no_request_for_the_revision(hub: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """It is its own."""
    commit = hub.put("org/model", WEIGHTS, b"x")

    list(on_hub(f"hf://org/model?revision={commit}").list("model"))

    assert [] == sent(hub, "revision")


def test_metadata_is_asked_once_for_a_model(hub: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """One request for the commit, one for each page; none for sizes and digests of files, or for files not there."""
    for number in range(20):
        hub.put("org/model", f"{number}.safetensors", b"x" * number)
    storage = on_hub()
    for info in storage.list("model"):
        assert info == storage.stat(info.path)
    with pytest.raises(NotFoundError):
        storage.stat("model/none/at/all")

    assert (1, 1) == (len(sent(hub, "revision")), len(sent(hub, "tree")))


def test_metadata_of_one_directory_serves_all_its_files(hub: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """A load that names its files lists none, and asks once."""
    for number in range(20):
        hub.put("org/model", f"sub/{number}.safetensors", b"x" * number)
    storage = on_hub()

    assert list(range(20)) == [storage.stat(f"model/sub/{number}.safetensors").size for number in range(20)]
    assert (1, 1) == (len(sent(hub, "revision")), len(sent(hub, "tree")))


def test_a_file_in_lfs_has_a_digest(hub: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """The SHA-256 of its content; the id of a blob in git is none, and the version has it."""
    hub.put("org/model", WEIGHTS, b"weights")
    hub.put("org/model", "config.json", b"{}")

    found = {info.path: info for info in on_hub().list("model")}

    digest = hashlib.sha256(b"weights").hexdigest()
    assert {"sha256": digest} == found[f"model/{WEIGHTS}"].digests
    assert str(found[f"model/{WEIGHTS}"].version).endswith(f"/{digest}")
    blob = hashlib.sha1(b"blob 2\0{}").hexdigest()
    assert {} == found["model/config.json"].digests
    assert str(found["model/config.json"].version).endswith(f"/{blob}")


@pytest.mark.parametrize(
    "broken",
    [
        {"size": "7"},
        {"size": -1},
        {"size": True},
        {"size": 1 << 63},
        {"size": None},
        {"oid": "../../x", "lfs": None},
        {"oid": 7, "lfs": None},
        {"lfs": {"oid": "7" * 63, "size": 1}},
        {"lfs": {"oid": "7" * 64, "size": "1"}},
        {"path": "../{}"},
        {"path": "/{}"},
        {"path": "a\n{}"},
        {"path": "a\ud800{}"},
        {"path": "a//{}"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "tokenizer.bin"])
def test_unusable_metadata_fails_a_listing_only_for_what_a_load_needs(
    hub: FakeHub, on_hub: Callable[..., HfStorage], broken: dict[str, object], name: str
) -> None:
    """A file besides the weights and their index is left out."""
    whole = {"type": "file", "oid": "1" * 40, "size": 7, "path": name, "lfs": {"oid": "7" * 64, "size": 7}}
    if "size" in broken:
        whole.pop("lfs")
    entry = {**whole, **broken}
    entry["path"] = str(entry["path"]).format(name)
    good = {"type": "file", "oid": "1" * 40, "size": 7, "path": "good.safetensors"}

    def before(request: HubRequest) -> HubAnswer | None:
        return (200, {}, json.dumps([entry, good]).encode()) if "/tree/" in request.path else None

    hub.before = before
    if name.endswith(".bin"):
        assert ["model/good.safetensors"] == [info.path for info in on_hub().list("model")]
        return
    with pytest.raises(UnsupportedError, match="no usable name, size or version"):
        list(on_hub().list("model"))


@pytest.mark.parametrize("link", ["http://[::1", "https://hub.example/tree", "https://hub.example/?cursor=a&cursor=b"])
def test_a_next_page_without_a_beginning_is_refused(hub: FakeHub, on_hub: Callable[..., HfStorage], link: str) -> None:
    """Files could be missing from the listing."""
    headers = {"Link": f'<{link}>; rel="next"'}
    hub.before = lambda request: (200, headers, b"[]") if "/tree/" in request.path else None

    with pytest.raises(UnsupportedError, match="where its next page begins"):
        list(on_hub().list("model"))


def test_the_next_page_is_asked_of_the_endpoint(hub: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """Whatever server its URL names: a mirror may pass on those of the Hub."""
    links = iter([{"Link": '<https://elsewhere.invalid/api?cursor=x%2B1>; rel="next"'}])
    hub.before = lambda request: (200, next(links, {}), b"[]") if "/tree/" in request.path else None

    assert [] == list(on_hub().list("model"))
    assert [None, "x+1"] == [request.query.get("cursor") for request in sent(hub, "tree")]


@pytest.mark.parametrize("path", ["", "a..b/file", "model@v1/file"])
def test_paths_that_name_no_repository(on_hub: Callable[..., HfStorage], path: str) -> None:
    """Or another revision than that of the storage: no request is sent, and the error is one of a storage."""
    storage = on_hub("hf://org/model?revision=main")
    for version in (None, f"{'1' * 40}/{'2' * 40}"):
        with pytest.raises(NotFoundError):
            storage.read_into(path, 0, memoryview(bytearray(1)), version=version)
    for call in (lambda: list(storage.list(path)), lambda: storage.stat(path)):
        with pytest.raises(NotFoundError):
            call()


def test_files_of_another_directory_are_refused(hub: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """A listing of one directory cannot bring files of another into a load."""
    entry = {"type": "file", "oid": "1" * 40, "size": 7, "path": "elsewhere/model.safetensors"}
    hub.before = lambda request: (200, {}, json.dumps([entry]).encode()) if "/tree/" in request.path else None

    with pytest.raises(UnsupportedError, match="files of another directory"):
        list(on_hub().list("model/here"))


@pytest.mark.parametrize(
    ("header", "value"),
    [("X-Linked-Etag", f'"{"9" * 64}"'), ("X-Repo-Commit", "9" * 40)],
)
def test_a_mirror_with_another_content_than_it_lists_is_noticed(
    hub: FakeHub, on_hub: Callable[..., HfStorage], header: str, value: str
) -> None:
    """Before a byte is read: commit and ETag of the file are compared with those of the listing."""
    hub.put("org/model", WEIGHTS, b"weights")
    storage = on_hub()
    info = storage.stat(f"model/{WEIGHTS}")
    given = {"X-Linked-Etag": f'"{hashlib.sha256(b"weights").hexdigest()}"', header: value}

    def before(request: HubRequest) -> HubAnswer | None:
        location = {"Location": f"{hub.cdn_url}/cdn/x"}
        return (302, {**given, **location}, b"") if "/resolve/" in request.path else None

    hub.before = before
    with pytest.raises(SourceChangedError, match="another version"):
        read(storage, info)
    assert [] == [request for request in hub.requests if request.server == "cdn"]


def test_a_renamed_repository_is_read_under_its_old_name(
    hub: FakeHub, on_hub: Callable[..., HfStorage], caplog: pytest.LogCaptureFixture
) -> None:
    """The Hub's redirects are followed, and a warning gives the new name."""
    hub.put("org/new", WEIGHTS, b"weights")
    hub.renamed["org/old"] = "org/new"
    storage = on_hub("hf://org/old")

    with caplog.at_level(logging.WARNING):
        (info,) = storage.list("old")
    content = read(storage, info)

    assert b"weights" == content
    assert ["hf://org/old has another name now: hf://org/new"] == [record.getMessage() for record in caplog.records]
