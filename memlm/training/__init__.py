"""Training: one loop for every method.

    from memlm.training.loop import train

    model = train(module, examples, order, config, out,
                  collate=collate, identity=identity, held_out=held_out, resume=True)

A method brings four things; order of examples, accumulation, precision, schedules, checkpoints,
exact resuming, several processes and trackers are the loop's.

    module     an ``nn.Module`` whose submodule ``model`` is the `PreTrainedModel` that is trained;
               ``module(batch, step=, micro=)`` gives (loss_sum, count, figures), as
               `memlm.training.objectives` says. A model whose forward returns ``.loss`` when it
               gets ``labels`` needs none of its own: `memlm.training.model_loss.ModelLoss(model)`
    examples   anything with ``examples[number]``, a dict of tensors; numbers are what ``order``
               asks for
    order      ``order.items(batch, process)``: the numbers of the examples of micro-batch ``batch``
               (counted from the first step of the run) on process ``process``; a function of its
               arguments alone, which is what makes resuming exact. `memlm.training.order` has
               `InTurn`, and `Dealt` for the orders of `memlm.data.streams`: shuffled, streams
               (trime_long), grouped (trime_ext)
    collate    list of examples -> dict of tensors, with ``labels`` or ``shift_labels`` (-100 where
               nothing is predicted), by which targets are counted
    config     a `memlm.training.config.RunConfig`; a method derives its own frozen dataclass from
               it to add fields
    identity   plain JSON values of all else that a resumed run must share (hashes of the data)
"""
