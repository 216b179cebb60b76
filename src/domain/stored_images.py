"""The image store, and how many bytes each user has in it."""

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime

from domain.ports.images import ImageStore, Picture


class StoredImages:
    """An image store that counts what it keeps. What was there before has to be told by `count`."""

    def __init__(self, images: ImageStore) -> None:
        self._images = images
        #: Of each generation its user, and its bytes; and the bytes of each user.
        self._owners: dict[str, str] = {}
        self._sizes: defaultdict[str, int] = defaultdict(int)
        self._stored: defaultdict[str, int] = defaultdict(int)
        self._discarding: set[str] = set()

    def stored(self, user_id: str) -> int:
        """How many bytes of images this user has."""
        return self._stored.get(user_id, 0)

    def assign(self, generation_id: str, user_id: str) -> None:
        """The images of this generation are those of this user."""
        self._owners[generation_id] = user_id

    async def count(self, generation_id: str, user_id: str, names: Iterable[str]) -> None:
        """Count images that another process has stored, unless the generation is known here."""
        if generation_id not in self._owners:
            sizes = [await self._images.size(name) for name in names]
            self.assign(generation_id, user_id)
            self._add(generation_id, sum(sizes))

    def _add(self, generation_id: str, size: int) -> None:
        user_id = self._owners.get(generation_id)
        if user_id is not None:
            self._sizes[generation_id] += size
            self._stored[user_id] += size
            if not self._stored[user_id]:
                del self._stored[user_id]

    async def save(self, generation_id: str, picture: Picture) -> str:
        """Store the picture, and count it."""
        name = await self._images.save(generation_id, picture)
        self._add(generation_id, len(picture.data))
        return name

    async def load(self, name: str) -> Picture | None:
        """The picture of this name."""
        return await self._images.load(name)

    async def discard(self, name: str) -> None:
        """Remove one picture, which no longer counts."""
        if name not in self._discarding:
            self._discarding.add(name)
            try:
                size = await self._images.size(name)
                await self._images.discard(name)
                self._add(name.rpartition("-")[0], -size)
            finally:
                self._discarding.discard(name)

    async def remove(self, generation_id: str) -> None:
        """Remove all pictures of one generation, which no longer count."""
        await self._images.remove(generation_id)
        self._add(generation_id, -self._sizes.get(generation_id, 0))
        self._sizes.pop(generation_id, None)
        self._owners.pop(generation_id, None)

    async def names(self, *, older_than: datetime) -> dict[str, list[str]]:
        """The names of all pictures stored before that moment, by generation id."""
        return await self._images.names(older_than=older_than)

    async def probe(self) -> None:
        """As that of the store."""
        await self._images.probe()

    async def close(self) -> None:
        """Let go of the store."""
        await self._images.close()
