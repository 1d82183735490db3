"""A long-term memory holds finished windows; together with others it makes one memory."""

import pytest
import torch
from index.stores import normal
from safetensors.torch import save_file
from torch.testing import assert_close

from memlm.core.errors import FingerprintError, InputError
from memlm.core.types import Candidates, TargetPartial, TokenMemory
from memlm.memory.knn import KnnMemory
from memlm.memory.local import LocalMemory
from memlm.memory.long import LongMemory
from memlm.memory.saved_state import load_state, save_state
from memlm.memory.together import Together
from memlm.ops.merge import union
from memlm.store.arrays import save_arrays

TOKENS = torch.randint(0, 9, (2, 12), generator=torch.Generator().manual_seed(1))
KEYS = normal(2, 12, 4, seed=2)
LOCAL, LONG = LocalMemory(size=100, temperature=2.0), LongMemory(size=100, temperature=2.0)


def read(memory, spans, state=None):
    """The state after some windows; the last one is not finished."""
    state = memory.init_state(2) if state is None else state
    for number, (begin, end) in enumerate(spans):
        state = memory.finish(state) if number else state
        state = memory.observe(TOKENS[:, begin:end], KEYS[:, begin:end], state)
    return state


def pairs(candidates):
    return [
        [(int(token), round(float(score), 4)) for score, token, _, valid in row if valid]
        for row in (
            zip(*[part[number] for part in candidates], strict=True)
            for number in range(len(candidates.scores))
        )
    ]


def expected(row, places, query):
    return [
        (int(TOKENS[row, i + 1]), round(float(KEYS[row, i] @ query[row]) / 2, 4)) for i in places
    ]


@pytest.mark.parametrize("memory", [LONG, Together(LOCAL, LONG)])
def test_they_are_token_memories(memory):
    assert isinstance(memory, TokenMemory)


def test_windows_are_candidates_once_they_are_finished():
    query = KEYS[:, 11]
    state = read(LONG, [(0, 5)])
    assert not LONG.read(query, state)[0].valid.any()
    assert LONG.stats(state)["off"]
    state = read(LONG, [(0, 5), (4, 9)])
    for row, found in enumerate(pairs(LONG.read(query, state)[0])):
        assert found == expected(row, range(4), query)
    state = LONG.finish(state)
    for row, found in enumerate(pairs(LONG.read(query, state)[0])):
        assert found == expected(row, range(8), query)
    assert LONG.stats(state)["entries"] == 8
    assert LONG.finish(state) is state


def test_only_the_last_pairs_are_kept():
    memory = LongMemory(size=3, temperature=2.0)
    state = memory.finish(read(memory, [(0, 5), (4, 9)]))
    for row, found in enumerate(pairs(memory.read(KEYS[:, 11], state)[0])):
        assert found == expected(row, (5, 6, 7), KEYS[:, 11])
    nothing = LongMemory(size=0)
    assert not nothing.read(KEYS[:, 0], read(nothing, [(0, 5), (4, 9)]))[0].valid.any()


def test_padding_is_not_remembered():
    valid = torch.ones_like(TOKENS, dtype=torch.bool)
    valid[0, :3] = False  # on the left of row 0
    state = LONG.observe(TOKENS, KEYS, LONG.init_state(2), valid)
    found = pairs(LONG.read(KEYS[:, 0], LONG.finish(state))[0])
    assert found[0] == expected(0, range(3, 11), KEYS[:, 0])
    assert found[1] == expected(1, range(11), KEYS[:, 0])


def test_rows_are_selected_and_the_present_window_is_cropped():
    state = LONG.crop(read(LONG, [(0, 5), (4, 9)]), 2)
    index = torch.tensor([1, 1, 0])
    chosen = LONG.finish(LONG.select_rows(state, index))
    query = KEYS[index, 11]
    found = pairs(LONG.read(query, chosen)[0])
    for row, source in enumerate(index.tolist()):
        assert found[row] == expected(source, (0, 1, 2, 3, 4), KEYS[:, 11])


def test_local_and_long_together_are_one_long_local_memory():
    """Windows that overlap by the one token between them: nothing is lost, nothing twice."""
    both = Together(LOCAL, LONG)
    state = read(both, [(0, 5), (4, 9), (8, 12)])
    whole = LOCAL.observe(TOKENS, KEYS, LOCAL.init_state(2))
    targets = TOKENS[:, 3]
    ours, _ = both.score(KEYS[:, 11], targets, state)
    theirs, _ = LOCAL.score(KEYS[:, 11], targets, whole)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


@pytest.fixture
def knn(tmp_path):
    store = save_arrays(
        tmp_path / "store", normal(30, 4, seed=3), torch.arange(30) % 9, metric="ip"
    )
    return KnnMemory(store, k=4, temperature=2.0, index="exact")


def test_together_is_the_union_of_its_members(knn):
    members = (LOCAL, LONG, knn)
    both, targets, query = Together(*members), TOKENS[:, 5], KEYS[:, 11]
    state = read(both, [(0, 5), (4, 12)])
    found, _ = both.score(query, targets, state)
    apart = [
        member.score(query, targets, own)[0] for member, own in zip(members, state, strict=True)
    ]
    for one, other in zip(found, union(*apart), strict=True):
        assert_close(one, other)
    candidates, _ = both.read(query, state)
    assert isinstance(candidates, Candidates)
    mass = candidates.scores.masked_fill(~candidates.valid, -torch.inf).logsumexp(-1)
    assert_close(mass, found.lse)
    assert both.store is knn.store
    assert both.stats(state)["entries"] == 7 + 4 + 30
    assert [member["memory"] for member in both.describe()["members"]] == ["local", "long", "knn"]


def test_without_state_there_is_none(knn):
    pair = Together(knn, knn)
    assert pair.init_state(3) is None
    query = normal(5, 4, seed=6)
    doubled, state = pair.score(query, torch.zeros(5, dtype=torch.int64), None)
    single, _ = knn.score(query, torch.zeros(5, dtype=torch.int64))
    assert state is None
    assert_close(doubled.lse, single.lse + torch.tensor(2.0).log())
    assert isinstance(doubled, TargetPartial)
    assert pair.observe(TOKENS, KEYS, None) is None
    assert pair.crop(None, 1) is pair.select_rows(None, torch.tensor([0])) is None


def test_a_state_of_nothing_goes_through_a_file(tmp_path):
    save_state(LONG, LONG.init_state(2), tmp_path / "state")
    restored = load_state(LONG, tmp_path / "state")
    assert restored.keys.shape == (2, 0, 0)
    assert restored.present.length == 0


def test_a_state_goes_through_a_file(tmp_path, knn):
    memory = Together(LOCAL, LONG, knn)
    state = read(memory, [(0, 5), (4, 9)])
    save_state(memory, state, tmp_path / "state")
    restored = load_state(memory, tmp_path / "state")
    query = KEYS[:, 11]
    for one, other in zip(
        memory.read(query, state)[0], memory.read(query, restored)[0], strict=True
    ):
        assert torch.equal(one, other)
    on, again = (read(memory, [(9, 12)], each) for each in (state, restored))
    for one, other in zip(memory.read(query, on)[0], memory.read(query, again)[0], strict=True):
        assert torch.equal(one, other)


def test_bad_input(tmp_path, knn):
    with pytest.raises(InputError, match="size must not be negative, got -1"):
        LongMemory(size=-1)
    with pytest.raises(InputError, match="overlap must be one of"):
        LongMemory(overlap="thrice")
    with pytest.raises(InputError, match="above 0, got 0"):
        LongMemory(temperature=0)
    with pytest.raises(InputError, match="at least one memory, got none"):
        Together()
    with pytest.raises(InputError, match="only a memory with state has something to save"):
        save_state(knn, None, tmp_path / "state")
    with pytest.raises(InputError, match="made of tensors, got a int"):
        save_state(LONG, (1, 2), tmp_path / "state")
    save_state(LONG, read(LONG, [(0, 5)]), tmp_path / "state")
    with pytest.raises(FingerprintError, match="make the memory with the settings"):
        load_state(LongMemory(size=5), tmp_path / "state")
    with pytest.raises(InputError, match="must be a file that save_state wrote, got"):
        load_state(LONG, tmp_path / "none")
    (tmp_path / "cut").write_bytes((tmp_path / "state").read_bytes()[:40])
    with pytest.raises(InputError, match="cannot be read"):
        load_state(LONG, tmp_path / "cut")
    save_file({"keys": KEYS}, tmp_path / "other")
    with pytest.raises(InputError, match="does not say of which memory"):
        load_state(LONG, tmp_path / "other")
    with pytest.raises(InputError, match=r"must be \(2, "):
        LONG.read(KEYS[:1, 0], LONG.finish(read(LONG, [(0, 5)])))
    with pytest.raises(InputError, match="make a new state for another batch"):
        LONG.observe(TOKENS[:1], KEYS[:1], read(LONG, [(0, 5)]))
    with pytest.raises(InputError, match="between 0 and"):
        LONG.crop(LONG.init_state(1), 1)
    assert LongMemory.from_dict(LONG.to_dict()) == LONG
