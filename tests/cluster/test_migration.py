"""A decoding sequence moves to another engine: exact tokens, nothing lost or doubled, nothing held, in every order."""

from __future__ import annotations

import asyncio

import pytest

from kvbaton.cluster.client.migration import MigrationRefused
from kvbaton.decode_worker.migration import MigrationState
from kvbaton.router.engine_info import EngineState, Role
from support.toy_service import ToyService, ToyStream

pytestmark = pytest.mark.usefixtures("_each_way")

PROMPT = tuple(range(1, 30))


async def service(*names: str, num_blocks: int = 40) -> ToyService:
    made = ToyService(num_blocks)
    for name in names or ("p0", "d0", "d1"):
        made.start(name, Role.PREFILL if name.startswith("p") else Role.DECODE)
    return made


async def decoding(s: ToyService, name: str = "a", max_tokens: int = 40, n: int = 1, at: int = 5) -> ToyStream:
    """A stream of which every sample has `at` tokens."""
    stream = await s.submit(name, PROMPT, max_tokens, n)
    await s.until(lambda: all(len(tokens) >= at and s.where(name, i) for i, tokens in stream.tokens.items()))
    return stream


def other(s: ToyService, name: str = "a", sample: int = 0) -> str:
    return next(n for n in s.nodes if n.startswith("d") and n != s.where(name, sample))


def migration_state(s: ToyService, engine: str, name: str = "a", sample: int = 0) -> MigrationState | None:
    worker = s.nodes[engine].worker
    live = [leg.live[sample] for leg in worker.ledger.legs if sample in leg.live]
    return worker.decode.migrations.state(live[0]) if live else None


async def begin(s: ToyService, to: str, name: str = "a", sample: int = 0) -> asyncio.Task[str | None]:
    task = asyncio.ensure_future(s.client.migrate(name, sample, to))
    await s.breathe()
    return task


async def test_sequence_moves_and_its_tokens_stay() -> None:
    s = await service()
    stream = await decoding(s)
    source, target = s.where("a"), other(s)
    task = await begin(s, target)
    await s.until(task.done)
    assert task.result() is None
    assert s.where("a") == target
    assert not s.nodes[str(source)].worker.num_requests, "the source has nothing left of it"
    await s.settle()
    s.assert_clean()
    assert stream.done
    assert (s.client.counters.migrated, s.client.counters.resumed) == (1, 0)


async def test_it_moves_there_and_back_and_on() -> None:
    """Guards ids and epochs of repeated moves, and blocks that the target still has in its cache."""
    s = await service("p0", "d0", "d1", "d2")
    await decoding(s, max_tokens=60)
    sent = []
    for _ in range(3):
        source = s.nodes[str(s.where("a"))]
        before = source.agent.stats().bytes_sent
        task = await begin(s, other(s))
        await s.until(task.done)
        assert task.result() is None
        sent.append(source.agent.stats().bytes_sent - before)
    assert sent[1] < sent[0], "coming back, only what is new travels"
    await s.settle()
    s.assert_clean()


async def test_one_of_several_samples_moves() -> None:
    """Guards shared prompt blocks: the siblings stay and keep them."""
    s = await service()
    await decoding(s, n=3)
    source = s.where("a")
    task = await begin(s, other(s), sample=1)
    await s.until(task.done)
    assert task.result() is None
    assert [s.where("a", i) == source for i in range(3)] == [True, False, True]
    await s.settle()
    s.assert_clean()


async def test_only_what_changed_travels_while_it_stands_still() -> None:
    """Guards the pause: between the source's last step with the sequence and the target's first there is one poll of
    each agent and no step of the source in between."""
    s = await service()
    await decoding(s)
    source, target = str(s.where("a")), other(s)
    task = await begin(s, target)
    await s.until(lambda: migration_state(s, source) is MigrationState.PAUSED)
    assert s.nodes[source].worker.handing_off == 1
    s.nodes[source].poll()  # the last blocks and DONE leave
    s.nodes[target].poll()
    for _ in range(2 if s.engine.pipelined else 1):  # launched by the first, landed by the second
        s.step(target)
    await s.deliver(target)
    assert task.done(), "the target has spoken; the migration is over for the client"
    await s.settle()
    s.assert_clean()


async def test_targets_tokens_may_overtake_the_sources() -> None:
    """Guards a gap: the source's last tokens are still on their way when the target's arrive."""
    s = await service()
    stream = await decoding(s)
    source, target = str(s.where("a")), other(s)
    task = await begin(s, target)
    for _ in range(30):
        for name in s.nodes:
            s.nodes[name].poll()
            s.step(name)
            if name != source:
                await s.deliver(name)
    assert not task.done()
    had = len(stream.tokens[0])
    await s.deliver(source)
    assert task.result() is None
    assert len(stream.tokens[0]) > had + 5
    await s.settle()
    s.assert_clean()
    assert s.client.counters.resumed == 0


EVENTS = ("abort", "cancel", "source dies", "target dies", "source cut", "target cut", "wire cut")
STAGES = ("ordered", "copying", "approaching", "paused", "landed")


async def reach(s: ToyService, stage: str, source: str, target: str) -> None:
    if stage == "ordered":
        return
    if stage == "landed":
        await s.until(lambda: migration_state(s, source) is MigrationState.PAUSED)
        s.nodes[source].poll()
        s.nodes[target].poll()
        s.step(target)  # it is the target's, and nobody has heard yet
        return
    wanted = MigrationState(stage)
    for _ in range(100):
        for name in (source, target):
            if migration_state(s, source) is wanted:
                return
            s.nodes[name].poll()
            s.step(name)
            await s.deliver(name)
    raise AssertionError(f"never {stage}")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("event", EVENTS)
async def test_anything_may_happen_in_every_state(stage: str, event: str) -> None:
    s = await service("p0", "d0", "d1", "d2")
    stream = await decoding(s)
    bystander = await decoding(s, "b")
    source, target = str(s.where("a")), other(s)
    task = await begin(s, target)
    await reach(s, stage, source, target)
    if event == "abort":
        stream.cancel()
    elif event == "cancel":
        assert s.client.cancel("a")
        stream.cancelled = True
    elif event.endswith("dies"):
        s.kill(source if event.startswith("source") else target)
    elif event == "wire cut":
        s.nodes[source].cut(0)
    else:
        s.reconnect(source if event.startswith("source") else target)
    await s.breathe()
    s.audit()
    await s.settle()
    s.assert_clean()
    assert task.done()
    assert bystander.done
    assert stream.cancelled or stream.done


async def test_target_without_room_refuses_and_the_source_goes_on() -> None:
    s = await service("p0", "d0", "d1", num_blocks=24)
    stream = await decoding(s)
    source, target = s.where("a"), other(s)
    blocks = s.nodes[target].engine.kv.allocate(20)
    task = await begin(s, target)
    await s.until(task.done)
    assert "no room" in task.result()
    assert s.where("a") == source
    s.nodes[target].engine.kv.release(blocks)
    await s.settle()
    s.assert_clean()
    assert stream.done
    assert s.client.counters.resumed == 0


async def test_silent_target_does_not_hold_a_paused_sequence() -> None:
    """Guards a target that freezes after its grant: the source goes on by itself."""
    s = await service()
    stream = await decoding(s)
    source, target = str(s.where("a")), other(s)
    task = await begin(s, target)
    await s.until(lambda: migration_state(s, source) is MigrationState.PAUSED)
    s.clock.now += 3
    for _ in range(3):
        s.step(source)
        await s.deliver(source)
    assert "paused" in task.result()
    had = len(stream.tokens[0])
    s.step(source)
    await s.deliver(source)
    assert len(stream.tokens[0]) == had + 1
    await s.settle()
    s.assert_clean()


async def test_what_cannot_move_is_refused() -> None:
    s = await service()
    await s.submit("a", PROMPT, 30)
    with pytest.raises(MigrationRefused, match="prompt"):
        await s.client.migrate("a", 0, "d1")
    with pytest.raises(MigrationRefused, match="no such request"):
        await s.client.migrate("zz", 0, "d1")
    with pytest.raises(MigrationRefused, match="no engine"):
        await s.client.migrate("a", 0, "nowhere")
    await s.until(lambda: s.where("a"))
    with pytest.raises(MigrationRefused, match="already"):
        await s.client.migrate("a", 0, str(s.where("a")))
    await s.settle()
    s.assert_clean()


async def test_drain_empties_an_engine_while_its_streams_go_on() -> None:
    s = await service("p0", "d0", "d1")
    streams = [await decoding(s, f"r{i}", max_tokens=60, n=1 + i % 2, at=1) for i in range(4)]
    queued = await s.submit("late", PROMPT, 30)
    source = str(s.where("r0"))
    s.set_state(source, EngineState.DRAINING)
    await s.until(s.nodes[source].worker.empty, rounds=60)
    assert not all(stream.over for stream in streams), "it did not simply wait for their end"
    assert s.router.place(streams[0].request, admit=False) is not None
    await s.settle()
    s.assert_clean()
    assert queued.done
    assert s.client.counters.migrated > 0
    assert s.client.counters.resumed == 0
