"""A store in memory: what an index and a memory need of one, and no more."""

import torch

from memlm.core.files import fingerprint


class MemoryStore:
    """Keys and values held in tensors; yields blocks of uneven size, as shards do."""

    def __init__(self, keys, values=None, metric="l2", shard=None):
        self.keys = keys
        self.dim = keys.shape[1]
        self.dtype = keys.dtype
        self.metric = metric
        self.values = torch.zeros(len(keys), dtype=torch.int32) if values is None else values
        self.shard = shard or max(1, len(keys))
        self.reads = 0

    @property
    def fingerprint(self):
        return fingerprint([self.keys.double().tolist(), self.values.tolist(), self.metric])

    def __len__(self):
        return len(self.keys)

    def blocks(self, rows):
        self.reads += 1
        for shard in range(0, len(self.keys), self.shard):
            end = min(shard + self.shard, len(self.keys))
            for start in range(shard, end, rows):
                yield start, self.keys[start : min(start + rows, end)]

    def gather(self, ids):
        return self.keys[ids]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
