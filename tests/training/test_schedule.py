"""The rate rises and decays; the clock turns seconds into steps."""

import pytest
from transformers import TrainerControl, TrainerState

from memlm.training import schedule as module
from memlm.training.schedule import Clock, Schedule


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_the_rate_rises_then_falls(kind, warmup):
    schedule = Schedule(kind, warmup, 100)
    rates = [schedule(step) for step in range(100)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert schedule(1000) == (1.0 if kind == "constant" else 0.0)
    if warmup == 10:
        assert rates[4] == 0.5
    if kind != "constant":
        assert rates[-1] < 0.02


def test_before_the_steps_are_known_the_rate_only_rises():
    unknown, known = Schedule("linear", 20, None), Schedule("linear", 20, 60)
    assert [unknown(step) for step in range(11)] == [known(step) for step in range(11)]
    assert unknown(500) == 1.0


class Machine:
    """A machine of settable speed, driven like the Trainer drives callbacks."""

    def __init__(self, monkeypatch, seconds, *, warmup=20, first=0.0):
        self.now = 100.0
        monkeypatch.setattr(module, "perf_counter", lambda: self.now)
        self.schedule = Schedule("linear", warmup, None)
        self.clock = Clock(self.schedule, seconds)
        self.state, self.control = TrainerState(), TrainerControl()
        self.state.max_steps = 10**9
        self.now += first
        self.clock.on_train_begin(None, self.state, self.control)

    def run(self, speed):
        while not self.control.should_training_stop:
            self.now += speed(self.state.global_step)
            self.state.global_step += 1
            self.clock.on_step_end(None, self.state, self.control)
        return self.state.global_step, self.schedule


def test_steady_speed_ends_at_the_budget_with_one_plan(monkeypatch):
    steps, schedule = Machine(monkeypatch, 100.0).run(lambda step: 0.5)
    assert steps == schedule.steps == pytest.approx(200, abs=1)
    assert len(schedule.plans) == 1
    assert schedule.plans[0][0] <= 10  # half the warm-up
    assert schedule.elapsed == pytest.approx(100, abs=1)


def test_slow_first_steps_do_not_mislead(monkeypatch):
    steps, schedule = Machine(monkeypatch, 100.0).run(lambda step: 5.0 if step < 1 else 0.5)
    assert steps == pytest.approx(191, abs=2)
    assert len(schedule.plans) == 1


@pytest.mark.parametrize(("later", "expected"), [(1.0, 150), (0.25, 300)])
def test_a_change_of_speed_is_followed(monkeypatch, later, expected):
    steps, schedule = Machine(monkeypatch, 100.0).run(lambda step: 0.5 if step < 100 else later)
    assert steps == pytest.approx(expected, rel=0.06)
    assert schedule.elapsed == pytest.approx(100, rel=0.06)
    assert len(schedule.plans) > 1


def test_a_machine_too_slow_for_one_step_still_does_one(monkeypatch):
    steps, schedule = Machine(monkeypatch, 10.0).run(lambda step: 30.0)
    assert steps == 1
    assert schedule.plans == [[1, 1]]


def test_very_slow_steps_are_still_planned(monkeypatch):
    steps, schedule = Machine(monkeypatch, 10.0).run(lambda step: 2.0)
    assert steps == 5
    assert schedule.elapsed == 10.0


def test_without_a_budget_seconds_are_only_counted(monkeypatch):
    machine = Machine(monkeypatch, None)
    machine.schedule.steps = 50
    machine.clock.on_train_begin(None, machine.state, machine.control)
    for step in range(1, 4):
        machine.now += 2.0
        machine.state.global_step = step
        machine.clock.on_step_end(None, machine.state, machine.control)
    assert machine.schedule.elapsed == 6.0
    assert not machine.control.should_training_stop
    assert machine.state.max_steps == 50
    assert not machine.schedule.plans


def test_a_resumed_run_has_only_the_time_that_is_left(monkeypatch):
    machine = Machine(monkeypatch, 100.0)
    machine.schedule.elapsed = 60.0
    machine.schedule.fix(10, 200)
    machine.state.global_step = 120
    machine.clock.on_train_begin(None, machine.state, machine.control)
    assert machine.state.max_steps == 200
    steps, schedule = machine.run(lambda step: 0.5)
    assert steps == pytest.approx(200, abs=1)
    assert schedule.elapsed == pytest.approx(100, abs=1)
