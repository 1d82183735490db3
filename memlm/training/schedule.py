"""Learning rate by step, and a time budget turned into a number of steps.

The rate rises linearly for ``warmup`` steps and decays to zero at the last step:

    rate(s) = peak * min( (s + 1) / warmup, decay(s / steps) )     decay(p) = 1 - p           linear
                                                                   (1 + cos(pi p)) / 2        cosine

A time budget needs ``steps`` before it is known how fast they are. So the first steps are timed
while the rate still rises and does not depend on ``steps``; then ``steps`` is fixed to what fits.
Running again with ``max_steps`` set to that number gives the same model, bit for bit. Only if the
machine's speed changes by more than a twentieth of the budget is the number corrected.
"""

import math
from time import perf_counter

from transformers import TrainerCallback

_UNTIMED = 3  # first steps: memory is allocated, kernels are compiled
_TIMED = 5  # fewest steps to measure the speed on, unless they take half the budget
_TIMED_SHARE = 0.1  # of the budget, when enough has been measured
_CHECKS = 20  # times that the speed is looked at again
_TOLERANCE = 0.05  # of the budget


class Schedule:
    """Learning rate as a fraction of its peak; what ``LambdaLR`` calls and checkpoints keep.

    Attributes:
        kind: ``"linear"``, ``"cosine"`` or ``"constant"``.
        warmup: steps of linear rise.
        steps: the last step, None while it is still being measured.
        elapsed: seconds of training so far, over all runs of a resumed training.
        plans: ``[step, steps]`` whenever ``steps`` was fixed or corrected.
        targets: tokens predicted so far.
        logged: the step of the last point of the loss curve.
    """

    def __init__(self, kind: str, warmup: int, steps: int | None):
        self.kind = kind
        self.warmup = warmup
        self.steps = steps
        self.elapsed = 0.0
        self.plans: list[list[int]] = []
        self.targets = 0
        self.logged = 0

    def __call__(self, step: int) -> float:
        """The rate of the step after ``step`` finished ones."""
        rise = (step + 1) / self.warmup if self.warmup else 1.0
        return min(1.0, rise, self._decay(step))

    def _decay(self, step: int) -> float:
        if self.steps is None or self.kind == "constant":
            return 1.0
        progress = min(1.0, step / self.steps)
        return 1 - progress if self.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2

    def fix(self, step: int, steps: int) -> None:
        """Decide, after ``step`` steps, that there are ``steps`` in all."""
        self.steps = max(steps, step)
        self.plans.append([step, self.steps])


class Clock(TrainerCallback):
    """Counts the seconds of training and, under a budget, fixes the number of steps."""

    def __init__(self, schedule: Schedule, max_seconds: float | None):
        self.schedule = schedule
        self.max_seconds = max_seconds
        self.began = 0.0
        self.mark = (0, 0.0)  # step and seconds from which the speed is measured
        self.check_at = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Start counting, from where an interrupted run stopped."""
        self.began = perf_counter() - self.schedule.elapsed
        self.mark = (state.global_step, self.schedule.elapsed)
        self._tell(state)

    def on_step_end(self, args, state, control, **kwargs):
        """Count, measure, plan."""
        schedule, step = self.schedule, state.global_step
        schedule.elapsed = perf_counter() - self.began
        if self.max_seconds is None:
            return
        if schedule.steps is None:
            if step == _UNTIMED:
                self.mark = (step, schedule.elapsed)
            spent = schedule.elapsed / self.max_seconds
            # Before half the warm-up no decay is below the rise: the rate has not depended on it.
            enough = step >= schedule.warmup // 2 or spent >= _TIMED_SHARE
            if (enough and step >= _UNTIMED + _TIMED) or spent >= 0.5:
                schedule.fix(step, self._fitting(step))
        elif step >= self.check_at:
            fitting = self._fitting(step)
            if abs(fitting - schedule.steps) > _TOLERANCE * schedule.steps:
                schedule.fix(step, fitting)
        if schedule.steps is not None and step >= self.check_at:
            self.mark = (step, schedule.elapsed)
            self.check_at = step + max(1, schedule.steps // _CHECKS)
        self._tell(state)
        if schedule.steps is not None and step >= schedule.steps:
            control.should_training_stop = True

    def _fitting(self, step: int) -> int:
        """The number of steps that ends at the budget, at the speed since the mark."""
        elapsed = self.schedule.elapsed
        if self.max_seconds is None or elapsed >= self.max_seconds:
            return step
        timed, seconds = step - self.mark[0], elapsed - self.mark[1]
        if timed <= 0 or seconds <= 0:  # so slow that not one step could be timed apart
            timed, seconds = step, elapsed
        return step + int((self.max_seconds - elapsed) * timed / seconds)

    def _tell(self, state) -> None:
        if self.schedule.steps is not None:
            state.max_steps = self.schedule.steps
