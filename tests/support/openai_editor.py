"""An OpenAI editor for a local server, and a recorder of its reports."""

import asyncio
import ssl
from typing import Final

import openai
import pytest

from adapters.images.intake import PillowIntake
from adapters.outbound.url_fetcher import UrlFetcher
from adapters.providers.openai import DEFAULT_MODEL, OpenAIEditor
from domain.errors import Failure
from domain.ports.images import Picture
from domain.requests import Options
from support.openai_server import KEY, OpenAIServer, picture
from support.pictures import BLUE, THREADS, solid

SHEET: Final = solid(BLUE, (300, 424), "JPEG")

PROMPT: Final = 'Set it "in winter",\r\n\twith {snow} & a 雪だるま ☃ --boundary\n'

RESULT: Final = picture("1024x1536")

SKETCH: Final = picture("1024x1536", BLUE)


#: Seconds for a picture.
DEADLINE: Final = 60


#: Without certificate authorities, because loading them is slow.
NO_TRUSTED_CAS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


#: Public addresses only.
FETCHER: Final = UrlFetcher(PillowIntake(THREADS), trust=NO_TRUSTED_CAS)


def editor_at(
    base_url: str, model: str = DEFAULT_MODEL, *, deadline: float = DEADLINE, api_key: str = KEY
) -> OpenAIEditor:
    return OpenAIEditor(
        THREADS,
        FETCHER,
        api_key=api_key,
        base_url=base_url,
        model=model,
        deadline=deadline,
        backoff=0.01,
        trust=NO_TRUSTED_CAS,
    )


class Reports:
    def __init__(self) -> None:
        self.fractions: list[float] = []
        self.messages: list[str] = []
        self.previews: list[Picture | None] = []
        #: Set by the first report.
        self.received = asyncio.Event()

    async def __call__(self, fraction: float, message: str, preview: Picture | None = None) -> None:
        self.fractions.append(fraction)
        self.messages.append(message)
        self.previews.append(preview)
        self.received.set()


async def edited(server: OpenAIServer, reports: Reports | None = None, model: str = DEFAULT_MODEL) -> Picture:
    return await editor_at(server.base_url, model).edit(SHEET, PROMPT, Options(), reports or Reports())


async def failing(editor: OpenAIEditor, reports: Reports | None = None) -> Failure:
    """The failure of an edit. Checks that it has no text, key or exception of the provider."""
    with pytest.raises(Failure) as caught:
        await editor.edit(SHEET, PROMPT, Options(), reports or Reports())
    failure: BaseException | None = caught.value
    while failure is not None:
        assert not isinstance(failure, openai.OpenAIError)
        assert KEY not in f"{failure!r} {failure.__dict__}"
        failure = failure.__cause__ or failure.__context__
    assert "Error code" not in caught.value.sentence
    return caught.value


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "adapters.providers.attempts"]
