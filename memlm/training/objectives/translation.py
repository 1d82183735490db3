"""TRIME's training memory for translation: the target sides of the other sentences of a batch.

    s_pq = sim(h_p, h_q) / (sqrt(dim) temperature)      sim: dot product, or minus squared distance

for all positions q of other sentences, past and future; of these the k best per query are kept, as
a search of the datastore will keep them (Zhong et al. 2022, section 4.4 and appendix). The key h is
what enters the output projection. The partial goes under one softmax with the head
(`memlm.training.loss.head_memory_loss`).

At test time the datastore joins in the same way: its lam = Z_memory / (Z_memory + Z_model) is the
merge `Union` at temperature ``sqrt(dim) * t``. Differs from the paper's code there: the released
decoder forgets to multiply the memory's distribution by lam.
"""

import torch
from torch import Tensor

from memlm.core.types import TargetPartial
from memlm.data.batches import IGNORED
from memlm.index.metrics import check_choice
from memlm.ops.logsumexp import safe_logsumexp
from memlm.training.objectives.gather import gather_entries
from memlm.training.objectives.memory import Positions, numbered

_SCORES = 1 << 22  # held at once: 16 MiB in float32


def translation_memory(
    batch: Positions,
    *,
    metric: str = "ip",
    temperature: float = 10.0,
    k: int | None = 8,
    detach_remote: bool = False,
) -> TargetPartial:
    """What the other sentences say about the targets of each.

    Args:
        batch: one sentence per row; padding has target -100.
        metric: "ip" or "l2".
        temperature: divides the scores beside ``sqrt(dim)``.
        k: positions kept per query; None: all.
        detach_remote: keys of other processes are constants.

    Returns:
        ``(rows, time)``; gradients flow into queries and kept keys.

    Raises:
        InputError: for another metric.
    """
    check_choice("metric", metric, ("ip", "l2"))
    rows, time = batch.targets.shape
    query, targets = batch.keys.flatten(0, 1), batch.targets.flatten()
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    sentence = numbered(rows, targets).repeat_interleave(time)
    parts = gather_entries(query, torch.stack([sentence, targets], 1), detach_remote=detach_remote)
    keys, fields = (torch.cat(part) for part in zip(*parts, strict=True))
    real = (fields[:, 0] >= 0) & (fields[:, 1] != IGNORED)
    keys, (other, tokens) = keys[real], fields[real].unbind(1)
    scale = batch.scale / temperature
    lse, target_lse = [], []
    most = max(1, _SCORES // max(1, len(keys)))
    for start in range(0, len(query), most):
        here = slice(start, start + most)
        scores = _similarity(query[here], keys, metric) * scale
        scores = scores.masked_fill(sentence[here, None] == other, -torch.inf)
        on_target = targets[here, None] == tokens
        if k is not None and k < len(keys):
            scores, kept = scores.topk(k, dim=-1)
            on_target = on_target.gather(-1, kept)
        lse.append(safe_logsumexp(scores))
        target_lse.append(safe_logsumexp(scores.masked_fill(~on_target, -torch.inf)))
    return TargetPartial(torch.cat(lse).view(rows, time), torch.cat(target_lse).view(rows, time))


def _similarity(query: Tensor, keys: Tensor, metric: str) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):  # scores stay float32, as in `ops.bank`
        product = query @ keys.T
    if metric == "ip":
        return product
    return 2 * product - query.square().sum(-1, keepdim=True) - keys.square().sum(-1)
