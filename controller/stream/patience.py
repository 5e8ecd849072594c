"""Asking several stores at once without waiting for the one that is dead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

GRACE_SECONDS = 1.0
"""How long the last ones may take once enough have answered. Well above a healthy store's answer from another continent, below
the deadline that a frozen one would use up."""


async def ask_all(
    questions: Mapping[str, Coroutine[Any, Any, T]],
    *,
    enough: int,
    good: Callable[[T], bool],
    essential: Collection[str] = (),
    grace_seconds: float = GRACE_SECONDS,
) -> dict[str, T | None]:
    """The answers by name, None for those that were still out ``grace_seconds`` after ``enough`` *good* ones had come and every
    ``essential`` one had answered in any way.

    An answer that is an exception is raised, at once. Questions bound themselves: each must end by its own deadline.
    """
    tasks = {asyncio.ensure_future(question): name for name, question in questions.items()}
    answers: dict[str, T | None] = dict.fromkeys(questions)
    waiting = set(tasks)
    loop = asyncio.get_running_loop()
    deadline: float | None = None
    try:
        while waiting:
            timeout = None if deadline is None else max(0.0, deadline - loop.time())
            done, waiting = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
            for task in done:
                answers[tasks[task]] = task.result()
            came = sum(1 for answer in answers.values() if answer is not None and good(answer))
            if deadline is None and came >= enough and all(answers[name] is not None for name in essential if name in answers):
                deadline = loop.time() + grace_seconds
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    return answers
