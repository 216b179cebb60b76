"""Composes three pictures with Stagecast's own composer, once they are taken in, and tells the seconds of CPU.

python -m benchmarks.servers.compose PICTURE PICTURE PICTURE
"""

import asyncio
import sys
import time
from functools import partial
from pathlib import Path

from adapters.images.composer import PillowComposer
from adapters.images.intake import PillowIntake
from adapters.images.threads import ImageThreads
from benchmarks.servers import control
from domain.ports.images import Picture


async def main(contents: list[bytes]) -> None:
    """Take them in, and compose them."""
    threads = ImageThreads()
    intake, composer = PillowIntake(threads), PillowComposer(threads)
    pictures = [await intake.admit(content) for content in contents]

    async def load(picture: Picture) -> Picture:
        return picture

    began = time.process_time()
    sheet = await composer.compose([partial(load, picture) for picture in pictures])
    control.say(seconds=time.process_time() - began, type=sheet.media_type)
    threads.close()


if __name__ == "__main__":
    asyncio.run(main([Path(path).read_bytes() for path in sys.argv[1:]]))
