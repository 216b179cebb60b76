"""HTTP: users: their balances, and their removal."""

from typing import Final

from fastapi import Request, Response

from api.auth import PROBLEMS, Caller, service_only
from api.rest import bodies, routes
from api.rest.generations import IdempotencyKey
from api.rest.problems import documented
from api.rest.schemas import Account, Grant, json_response
from api.rest.state import UseCases
from domain.identity import user_id as valid_user_id

router: Final = routes.router("accounts")


@router.get("/me", response_model=Account, responses=documented(*PROBLEMS))
async def get_me(caller: Caller, workflow: UseCases) -> Response:
    """The calling user and the remaining balance."""
    return json_response(Account(user_id=caller, credit=await workflow.credit(caller)))


@router.post(
    "/users/{user_id:path}/credit",
    response_model=Account,
    responses=documented(*bodies.PROBLEMS, "idempotency_mismatch", "credits_off", *PROBLEMS),
    dependencies=[service_only],
    openapi_extra=bodies.json_body(Grant),
)
async def grant_credit(request: Request, user_id: str, workflow: UseCases, key: IdempotencyKey = None) -> Response:
    """Grant credit to a user, or take it back, but never below 0. For services."""
    user, grant = valid_user_id(user_id), await bodies.read_json(request, Grant)
    return json_response(Account(user_id=user, credit=await workflow.grant(user, grant.amount, key)))


@router.delete(
    "/users/{user_id:path}",
    status_code=204,
    response_class=Response,
    responses=documented(*PROBLEMS),
    dependencies=[service_only],
)
async def delete_user(user_id: str, workflow: UseCases) -> Response:
    """Remove a user: generations, images, sessions, idempotency keys and the balance. For services.

    Unfinished work is cancelled first. An unknown user is removed already.
    """
    await workflow.remove_user(valid_user_id(user_id))
    return Response(status_code=204)
