"""Which blocks of the pool hold whose keys and values. Plain Python.

A block holds ``BLOCK`` tokens of one sequence, and may be shared: a full block stays in the prefix
cache after its sequence ended, until its place is needed, and any sequence that begins with the
same tokens under the same version takes it over. A cached block is found by the block before it and
its own tokens, so a hit is the equality of every token from the first on.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable

#: Tokens of a block.
BLOCK = 32

Tokens = tuple[int, ...]
#: The id of the chain of blocks before (or the namespace, for the first), and a block's tokens.
Link = tuple[Hashable, Tokens]


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK)


class Table:
    """The blocks that hold one sequence's keys and values under one version, in order.

    Args:
        namespace: what may share blocks: all that decides keys and values beside the tokens.
    """

    def __init__(self, namespace: Hashable) -> None:
        self.namespace = namespace
        self.clear()

    def clear(self) -> None:
        self.blocks: list[int] = []
        self.published = 0  # blocks that were offered to the prefix cache
        self.chain = self.namespace  # the id of the chain of those


class BlockManager:
    """Hands out ``count`` blocks and remembers what full ones hold."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))  # a heap: low blocks first keeps those in use together
        self._holders = [0] * count
        self._links: dict[Link, tuple[int, int]] = {}  # block, and the id of the chain to it
        self._link_of: dict[int, Link] = {}
        self._unheld: dict[int, None] = {}  # cached blocks that nobody holds, oldest first
        self._last_chain = 0

    @property
    def held(self) -> int:
        """Blocks that sequences hold."""
        return self.count - self.available

    @property
    def available(self) -> int:
        """Blocks that can be handed out, those of the cache included."""
        return len(self._free) + len(self._unheld)

    @property
    def cached(self) -> int:
        """Blocks in the prefix cache, held or not."""
        return len(self._links)

    def grow(self, table: Table) -> bool:
        """Give a table one more block; False while all are held."""
        if self._free:
            block = heapq.heappop(self._free)
        elif self._unheld:
            block = next(iter(self._unheld))
            del self._unheld[block]
            del self._links[self._link_of.pop(block)]
        else:
            return False
        self._holders[block] = 1
        table.blocks.append(block)
        return True

    def release(self, table: Table) -> None:
        """Empty a table; the last block first, so that a chain loses its end before its start."""
        for block in reversed(table.blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._link_of:
                self._unheld[block] = None
            else:
                heapq.heappush(self._free, block)
        table.clear()

    def match(self, table: Table, tokens: Tokens, most: int) -> int:
        """How many blocks, at most ``most``, an empty table could take over for these tokens."""
        return len(self._chain(table, tokens, most))

    def take_over(self, table: Table, tokens: Tokens, count: int) -> None:
        """Let an empty table begin with the first ``count`` blocks that ``match`` found."""
        for block, chain in self._chain(table, tokens, count):
            self._unheld.pop(block, None)
            self._holders[block] += 1
            table.blocks.append(block)
            table.chain = chain
            table.published += 1

    def publish(self, table: Table, tokens: Tokens) -> None:
        """Let the full blocks of a table be found; where another holds the same, that one stays."""
        while (end := (table.published + 1) * BLOCK) <= len(tokens):
            link = (table.chain, tokens[end - BLOCK : end])
            if link not in self._links:
                block = table.blocks[table.published]
                self._last_chain += 1
                self._links[link] = (block, self._last_chain)
                self._link_of[block] = link
            table.chain = self._links[link][1]
            table.published += 1

    def _chain(self, table: Table, tokens: Tokens, most: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        chain = table.chain
        for start in range(0, min(most, len(tokens) // BLOCK) * BLOCK, BLOCK):
            place = self._links.get((chain, tokens[start : start + BLOCK]))
            if place is None:
                break
            found.append(place)
            chain = place[1]
        return found
