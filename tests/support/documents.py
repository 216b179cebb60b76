"""The snippets of the documents, as programs."""

import re
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent.parent


def snippet(document: str, language: str, mark: str = "") -> str:
    """The one block of this document in this language that has this text in it."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)
    [block] = [block for block in blocks if mark in block]
    return str(block)
