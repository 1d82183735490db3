"""Growing rows are values: whoever holds an older one may go on from it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.memory.growing import Growing

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["append", "crop", "select"]), st.integers(0, 9), st.integers(1, 20)),
    max_size=14,
)


@given(ACTIONS)
@settings(deadline=None)
def test_they_are_what_copies_would_be(actions):
    """Any state may be continued, cropped or selected from, in any order."""
    draw = torch.Generator().manual_seed(1)
    first = torch.randn(2, 3, generator=draw)
    grown, copies = [Growing(first, first[..., None] + 1)], [first]
    for action, which, amount in actions:
        which %= len(grown)
        state, copy = grown[which], copies[which]
        if action == "append":
            new = torch.randn(2, amount, generator=draw)
            state, copy = state.append(new, new[..., None] + 1), torch.cat([copy, new], 1)
        elif action == "crop":
            length = min(amount, state.length)
            state, copy = state.crop(length), copy[:, :length]
        else:
            index = torch.tensor([amount % 2, 0])
            state, copy = state.select(index), copy[index]
        grown.append(state)
        copies.append(copy)
        for held, expected in zip(grown, copies, strict=True):
            assert torch.equal(held.columns[0], expected)
            assert torch.equal(held.columns[1], expected[..., None] + 1)


def test_reading_token_by_token_copies_a_few_times_only():
    state = Growing(torch.zeros(1, 1))
    buffers = set()
    for number in range(1000):
        state = state.append(torch.full((1, 1), float(number)))
        buffers.add(state.columns[0].data_ptr())
    assert len(buffers) < 10
    assert state.columns[0][0, 1:].tolist() == list(range(1000))


def test_what_grew_in_inference_mode_grows_outside_of_it():
    with torch.inference_mode():
        state = Growing(torch.zeros(1, 1)).append(torch.ones(1, 1))
    assert state.append(torch.ones(1, 2)).columns[0].tolist() == [[0.0, 1.0, 1.0, 1.0]]
