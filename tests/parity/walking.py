"""Walking an automaton memory through recorded queries, keeping what it did at every step."""

import numpy as np
import torch

from memlm.core.types import Candidates, TargetPartial
from memlm.ops.tokens import target_partial


class Walk:
    """What memlm did at every step, in walking order."""

    def __init__(self, memory, queries, labels, reset_at):
        steps = len(labels)
        begins, ends = torch.tensor(reset_at), torch.tensor([*reset_at[1:], steps])
        at = begins[:, None] + torch.arange(int((ends - begins).max()))
        real = at < ends[:, None]
        self.pointers, self.extended, self.knns, self.scores = ([None] * steps for _ in range(4))
        self.searched, self.candidates = np.zeros(steps, bool), [None] * steps
        lse, target_lse = torch.zeros(steps), torch.zeros(steps)
        state = memory.init_state(len(begins))
        for place, awake in zip(at.T, real.T, strict=True):
            place = place.clamp(max=steps - 1)
            # the token that came is the one that the step before was to predict
            came = labels[(place - 1).clamp(min=0)].unsqueeze(1)
            mask = {} if bool(awake.all()) else {"valid": awake.unsqueeze(1)}
            state = memory.observe(came, queries[place].unsqueeze(1), state, **mask)
            pointers, searches = state.pointers, state.counters.searches
            candidates, state = memory.read(queries[place], state)
            partial = target_partial(candidates, labels[place])
            searched = state.counters.searches > searches
            found = memory.k if bool(searched.any()) else 0  # columns of found entries come first
            for row in awake.nonzero().squeeze(-1).tolist():
                step, entries = int(place[row]), state.entries[row]
                self.pointers[step] = present(pointers[row])
                self.extended[step] = present(entries[found:])
                self.knns[step] = present(entries)
                self.scores[step] = state.scores[row][entries >= 0].numpy()
                self.searched[step] = bool(searched[row])
                self.candidates[step] = Candidates(*(part[row : row + 1] for part in candidates))
                lse[step], target_lse[step] = partial.lse[row], partial.target_lse[row]
        self.partial = TargetPartial(lse, target_lse)
        self.stats = memory.stats(state)


def present(entries):
    return entries[entries >= 0].numpy()


def ragged(arrays, name):
    return np.split(arrays[name], arrays[f"{name}_off"][1:-1])
