"""Ways to read a text longer than those of training, by the names they are compared under.

vanilla               the model as it is
window                the latest tokens alone
streaming-llm         and the first ones, at positions among the kept (Xiao et al. 2024)
lm-infinite           and the first ones, at a limited distance (Han et al. 2024)
lm-infinite-middle    and those of the middle that a query selects
"""

from contextlib import AbstractContextManager, nullcontext

from transformers import PreTrainedModel

from memlm.core.errors import InputError
from memlm.models.extend import extended
from memlm.ops.middle_rule import MiddleConfig

WAYS = ("vanilla", "window", "streaming-llm", "lm-infinite", "lm-infinite-middle")


def reading(
    model: PreTrainedModel,
    way: str,
    *,
    window: int,
    sinks: int,
    middle: MiddleConfig | None = None,
) -> AbstractContextManager[PreTrainedModel]:
    """The model made ready to read in one way, for a block of code.

    Args:
        model: causal, not extended; given back as it was.
        way: one of ``WAYS``.
        window: tokens seen at their true distance.
        sinks: first tokens that stay visible.
        middle: of lm-infinite-middle.

    Raises:
        InputError: for another way, or one that selects middle tokens without being told how many.
        UnsupportedModelError: if the model cannot be extended.
    """
    if way == "vanilla":
        return nullcontext(model)
    if way == "window":
        return extended(model, window=window, sinks=0)
    if way == "streaming-llm":
        return extended(model, window=window, sinks=sinks, clamp="streaming")
    if way == "lm-infinite":
        return extended(model, window=window, sinks=sinks)
    if way != "lm-infinite-middle":
        raise InputError(f"a way to read must be one of {', '.join(WAYS)}, got {way!r}")
    if middle is None:
        raise InputError(
            "lm-infinite-middle must be told how many middle tokens a query sees, but was not; "
            "give a MiddleConfig (--middle K)"
        )
    return extended(model, window=window, sinks=sinks, middle=middle)
