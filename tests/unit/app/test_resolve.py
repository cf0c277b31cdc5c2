"""A split gives every user one version, in shares, and a growing share moves each user once."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from app.inference.resolve import choose
from registry.endpoints import Endpoint
from registry.moves import Target

USERS = [f"user-{n}" for n in range(4000)]


def split(share: float) -> Endpoint:
    state = (Target("stable", 1 - share), Target("canary", share))
    return Endpoint("default", "facts", 1, state, 0.0)


def test_shares_are_kept() -> None:
    counts = Counter(choose(split(0.25), user) for user in USERS)
    assert abs(counts["canary"] / len(USERS) - 0.25) < 0.03


def test_a_growing_share_moves_each_user_once() -> None:
    served = dict.fromkeys(USERS, "stable")
    for share in (0.01, 0.1, 0.3, 0.7, 0.99):
        for user, before in served.items():
            after = choose(split(share), user)
            assert (before, after) != ("canary", "stable")
            served[user] = after
    assert Counter(served.values())["canary"] > 0.95 * len(USERS)


SHARES = st.lists(st.floats(0.001, 0.999), min_size=1, max_size=6).map(sorted)


@given(user=st.text(), shares=SHARES, scale=st.sampled_from([1e-3, 1.0, 100.0]))
def test_nobody_moves_twice_on_the_way_to_the_whole(
    user: str, shares: list[float], scale: float
) -> None:
    """Whatever the weights add up to, and with the first and last states not split at all."""
    states = [(Target("stable"),)]
    states += [(Target("stable", (1 - s) * scale), Target("canary", s * scale)) for s in shares]
    states += [(Target("canary"),)]
    served = [choose(Endpoint("default", "facts", 1, state, 0.0), user) for state in states]
    assert served == sorted(served, reverse=True), "stable at first, canary at last"


def test_one_version_serves_everybody() -> None:
    endpoint = Endpoint("default", "facts", 1, (Target("only"),), 0.0)
    assert {choose(endpoint, user) for user in USERS[:50]} == {"only"}
