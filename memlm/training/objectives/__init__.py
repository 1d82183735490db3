"""Training objectives: what a causal language model is trained to lower, batch by batch.

    from memlm.training.objectives.config import Objective            # no torch: for command lines
    from memlm.training.objectives.module import ObjectiveModule

    module = ObjectiveModule(model, Objective(method="trime_long"))   # any causal LM, used as it is
    output = module(batch, step=step)                                 # ObjectiveOutput
    (output.loss_sum / count_of_the_whole_step).backward()

An objective is a rule (`config.Objective`, a frozen configuration) and the model it is bound to
(`module.ObjectiveModule`, an ``nn.Module`` whose only submodule is ``model``: what DDP wraps, so
that gradients are exchanged). ``batch`` is a dict of tensors, all ``(rows, time)`` int64:

    input_ids      tokens read
    shift_labels   the token that follows each; -100 where nothing is predicted (padding too)
    stream         which text a position belongs to, the same number on every process; trime_long
                   only; default: ``process // ranks_per_stream``
    position       the place in that text, increasing with time; trime_long only; default: rows in
                   order, processes of a stream in order
    document       keeps trime's local memory inside documents; default: one document per row

`ObjectiveOutput` has ``loss_sum`` (scalar, nats, summed over this process's targets, with
gradient), ``count`` (scalar int64, this process's targets) and ``figures`` (sums in nats without
gradient: ``"model"`` is the loss of the model alone, without memory). Nothing is divided: the
caller divides by the targets of the whole step, over micro-batches and processes. Gradients of
keys of other processes are summed over processes, so ``sum over processes of loss_sum`` is
differentiated exactly; DDP averages, hence multiply by the number of processes.

``step`` is the number of finished optimiser steps: it ends the warm-up with plain cross-entropy
and, with ``seed``, decides trime_ext's drop: one draw per call, alike on all processes (pass
``micro`` too when a step has several micro-batches). In evaluation mode (``module.eval()``) there
is no warm-up and no drop.

    ce           plain cross-entropy
    trime        memory: earlier positions of the same row
    trime_long   memory: earlier positions of the same stream, on any process
    trime_ext    memory: all positions of other rows, on any process, and earlier ones of the own

Sources: TRIME (Zhong et al. 2022), section 3.
"""
