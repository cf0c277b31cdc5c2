import itertools
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry import endpoints, moves
from registry.database import Database
from registry.errors import Conflict, Gone, NotFound, PreconditionFailed
from registry.moves import Target
from registry.versions import delete_version
from tests.unit.registry.conftest import TENANT, add_version


def point(database: Database, name: str, *versions: str) -> endpoints.Endpoint:
    state = tuple(Target(version) for version in versions)
    with database.write() as connection:
        try:
            generation = endpoints.get_endpoint(connection, TENANT, name).generation
        except NotFound:
            return endpoints.create_endpoint(connection, TENANT, name, state, actor="test")
        return endpoints.move_endpoint(
            connection, TENANT, name, state, generation=generation, kind="set", actor="test"
        )


def rollback(database: Database, name: str, **how: object) -> str:
    with database.write() as connection:
        _, after = endpoints.rollback_endpoint(
            connection,
            TENANT,
            name,
            actor="test",
            **how,  # type: ignore[arg-type]
        )
        return after.head


def test_every_move_keeps_its_message(database: Database) -> None:
    first, second = ((Target(add_version(database, c * 64).id),) for c in "ab")
    with database.write() as connection:
        endpoints.create_endpoint(
            connection, TENANT, "facts", first, actor="test", message="a start"
        )
        endpoints.move_endpoint(
            connection,
            TENANT,
            "facts",
            second,
            generation=1,
            kind="set",
            actor="test",
            message="better",
        )
        endpoints.rollback_endpoint(connection, TENANT, "facts", actor="test", message="worse")
        made = moves.history(connection, TENANT, "facts").items
    assert [move.message for move in made] == ["worse", "better", "a start"]


def test_second_rollback_goes_further_back_and_never_to_and_fro(database: Database) -> None:
    ids = [add_version(database, f"{i}" * 64).id for i in range(4)]
    for version in ids:
        point(database, "facts", version)
    assert rollback(database, "facts") == ids[2]
    assert rollback(database, "facts") == ids[1]
    point(database, "facts", ids[3])
    assert rollback(database, "facts") == ids[1]
    assert rollback(database, "facts") == ids[0]
    with pytest.raises(Conflict, match="history"):
        rollback(database, "facts")


def test_rollback_restores_a_split_whole(database: Database) -> None:
    first, second = (add_version(database, c * 64).id for c in "ab")
    point(database, "facts", first)
    split = (Target(first, 0.9), Target(second, 0.1))
    with database.write() as connection:
        endpoints.move_endpoint(
            connection, TENANT, "facts", split, generation=1, kind="set", actor="test"
        )
    point(database, "facts", second)
    with database.write() as connection:
        _, after = endpoints.rollback_endpoint(connection, TENANT, "facts", actor="test")
    assert after.state == split


def test_rollback_by_version_generation_and_steps(database: Database) -> None:
    ids = [add_version(database, f"{i}" * 64).id for i in range(4)]
    for version in ids:
        point(database, "facts", version)
    assert rollback(database, "facts", to_version=ids[1]) == ids[1]
    assert rollback(database, "facts", to_generation=4) == ids[3]
    assert rollback(database, "facts", steps=3) == ids[0]
    with pytest.raises(Conflict, match="never"):
        rollback(database, "facts", to_version=ids[3])
    with pytest.raises(PreconditionFailed, match="generation"):
        rollback(database, "facts", generation=1)


def test_rollback_to_a_deleted_version_is_gone(database: Database) -> None:
    first, second = (add_version(database, c * 64).id for c in "ab")
    point(database, "facts", first)
    point(database, "facts", second)
    with database.write() as connection:
        with pytest.raises(Conflict, match="facts"):
            delete_version(connection, TENANT, second, actor="ada")
        delete_version(connection, TENANT, first, actor="ada")
    with pytest.raises(Gone):
        rollback(database, "facts")


def test_of_racers_on_one_generation_one_wins(database: Database) -> None:
    versions = [add_version(database, f"{i}" * 64).id for i in range(8)]
    point(database, "facts", versions[0])
    outcomes: list[str] = []

    def race(version: str) -> None:
        try:
            with database.write() as connection:
                endpoints.move_endpoint(
                    connection,
                    TENANT,
                    "facts",
                    (Target(version),),
                    generation=1,
                    kind="set",
                    actor="test",
                )
            outcomes.append(version)
        except PreconditionFailed:
            outcomes.append("")

    threads = [threading.Thread(target=race, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if outcome]
    assert len(outcomes) == 8
    assert len(winners) == 1
    with database.read() as connection:
        endpoint = endpoints.get_endpoint(connection, TENANT, "facts")
    assert (endpoint.head, endpoint.generation) == (winners[0], 2)


def test_a_stale_generation_is_told_before_what_else_is_wrong(database: Database) -> None:
    first, second = (add_version(database, c * 64).id for c in "ab")
    for version in (first, second):
        point(database, "facts", version)
    nowhere = (Target("ver_" + "0" * 40),)
    with database.write() as connection:
        with pytest.raises(PreconditionFailed, match="at generation 2, not 1"):
            endpoints.move_endpoint(
                connection, TENANT, "facts", nowhere, generation=1, kind="set", actor="test"
            )
        with pytest.raises(PreconditionFailed, match="exists already"):
            endpoints.create_endpoint(connection, TENANT, "facts", nowhere, actor="test")
        with pytest.raises(NotFound, match="ver_0"):
            endpoints.move_endpoint(
                connection, TENANT, "facts", nowhere, generation=2, kind="set", actor="test"
            )


NUMBERS = itertools.count()


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each has an endpoint of its own
)
@given(st.lists(st.one_of(st.integers(0, 3), st.just("back")), max_size=12))
def test_history_replays_to_the_pointer(database: Database, actions: list[int | str]) -> None:
    ids = [add_version(database, f"{i}" * 64).id for i in range(4)]
    name = f"facts-{next(NUMBERS)}"
    point(database, name, ids[0])
    undo = [ids[0]]  # the model: what is left after undoing
    for action in actions:
        if action == "back":
            if len(undo) == 1:
                with pytest.raises(Conflict):
                    rollback(database, name)
                continue
            undo.pop()
            assert rollback(database, name) == undo[-1]
        else:
            undo.append(ids[int(action)])
            point(database, name, undo[-1])
    with database.read() as connection:
        made = moves.history(connection, TENANT, name, limit=100).items[::-1]
        endpoint = endpoints.get_endpoint(connection, TENANT, name)
    state = None
    for number, move in enumerate(made, start=1):
        assert (move.generation, move.before) == (number, state)
        state = move.after
    assert state == endpoint.state == (Target(undo[-1]),)
    assert endpoint.generation == len(made)
