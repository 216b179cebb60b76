"""Images in a bucket of S3: its faults, and to which log it belongs."""

import asyncio
import logging
import sys
from datetime import UTC, datetime, timedelta
from typing import Final

import pytest
from obstore import delete_async, get_async, put_async
from obstore import list as list_objects

from adapters.s3 import images
from adapters.s3.images import S3Images
from domain.errors import Failure
from domain.ports.images import ImagesRefused, Picture
from support.command_line import run_main
from support.harness import Running, running
from support.s3 import KEY_ID, S3, SECRET

PNG: Final = Picture(b"the bytes of a PNG", "image/png")
ID: Final = "edit_1763829000123_k3v9x2ab4c6d8e0f"
OLD: Final = datetime.now(UTC) - timedelta(hours=1)


async def opened(url: str, *, log: str = "postgresql", epoch: str = "e1") -> S3Images:
    return await S3Images.open(url, log=log, epoch=epoch)


@pytest.fixture
async def store(s3: S3, monkeypatch: pytest.MonkeyPatch) -> S3Images:
    """One that repeats requests at once."""
    for name in ("init_backoff", "max_backoff"):
        monkeypatch.setitem(images._BACKOFF, name, timedelta(milliseconds=2))
    store = await opened(s3.bucket())
    s3.requests.clear()
    return store


def soon() -> datetime:
    return datetime.now(UTC) + timedelta(minutes=1)


def assert_says(caplog: pytest.LogCaptureFixture, *texts: str) -> None:
    """The log says this, and no secret."""
    for text in texts:
        assert text in caplog.text
    for secret in (KEY_ID, SECRET, "127.0.0.1", "Traceback"):
        assert secret not in caplog.text


# --- faults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["503 Slow Down", "500 Internal Server Error", "429 Too Many Requests"])
async def test_a_service_that_is_busy_for_a_moment_is_asked_again(s3: S3, store: S3Images, code: str) -> None:
    s3.fail("PUT", code, "SlowDown", times=2)
    name = await store.save(ID, PNG)
    assert [method for method, _ in s3.requests] == ["PUT"] * 3
    s3.fail("GET", code, "SlowDown", times=2)
    assert await store.load(name) == PNG


async def test_a_service_that_stays_busy_fails_what_waits_for_it_and_says_so_once(
    s3: S3, store: S3Images, caplog: pytest.LogCaptureFixture
) -> None:
    name = await store.save(ID, PNG)
    for method in ("PUT", "GET", "HEAD", "DELETE", "POST"):
        s3.fail(method, "503 Slow Down", "SlowDown")
    s3.requests.clear()
    with pytest.raises(Failure, match="storage_failed"):
        await store.save(ID, PNG)
    assert len(s3.requests) == 5
    for call in (store.load(name), store.size(name), store.names(older_than=soon()), store.probe()):
        with pytest.raises(Failure, match="storage_failed"):
            await call
    await store.discard(name)
    await store.remove(ID)
    assert_says(caplog, f"a picture of {ID} cannot be stored: the service answers SlowDown", f"pictures of {ID} cannot")
    assert name not in caplog.text
    s3.calm()
    assert await store.names(older_than=soon()) == {ID: [name]}


async def test_a_service_that_does_not_answer_is_given_up_after_the_timeout(
    s3: S3, store: S3Images, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(images._CLIENT, "timeout", timedelta(milliseconds=300))
    monkeypatch.setitem(images._RETRIES, "retry_timeout", timedelta(milliseconds=300))
    name = await store.save(ID, PNG)
    store._bucket = images._connect(f"s3://{s3.requests[0][1].split('/')[1]}/a/prefix")
    s3.answering.clear()
    async with asyncio.timeout(20):
        for call in (store.save(ID, PNG), store.load(name), store.size(name), store.probe()):
            with pytest.raises(Failure, match="storage_failed"):
                await call
        await store.discard(name)
    assert_says(caplog, "the service cannot be reached")


async def test_a_picture_that_somebody_removed_is_none(s3: S3, store: S3Images) -> None:
    name = await store.save(ID, PNG)
    await (await opened(f"s3://{s3.requests[0][1].split('/')[1]}/a/prefix")).discard(name)
    assert (await store.load(name), await store.size(name)) == (None, 0)
    await store.discard(name)


async def test_a_bucket_that_is_gone_fails_instead_of_having_no_pictures(
    s3: S3, store: S3Images, caplog: pytest.LogCaptureFixture
) -> None:
    name = await store.save(ID, PNG)
    s3.fail("GET", "404 Not Found", "NoSuchBucket")
    s3.fail("PUT", "404 Not Found", "NoSuchBucket")
    for call in (store.load(name), store.names(older_than=soon()), store.probe(), store.save(ID, PNG)):
        with pytest.raises(Failure, match="storage_failed"):
            await call
    assert_says(caplog, "the service answers NoSuchBucket")


async def test_a_large_picture_is_stored_by_one_request_with_its_type(s3: S3, store: S3Images) -> None:
    large = Picture(bytes(12_000_000), "image/webp")
    name = await store.save(ID, large)
    assert s3.requests == [("PUT", s3.requests[0][1])]
    assert await store.load(name) == large
    found = await get_async(store._bucket, f"{ID}/{name}")
    assert found.attributes["Content-Type"] == "image/webp"


async def test_all_pages_of_a_listing_are_read_and_only_pictures_are_named(
    s3: S3, store: S3Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    names = {await store.save(ID, PNG) for _ in range(25)}
    foreign = ["notes.txt", f"{ID}/notes.txt", f"other/{min(names)}", f"{ID}/x/{min(names)}"]
    for key in foreign:
        await put_async(store._bucket, key, b"x")
    assert {key: set(found) for key, found in (await store.names(older_than=soon())).items()} == {ID: names}
    await store.remove(ID.replace("edit", "gen"))
    left = {each["path"] for each in await list_objects(store._bucket).collect_async()}
    assert left == {".stagecast", *foreign, *(f"{ID}/{name}" for name in names)}


@pytest.mark.long
async def test_a_listing_of_more_than_a_thousand_pictures_is_whole(store: S3Images) -> None:
    names = {await store.save(ID, PNG) for _ in range(1_005)}
    assert set((await store.names(older_than=soon()))[ID]) == names
    await store.remove(ID)
    assert await store.names(older_than=soon()) == {}


# --- the log that it belongs to --------------------------------------------------------------------------


async def test_nodes_of_one_log_claim_a_bucket_together(s3: S3) -> None:
    url = s3.bucket()
    nodes = await asyncio.gather(*(opened(url) for _ in range(6)))
    name = await nodes[0].save(ID, PNG)
    for node in nodes:
        await node.probe()
        assert await node.load(name) == PNG
        assert await node.names(older_than=OLD) == {}


async def test_of_logs_that_claim_a_bucket_at_the_same_time_one_gets_it(s3: S3) -> None:
    url = s3.bucket()
    outcomes = await asyncio.gather(*(opened(url, epoch=f"e{n}") for n in range(6)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, ImagesRefused)]
    assert len(refused) == 5
    assert {f"The image bucket {url} belongs to another log" in str(each) for each in refused} == {True}


async def test_a_memory_log_takes_over_from_one_before_and_removes_its_pictures(
    s3: S3, caplog: pytest.LogCaptureFixture
) -> None:
    url = s3.bucket()
    before = await opened(url, log="memory", epoch="e0")
    name, after = await before.save(ID, PNG), before
    async with asyncio.timeout(10):  # The times of objects are whole seconds.
        while await after.names(older_than=OLD) != {ID: [name]}:
            after = await opened(url, log="memory", epoch=f"e{id(after)}")
    for call in (before.probe(), before.names(older_than=soon())):
        with pytest.raises(Failure, match="storage_failed"):
            await call
    assert_says(caplog, "another log has claimed the bucket")


async def test_pictures_in_a_bucket_without_a_mark_are_kept(s3: S3) -> None:
    url = s3.bucket()
    before = await opened(url)
    await before.save(ID, PNG)
    await delete_async(before._bucket, ".stagecast")
    with pytest.raises(Failure):
        await before.probe()
    async with asyncio.timeout(10):
        while await (after := await opened(url, epoch="e2")).names(older_than=soon()):
            await delete_async(after._bucket, ".stagecast")


# --- the service -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (None, "the service answers NoSuchBucket"),
        (("403 Forbidden", "InvalidAccessKeyId"), "the service answers InvalidAccessKeyId"),
        (("403 Forbidden", "AccessDenied"), "the service answers AccessDenied"),
        (("301 Moved Permanently", "PermanentRedirect"), "AWS_REGION is not the region of the bucket"),
    ],
)
async def test_a_bucket_that_cannot_be_used_ends_the_start_with_3_and_a_sentence(
    s3: S3, fault: tuple[str, str] | None, reason: str
) -> None:
    if fault:
        s3.fail("GET", *fault)
    for command in (("serve", "--port", "0"), ("check",)):
        done = await run_main(*command, STAGECAST_IMAGES="s3://no-such-bucket/x")
        sentence = f"stagecast: The image bucket s3://no-such-bucket/x cannot be used: {reason}.\n"
        assert (done.code, done.errors) == (3, sentence)


async def test_without_the_extra_the_start_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "adapters.s3.images")
    done = await run_main("serve", "--port", "0", "--images", "s3://bucket/prefix")
    assert ".venv/bin/pip install -e '.[s3]'" in done.sentence(3)


async def test_credentials_that_may_only_read_end_the_start(s3: S3) -> None:
    url = s3.bucket()
    await opened(url)
    s3.fail("PUT", "403 Forbidden", "AccessDenied")
    with pytest.raises(ImagesRefused, match="the service answers AccessDenied"):
        await opened(url)


async def test_a_start_without_credentials_says_which_are_missing(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setitem(images._RETRIES, "max_retries", 0)
    monkeypatch.setitem(images._CLIENT, "connect_timeout", timedelta(milliseconds=100))
    with pytest.raises(ImagesRefused, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set"):
        await opened(s3.bucket())


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [("http://127.0.0.1:1", "the service cannot be reached"), ("127.0.0.1:9000", "must be an http or https URL")],
)
async def test_an_invalid_or_dead_endpoint_ends_the_start(s3: S3, endpoint: str, reason: str) -> None:
    done = await run_main("serve", "--port", "0", STAGECAST_IMAGES="s3://bucket", AWS_ENDPOINT_URL=endpoint)
    assert reason in done.sentence(3)


async def test_a_service_stores_in_a_bucket_and_check_reads_it(s3: S3) -> None:
    url = s3.bucket()
    async with running(url) as service:
        generation_id = await service.start("ada")
        await service.service.leases.drain()
        path = (await service.get(f"/generations/{generation_id}"))["compositionUrl"]
        path = path[path.index("/images/") :]
        for query in ("", "?width=320"):
            assert (await service.http.get(f"{path}{query}")).status_code == 200
        before = len(s3.requests)
        assert (await run_main("check", STAGECAST_IMAGES=url)).code == 0
        assert {method for method, _ in s3.requests[before:]} == {"GET"}
        assert (await service.http.get("/health/ready")).status_code == 200
        deleted = await service.http.delete(f"/generations/{generation_id}", headers={"X-User-Id": "ada"})
        assert deleted.status_code == 204
        for query in ("", "?width=320"):
            assert (await service.http.get(f"{path}{query}")).status_code == 404
        assert await service.service.images.store.names(older_than=soon()) == {}


async def test_a_service_without_its_bucket_is_not_ready_within_a_second_and_comes_back(
    s3: S3, caplog: pytest.LogCaptureFixture
) -> None:
    async def until_ready(service: Running, status: int) -> str:
        async with asyncio.timeout(20):
            while (answer := await service.http.get("/health/ready")).status_code != status:
                await asyncio.sleep(0.1)
        return str(answer.json()["parts"]["images"])

    caplog.set_level(logging.WARNING)
    async with running(s3.bucket()) as service:
        s3.answering.clear()
        assert await until_ready(service, 503) == "storage_failed"
        s3.calm()
        s3.fail("PUT", "403 Forbidden", "AccessDenied")
        assert await until_ready(service, 503) == "storage_failed"
        refused = await service.post("ada", "edit")
        assert refused.json()["code"] == "storage_failed"
        s3.calm()
        assert await until_ready(service, 200) == "ok"
        await service.start("ada")
        await service.service.leases.drain()
    assert_says(caplog)
