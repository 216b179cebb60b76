"""Removes users with everything that is stored of them."""

from dataclasses import dataclass

from domain.errors import Failure, NotFinished
from domain.ports.quotas import Quotas
from domain.ports.sessions import Sessions
from domain.workflow import Workflow


@dataclass(kw_only=True, eq=False)
class UserRemoval:
    """Removes a user: unfinished work is cancelled, and nothing of what was there before is left."""

    workflow: Workflow
    sessions: Sessions
    quotas: Quotas

    async def remove(self, user_id: str) -> None:
        """Remove the user; an unknown one is removed already. A start that comes meanwhile is that of a new user.

        Raises:
            LogUnavailable: some of it may have been removed. Try again.
        """
        workflow = self.workflow
        await workflow.started(user_id)
        while True:
            for history in await workflow.log.generations(user_id, active=True, limit=1_000):
                await workflow.recorder.end(history.generation_id, Failure("cancelled"))
                await workflow.leases.withdraw(history.generation_id)
            try:
                generation_ids = await workflow.retention.remove_user(user_id)
                break
            except NotFinished:
                continue  # It has started since.
        await self.sessions.end_all(user_id)
        await self.quotas.forget_starts(user_id)
        for generation_id in generation_ids:
            await workflow.images.remove(generation_id)
