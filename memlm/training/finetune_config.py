"""How an encoder is fine-tuned on a GLUE task: the grid of runs, and one run of it.

Defaults are the protocol of Ke et al. (2021): batches of 32, rates 2e-5 to 5e-5, five seeds each,
their median, 6 % of the steps of warm-up, linear decay, weight decay 0.01, norm 1. Free of torch.
"""

from dataclasses import dataclass
from typing import Any

from memlm.core.config import Config, check, check_at_least
from memlm.data.glue import GlueTask
from memlm.training.config import RunConfig
from memlm.training.polynomial import warmup_steps_of


@dataclass(frozen=True)
class FinetuneConfig(Config):
    """A grid of fine-tuning runs on one task.

    Attributes:
        task: name of one of GLUE, or of one of your own.
        learning_rates: to choose from, by the median over seeds.
        seeds: of the head's weights, the order and dropout.
        epochs: None: as published for the task.
        batch_size: samples per step.
        max_length: tokens of a sample; longer ones are cut.
        warmup_ratio: share of the steps.
        weight_decay: per unit of rate.
        optimizer: ``"adamw"`` or ``"fairseq_adam"``.
        legacy_batch_mean: report the mean of the metrics of evaluation batches, as the TUPE
            authors' logs do, instead of the metric of all samples.
        legacy_classes: number classes by frequency; F1 is then of the rarer one.
        predict: also write predictions of the test split, in GLUE's form.
        keep_models: keep the weights of every run.
        precision: see `RunConfig`.
        threads: see `RunConfig`.

    Raises:
        InputError: if a number is out of range.
    """

    task: str
    learning_rates: tuple[float, ...] = (2e-5, 3e-5, 4e-5, 5e-5)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    epochs: int | None = None
    batch_size: int = 32
    max_length: int = 512
    warmup_ratio: float = 0.06
    weight_decay: float = 0.01
    optimizer: str = "adamw"
    legacy_batch_mean: bool = False
    legacy_classes: bool = False
    predict: bool = False
    keep_models: bool = False
    precision: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        check(len(self.learning_rates) > 0, "learning_rates must hold at least one, got none")
        check(len(self.seeds) > 0, "seeds must hold at least one, got none")
        check_at_least(self, 1, "epochs", "batch_size")
        check_at_least(self, 4, "max_length")
        warmup_steps_of(self.warmup_ratio, 1)

    def shared(self) -> dict[str, Any]:
        """The settings that runs of one folder must have in common."""
        values = self.to_dict()
        for name in ("learning_rates", "seeds", "keep_models", "threads"):
            del values[name]
        return values

    def run(self, task: GlueTask, samples: int, learning_rate: float, seed: int) -> RunConfig:
        """One run of the grid on so many training samples."""
        epochs = self.epochs or task.epochs
        steps = -(-epochs * samples // self.batch_size)
        return RunConfig(
            block_length=self.max_length,
            batch_tokens=self.max_length * self.batch_size,
            optimizer=self.optimizer,  # type: ignore[arg-type]  # checked there
            learning_rate=learning_rate,
            schedule="polynomial",
            warmup_steps=warmup_steps_of(self.warmup_ratio, steps),
            weight_decay=self.weight_decay,
            beta2=0.999,
            max_steps=steps,
            log_every=max(1, steps // 20),
            precision=self.precision,  # type: ignore[arg-type]  # checked there
            threads=self.threads,
            seed=seed,
        )
