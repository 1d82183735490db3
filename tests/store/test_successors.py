import torch

from memlm.store.successors import next_entries


def test_successors():
    documents = torch.tensor([0, 0, 0, 1, 1, 2])
    positions = torch.tensor([1, 2, 4, 1, 2, 3])
    assert next_entries(6).tolist() == [1, 2, 3, 4, 5, -1]
    assert next_entries(6, documents).tolist() == [1, 2, -1, 4, -1, -1]
    assert next_entries(6, documents, positions).tolist() == [1, -1, -1, 4, -1, -1]
    assert next_entries(1, documents[:1], positions[:1]).tolist() == [-1]
