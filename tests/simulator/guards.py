"""The host and pinned memory: it must leave it alone while work on it is pending."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tests.simulator.errors import RuleError
from tests.simulator.memory import POISON, Allocation
from tests.simulator.work import Action

if TYPE_CHECKING:
    from tests.simulator.machine import Machine


def guards(machine: Machine, action: Action, owners: Sequence[Allocation], label: str) -> list[Callable[[], None]]:
    """Checks, made when the action is done, that pinned memory is as it was when it was queued.

    What is to be written is poisoned: who reads it too early does not find what was there. Memory that earlier work is still to
    use is left alone, because its content is not known yet.
    """
    found: list[Callable[[], None]] = []
    for use, owner in zip(action.uses, owners, strict=True):
        start = use.address - owner.address
        if owner.device is not None or owner.segment.pending(start, start + use.nbytes):
            continue
        content = machine.space.bytes(use.address, use.nbytes)
        if use.write:
            content[:] = POISON
        before = content.tobytes()

        def guard(content: Any = content, before: bytes = before) -> None:
            if content.tobytes() != before:
                error = RuleError(f"the host changed pinned memory that {label} was still to use")
                machine.blame(error)
                raise error

        found.append(guard)
    return found
