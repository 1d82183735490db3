"""Schedules and optimiser of TRIME's recipes against fairseq's recorded ones."""

import json

import pytest
import torch
from safetensors.torch import load_file

from memlm.training.nag import Nag
from memlm.training.rates import CosineRate, InverseSqrtRate


def rate_of(scheduler, args):
    """Our schedule for fairseq's options, where ``lr`` is the lowest rate under cosine."""
    start, warmup = args["warmup_init_lr"], args["warmup_updates"]
    if scheduler == "inverse_sqrt":
        return InverseSqrtRate(peak=args["lr"][0], warmup=warmup, start=max(start, 0.0))
    low, period = args["lr"][0], args["lr_period_updates"]
    return CosineRate(
        peak=args["max_lr"],
        low=low,
        warmup=warmup,
        start=low if start < 0 else start,
        period=period if period > 0 else args["max_update"] - warmup,
        growth=args["t_mult"],
        shrink=args["lr_shrink"],
    )


def test_rates(golden_trime_lr_and_nag):
    cases = json.loads((golden_trime_lr_and_nag / "lr.json").read_text())
    assert {case["scheduler"] for case in cases} <= {"cosine", "inverse_sqrt"}
    for case in cases:
        rate = rate_of(case["scheduler"], case["args"])
        for step, expected in case["lr"]:
            assert rate(step) == pytest.approx(expected, rel=1e-12)


def test_nag(golden_trime_lr_and_nag):
    settings = json.loads((golden_trime_lr_and_nag / "nag.json").read_text())
    recorded = load_file(golden_trime_lr_and_nag / "nag.safetensors")
    parameter = torch.nn.Parameter(recorded["p0"])
    optimizer = Nag(
        [parameter],
        lr=settings["lrs"][0],
        momentum=settings["momentum"],
        decay=settings["weight_decay"],
    )
    for step, rate in enumerate(settings["lrs"]):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = recorded[f"g{step}"]
        optimizer.step()
        torch.testing.assert_close(parameter.data, recorded[f"p{step + 1}"], rtol=0, atol=1e-6)
