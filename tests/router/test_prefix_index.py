"""Guards what an ingress believes to be cached where: matches are leading runs, per engine, and expire in time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.engine.block_hash import block_hashes
from kvbaton.router.prefix_index import PrefixIndex

HASHES = block_hashes(list(range(80)), 16)  # five blocks


def test_match_is_the_leading_run_that_the_engine_holds() -> None:
    index = PrefixIndex()
    index.stored("a", HASHES[:3])
    index.stored("b", HASHES[1:])
    index.stored("c", HASHES)
    assert [index.match(engine, HASHES, 0.0) for engine in ("a", "b", "c", "unknown")] == [3, 0, 5, 0]
    assert index.match("c", [], 0.0) == 0


def test_eviction_shortens_the_match_of_that_engine_only() -> None:
    index = PrefixIndex()
    index.stored("a", HASHES)
    index.stored("b", HASHES)
    index.evicted("a", [HASHES[3], b"never stored"])
    assert (index.match("a", HASHES, 0.0), index.match("b", HASHES, 0.0)) == (3, 5)
    index.stored("a", [HASHES[3]])
    assert index.match("a", HASHES, 0.0) == 5


def test_hashes_that_nobody_holds_take_no_memory() -> None:
    index = PrefixIndex()
    index.stored("a", HASHES)
    index.stored("b", HASHES[:1])
    index.evicted("a", HASHES)
    assert index.num_hashes == 1
    index.remove("b")
    assert index.num_hashes == 0


def test_own_placements_count_at_once_and_for_a_while() -> None:
    index = PrefixIndex(recent_s=10.0)
    index.placed("a", HASHES, 100.0)
    assert index.match("a", HASHES, 100.0) == 5
    assert index.match("b", HASHES, 100.0) == 0
    index.placed("a", HASHES[:2], 105.0)
    assert index.match("a", HASHES, 109.999) == 5
    assert index.match("a", HASHES, 110.0) == 2
    assert index.match("a", HASHES, 115.0) == 0


def test_placement_and_events_join_into_one_run() -> None:
    index = PrefixIndex()
    index.stored("a", HASHES[:2])
    index.placed("a", HASHES[2:4], 0.0)
    assert index.match("a", HASHES, 0.0) == 4


def test_recent_placements_are_bounded() -> None:
    index = PrefixIndex(recent_s=1e9, max_recent_blocks=10)
    for number in range(100):
        index.placed("a", block_hashes([number] * 80, 16), 0.0)
    assert index.match("a", block_hashes([0] * 80, 16), 0.0) == 0
    assert index.match("a", block_hashes([99] * 80, 16), 0.0) == 5
    assert sum(index.match("a", block_hashes([number] * 80, 16), 0.0) for number in range(100)) <= 10


def test_removed_engine_is_forgotten_and_its_bit_reused_cleanly() -> None:
    """A new engine that inherits the bit of a dead one must not inherit its blocks."""
    index = PrefixIndex()
    index.stored("a", HASHES)
    index.stored("b", HASHES[:1])
    index.placed("a", HASHES, 0.0)
    index.remove("a")
    index.remove("a")
    index.stored("c", HASHES[:2])
    assert [index.match(engine, HASHES, 0.0) for engine in "abc"] == [0, 1, 2]


def test_reset_replaces_what_was_known_by_a_snapshot() -> None:
    index = PrefixIndex()
    index.stored("a", HASHES)
    index.stored("b", HASHES)
    index.reset("a", HASHES[:1])
    assert (index.match("a", HASHES, 0.0), index.match("b", HASHES, 0.0)) == (1, 5)


operations = st.lists(
    st.tuples(
        st.sampled_from(["stored", "evicted", "reset", "remove"]),
        st.sampled_from("abcd"),
        st.lists(st.integers(0, 9), max_size=6),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(operations)
def test_index_agrees_with_plain_sets(steps: list[tuple[str, str, list[int]]]) -> None:
    index, model = PrefixIndex(), {engine: set[bytes]() for engine in "abcd"}
    chain = block_hashes(list(range(160)), 16)
    for name, engine, numbers in steps:
        hashes = [chain[number] for number in numbers]
        if name == "remove":
            index.remove(engine)
            model[engine] = set()
        else:
            getattr(index, name)(engine, hashes)
            held = model[engine]
            model[engine] = {"stored": held | set(hashes), "evicted": held - set(hashes), "reset": set(hashes)}[name]
    for engine, held in model.items():
        run = next((i for i, block_hash in enumerate(chain) if block_hash not in held), len(chain))
        assert index.match(engine, chain, 0.0) == run
    assert index.num_hashes == len(set[bytes]().union(*model.values()))
