"""Serves the service's own sample pictures from disk: its own address may not be public, so they cannot be fetched."""

import asyncio
from pathlib import Path

from domain.ports.images import ImageFetcher, ImageIntake, Picture


class SampleFetcher:
    """`domain.ports.images.ImageFetcher`: reads URLs below `base` from `folder`; `others` fetches the rest."""

    def __init__(self, intake: ImageIntake, others: ImageFetcher, *, base: str, folder: Path) -> None:
        self._intake = intake
        self._others = others
        self._files = {f"{base}/{file.name}": file for file in folder.iterdir()}

    async def fetch(self, url: str) -> Picture:
        file = self._files.get(url)
        if file is None:
            return await self._others.fetch(url)
        return await self._intake.admit(await asyncio.to_thread(file.read_bytes))
