from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.blocks import BLOCK, BlockManager, Table, blocks_for

COUNT = 6


def tokens_of(pattern: str, more: int = 0) -> tuple[int, ...]:
    """A full block for each letter, and some tokens more."""
    return tuple(ord(letter) for letter in pattern for _ in range(BLOCK)) + (0,) * more


def filled(manager: BlockManager, tokens: tuple[int, ...], namespace: str = "v") -> Table:
    """A table whose blocks were all computed and offered to the prefix cache."""
    table = Table(namespace)
    for _ in range(blocks_for(len(tokens))):
        assert manager.grow(table)
    manager.publish(table, tokens)
    return table


def matched(manager: BlockManager, tokens: tuple[int, ...], namespace: str = "v") -> int:
    return manager.match(Table(namespace), tokens, len(tokens) // BLOCK)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (BLOCK, 1), (BLOCK + 1, 2)])
def test_blocks_are_whole(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens) == blocks


def test_only_what_begins_alike_in_the_same_namespace_is_found() -> None:
    manager = BlockManager(COUNT)
    filled(manager, tokens_of("abc", 5))
    assert manager.cached == 3, "a block that is not full cannot be shared"
    assert matched(manager, tokens_of("abcd")) == 3
    assert matched(manager, tokens_of("abd")) == 2
    assert matched(manager, tokens_of("ab", 31)) == 2
    assert matched(manager, tokens_of("bc")) == 0, "the same tokens after others are others"
    assert matched(manager, tokens_of("abc"), "w") == 0
    assert manager.match(Table("v"), tokens_of("abc"), 1) == 1


def test_a_block_that_is_shared_outlives_its_first_holder() -> None:
    manager = BlockManager(COUNT)
    first = filled(manager, tokens_of("ab"))
    second = Table("v")
    manager.take_over(second, tokens_of("ab"), 2)
    assert second.blocks == first.blocks
    manager.release(first)
    assert (manager.held, manager.available) == (2, COUNT - 2)
    manager.release(second)
    assert (manager.held, manager.cached, matched(manager, tokens_of("ab"))) == (0, 2, 2)


def test_the_oldest_chain_goes_first_and_from_its_end() -> None:
    manager = BlockManager(4)
    for pattern in ("ab", "cd"):
        manager.release(filled(manager, tokens_of(pattern)))
    late = Table("w")
    assert manager.grow(late)
    assert [matched(manager, tokens_of(pattern)) for pattern in ("ab", "cd")] == [1, 2]
    assert manager.grow(late)
    assert [matched(manager, tokens_of(pattern)) for pattern in ("ab", "cd")] == [0, 2]


def test_what_two_computed_at_once_is_kept_once() -> None:
    manager = BlockManager(COUNT)
    first, second = (filled(manager, tokens_of("ab")) for _ in range(2))
    assert manager.cached == 2
    manager.release(second)
    assert (manager.held, manager.available) == (2, COUNT - 2)
    manager.release(first)
    assert matched(manager, tokens_of("ab")) == 2


def test_a_chain_that_lost_its_start_is_found_no_more() -> None:
    """Its later blocks stay until their turn, and must not be taken for others'."""
    manager = BlockManager(5)
    first, second = (filled(manager, tokens_of("a")) for _ in range(2))
    manager.release(first)
    taker = Table("w")
    while manager.available:
        assert manager.grow(taker)  # the first's block among them
    assert not manager.grow(taker)
    assert matched(manager, tokens_of("a")) == 0
    manager.release(taker)
    assert manager.grow(second)
    manager.publish(second, tokens_of("ab"))
    assert matched(manager, tokens_of("ab")) == 0
    manager.release(second)
    again = filled(manager, tokens_of("ab"))
    assert matched(manager, tokens_of("ab")) == 2
    manager.release(again)
    assert manager.available == 5


class Blocks(RuleBasedStateMachine):
    """Tables come, grow and go; what each block holds is remembered beside the manager."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(COUNT)
        self.tables: list[tuple[Table, tuple[int, ...]]] = []
        self.contents: dict[int, tuple[object, tuple[int, ...]]] = {}

    def holders(self) -> Counter[int]:
        return Counter(block for table, _ in self.tables for block in table.blocks)

    @rule(
        namespace=st.sampled_from("vw"),
        pattern=st.text("ab", max_size=4),
        more=st.integers(0, BLOCK - 1),
        most=st.integers(0, 4),
    )
    def begin(self, namespace: str, pattern: str, more: int, most: int) -> None:
        table, tokens = Table(namespace), tokens_of(pattern, more)
        hits = self.manager.match(table, tokens, most)
        assert hits <= min(most, len(pattern))
        self.manager.take_over(table, tokens, hits)
        assert len(table.blocks) == hits
        for place, block in enumerate(table.blocks):
            assert self.contents[block] == (namespace, tokens[: (place + 1) * BLOCK])
        self.tables.append((table, tokens))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        table, tokens = data.draw(st.sampled_from(self.tables))
        held = self.holders()
        if len(table.blocks) == blocks_for(len(tokens)):
            return
        if not self.manager.grow(table):
            assert len(held) == COUNT
            return
        block = table.blocks[-1]
        assert block not in held
        end = len(table.blocks) * BLOCK
        self.contents[block] = (table.namespace, tokens[:end])
        self.manager.publish(table, tokens[:end])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.tables) - 1))
        table, _ = self.tables.pop(place)
        self.manager.release(table)
        assert table.blocks == []

    @invariant()
    def counts_are_right(self) -> None:
        held = self.holders()
        assert self.manager.held == len(held)
        assert self.manager.available == COUNT - len(held)
        assert self.manager.cached <= COUNT

    def teardown(self) -> None:
        for table, _ in self.tables:
            self.manager.release(table)
        last = Table("x")
        for _ in range(COUNT):
            assert self.manager.grow(last)
        assert sorted(last.blocks) == list(range(COUNT)), "every block comes back once"


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=150, stateful_step_count=40)
