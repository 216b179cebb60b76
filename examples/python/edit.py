"""Edit a photograph, show the progress, and save the result: ``python edit.py photo.jpg "Make the hat red"``."""

import os
import sys
from pathlib import Path

import httpx2

from stagecast_client import Generation, GenerationFailed, Stagecast, StagecastError


def show(generation: Generation) -> None:
    """Redraw the bar."""
    done = "█" * (generation.progress // 4)
    print(f"\r{done:░<25} {generation.progress:3} % {generation.message:60}", end="", flush=True)


def main(photo: str, prompt: str) -> None:
    """Run one edit."""
    url = os.environ.get("STAGECAST_URL", "http://localhost:3000")
    with Stagecast(url, token=os.environ.get("STAGECAST_TOKEN")) as stagecast:
        generation = stagecast.run("edit", prompt=prompt, images=[photo], on_progress=show)
    picture = httpx2.get(generation.edited_image_url or "")
    result = Path(photo).with_stem(f"{Path(photo).stem}-edited")
    result.write_bytes(picture.raise_for_status().content)
    print(f"\n{result}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit('usage: python edit.py photo.jpg "Make the hat red"')
    try:
        main(*sys.argv[1:])
    except GenerationFailed as failure:
        sys.exit(f"\n{failure} ({failure.code})")
    except StagecastError as error:
        sys.exit(f"{error} ({error.code})")
