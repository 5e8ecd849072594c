"""``Pager`` that keeps its pages, for tests and simulations."""

from __future__ import annotations

from controller.adapters.memory.gate import Gate, OpenGate
from controller.ports import Page


class MemoryPager:
    """Keeps every page in ``pages``, in the order of arrival. Gate operation: ``page``."""

    def __init__(self, gate: Gate | None = None) -> None:
        self.pages: list[Page] = []
        self._gate: Gate = gate if gate is not None else OpenGate()

    async def page(self, page: Page) -> None:
        """Raises Unavailable when the gate does; a lost answer leaves the page delivered."""
        await self._gate.before("page")
        self.pages.append(page)
        await self._gate.after("page")

    def keys(self) -> tuple[str, ...]:
        """Keys of all pages, in order."""
        return tuple(page.key for page in self.pages)
