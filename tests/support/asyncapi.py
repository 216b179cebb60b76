"""Checks every event that a test receives against the service's AsyncAPI description."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import jsonschema_rs

from api.asyncapi import document


@cache
def _validators() -> Mapping[str, jsonschema_rs.Validator]:
    components = document("1", "http://localhost:3000")["components"]
    return {
        name: jsonschema_rs.validator_for({"allOf": [message["payload"]], "components": components})
        for name, message in components["messages"].items()
    }


def check_message(name: str, data: Any) -> None:
    """Fail if there is no such message, or if this is not one."""
    errors = [error.message for error in _validators()[name].iter_errors(data)]
    assert not errors, f"{name} is not as described: {errors}"


def check_ack(name: str, ack: Any) -> None:
    """Fail if this is no answer to that event. Unknown events are answered, too."""
    if f"{name}_ack" in _validators():
        check_message(f"{name}_ack", ack)
