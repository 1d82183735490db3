"""``memlm finetune``: an encoder on a GLUE task, over learning rates and seeds."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from memlm.cli.options import load_tokenizer, show


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Fine-tune MODEL on a GLUE task; repeat the command to go on where it stopped."""

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """Folder or Hub id of an encoder with its tokenizer."""
    task: str
    """cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli."""
    out: str
    """Directory of the runs and their table."""
    data: str = "nyu-mll/glue"
    """Folder of the task's .tsv files, folder saved by datasets, or a data set on the Hub."""
    learning_rates: tuple[float, ...] = (2e-5, 3e-5, 4e-5, 5e-5)
    """To choose from."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Runs of each rate; their median counts."""
    epochs: int | None = None
    """Default: as published for the task."""
    batch_size: int = 32
    """Samples per step."""
    max_length: int | None = None
    """Tokens of a sample (default: what the model can read)."""
    legacy_batch_mean: bool = False
    """Metrics as means over batches, to compare with logs of the TUPE authors' code."""
    legacy_classes: bool = False
    """Classes numbered by frequency, as there."""
    predict: bool = False
    """Also write OUT/TASK.tsv: the test split as the best run predicts it, for GLUE's server."""
    keep_models: bool = False
    """Keep the weights of every run."""
    threads: int | None = None
    """CPU threads (default: as torch chooses)."""
    json: bool = False
    """Print the table as JSON."""

    def run(self) -> int:
        """Run the grid."""
        from memlm.cli.encoders import load_encoder
        from memlm.core.config import check
        from memlm.data.glue import glue_task, predictions_name
        from memlm.models.trained_length import readable_length
        from memlm.training.finetune import describe_table, finetune
        from memlm.training.finetune_config import FinetuneConfig

        task = glue_task(self.task)
        longest = readable_length(load_encoder(self.model, "AutoModel"))
        max_length = min(512, longest or 512) if self.max_length is None else self.max_length
        check(
            longest is None or max_length <= longest,
            f"max_length must be at most what the model can read, {longest}, got {max_length}",
        )
        config = FinetuneConfig(
            task=task.name,
            learning_rates=self.learning_rates,
            seeds=self.seeds,
            epochs=self.epochs,
            batch_size=self.batch_size,
            max_length=max_length,
            legacy_batch_mean=self.legacy_batch_mean,
            legacy_classes=self.legacy_classes,
            predict=self.predict,
            keep_models=self.keep_models,
            threads=self.threads,
        )
        table = finetune(
            lambda labels: load_encoder(
                self.model, "AutoModelForSequenceClassification", num_labels=labels
            ),
            load_tokenizer(self.model),
            self.data,
            config,
            self.out,
        )
        files = [predictions_name(task, split) for split in task.test] if self.predict else []
        lines = [describe_table(table), *(f"predicted: {self.out}/{name}" for name in files)]
        show(table, "\n".join(lines), as_json=self.json)
        return 0
