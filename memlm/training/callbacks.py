"""What watches a training: a stop when the loss breaks, models kept on the way, a progress bar."""

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from memlm.core.errors import InputError
from memlm.core.files import read_json, write_json
from memlm.core.progress import bar
from memlm.training.schedule import Schedule

_BEST = "evaluation.json"


class Sanity(TrainerCallback):
    """Stops a training whose loss is no number any more."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Look at the loss of the curve."""
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise InputError(
                f"the loss must stay a number but is {loss} at step {state.global_step}; lower "
                "learning_rate or give more warmup_steps"
            )


class Keep(TrainerCallback):
    """Keeps the models of listed steps and the one with the lowest held-out loss.

    A checkpoint ends a stretch of the curve, so that the point after it is the same whether the
    run went on or was resumed there.

    Args:
        loop: has ``config`` and ``save_to``.
    """

    def __init__(self, loop: Any):
        self.loop = loop

    def on_step_end(self, args, state, control, **kwargs):
        """Keep the model of a listed step."""
        if control.should_save:
            control.should_log = True
        if state.global_step in self.loop.config.keep_steps:
            self.loop.save_to(_beside(args) / f"step-{state.global_step}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Keep the best model so far."""
        if not self.loop.config.keep_best or metrics is None:
            return
        folder = _beside(args) / "best"
        record = folder / _BEST
        if record.exists() and read_json(record)["loss"] <= metrics["eval_loss"]:
            return
        record.unlink(missing_ok=True)  # a kill from here on leaves no record, so it is done again
        self.loop.save_to(folder)
        if args.should_save:
            write_json(record, {"step": state.global_step, "loss": metrics["eval_loss"]})


def _beside(args: Any) -> Path:
    return Path(args.output_dir).parent


class ProgressBar(TrainerCallback):
    """Tokens per second, time left and the latest loss.

    Args:
        schedule: knows the last step, when it is fixed.
        step_tokens: of all processes.
        quiet: never show it.
    """

    def __init__(self, schedule: Schedule, step_tokens: int, *, quiet: bool):
        self.schedule = schedule
        self.step_tokens = step_tokens
        self.quiet = quiet

    def on_train_begin(self, args, state, control, **kwargs):
        """Show it."""
        self.shown = bar(
            self._total(),
            label="train",
            unit="token",
            initial=state.global_step * self.step_tokens,
            quiet=self.quiet or not state.is_world_process_zero,
        )

    def on_step_end(self, args, state, control, **kwargs):
        """Go on."""
        self.shown.total = self._total()
        self.shown.update(self.step_tokens)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the loss."""
        if logs and "loss" in logs:
            self.shown.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        """Take it away."""
        self.shown.close()

    def _total(self) -> int | None:
        return None if self.schedule.steps is None else self.schedule.steps * self.step_tokens
