"""The training loop of every method, on the Trainer of transformers.

A step reads ``accumulate`` micro-batches on every process and lowers

    L = sum over processes and micro-batches of loss_sum / sum of count

so every target of the step counts alike, however the step is cut up. The Trainer brings the
optimiser's step, clipping, checkpoints with all random states, several processes and trackers. What
is added: the order of examples (`order`, a function of the step alone), sums instead of means,
schedules with a time budget, evaluation that is exact over targets on any number of processes, and
a folder that says what a run is (`folder`).

Several processes are started by ``torchrun`` (or ``accelerate launch``); each is one device.
Gradients are exchanged (DDP) or, with ``sharded``, weights too (FSDP2).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from memlm.core.config import check
from memlm.core.files import write_json
from memlm.core.randomness import random_state_kept
from memlm.core.threads import torch_threads
from memlm.data.batches import IGNORED
from memlm.training.callbacks import Keep, ProgressBar, Sanity
from memlm.training.config import RunConfig
from memlm.training.folder import CHECKPOINTS, SUMMARY, last_checkpoint, open_run
from memlm.training.learning import make_optimizer, make_schedule, resolve_precision
from memlm.training.objectives.module import ObjectiveOutput
from memlm.training.order import Order
from memlm.training.schedule import Clock

UNLIMITED_STEPS = 10**9  # under a time budget, until the clock has fixed the number
_NOTHING = -1  # in place of an example

Collate = Callable[[list[Any]], dict[str, Tensor]]


def train(
    module: nn.Module,
    examples: Any,
    order: Order,
    config: RunConfig,
    out: str | Path,
    *,
    collate: Collate,
    identity: dict[str, Any],
    held_out: Sequence[Any] | None = None,
    save_beside: Callable[[Path], Any] = lambda folder: None,
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    resume: bool = False,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> PreTrainedModel:
    """Train, and leave the model with a summary in a folder; `memlm.training` says what is needed.

    With ``max_steps`` the result depends only on what ``identity`` says, threads and machine type:
    killed anywhere and resumed, the loss curve continues identically. The state of the global
    random generators is the same after the call as before.

    Args:
        module: gives (loss_sum, count, figures) for a batch; its ``model`` is trained.
        examples: ``examples[number]``.
        order: which examples a micro-batch holds.
        config: everything else.
        out: folder of the run; created.
        collate: examples to a batch.
        identity: what else a resumed run must share, as plain JSON values.
        held_out: examples to report the loss on, every one once, in order.
        save_beside: puts what belongs to the model (a tokenizer) into a folder that holds one.
        complete: adds to the summary what only the method knows.
        resume: continue from the last checkpoint in ``out`` (from the start if there is none; of a
            finished run the model is only loaded).
        quiet: no progress bar.
        callbacks: further callbacks of the Trainer.

    Returns:
        The trained model in evaluation mode.

    Raises:
        InputError: if ``out`` already holds a run and ``resume`` is not set, or the loss stops
            being a number.
        FingerprintError: if the run to resume is another one.
    """
    out = Path(out)
    processes = PartialState(cpu=on_cpu(config))
    check(
        config.max_seconds is None or processes.num_processes == 1,
        "a time budget is kept by one process, but there are "
        f"{processes.num_processes}; give max_steps",
    )
    record = {"config": config.identity(), "processes": processes.num_processes, **identity}
    if processes.is_main_process:
        open_run(out, record, resume=resume, defaults=config.defaults())
    processes.wait_for_everyone()
    check(
        not config.sharded or processes.num_processes > 1,
        "weights can only be shared between several processes, but there is one; start them with "
        "torchrun or set sharded to false",
    )
    check(
        not config.keep_best or held_out is not None,
        "keep_best compares evaluations: give held-out text",
    )
    model = cast(PreTrainedModel, module.model)
    if (out / SUMMARY).exists():
        return _saved(model, out).eval()

    with random_state_kept(), torch_threads(config.threads) as threads:
        trainer = Loop(
            module,
            examples,
            order,
            config,
            out,
            collate=collate,
            held_out=held_out,
            save_beside=save_beside,
            quiet=quiet,
            callbacks=callbacks,
        )
        checkpoint = last_checkpoint(out / CHECKPOINTS) if resume else None
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        final = None if held_out is None else trainer.final_evaluation()
        trainer.save_to(out)
    if processes.is_main_process:
        summary = {**trainer.summary(), "threads": threads, "held_out": final}
        write_json(out / SUMMARY, complete(summary))
    processes.wait_for_everyone()
    return model.eval()


class Loop(Trainer):
    """The Trainer with our order of examples, losses, evaluation and schedule."""

    def __init__(
        self,
        module: nn.Module,
        examples: Any,
        order: Order,
        config: RunConfig,
        out: Path,
        *,
        collate: Collate,
        held_out: Sequence[Any] | None = None,
        save_beside: Callable[[Path], Any] = lambda folder: None,
        quiet: bool = True,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.config = config
        self.precision = resolve_precision(config)
        self.schedule = make_schedule(config)
        self.trained = cast(PreTrainedModel, module.model)
        self.order, self.held_out, self.save_beside = order, held_out, save_beside
        self.sums: dict[str, Tensor] = {}  # of figures since the last point of the curve
        self.targets = 0
        self.micro = 0
        if config.checkpoint_layers:
            _compute_layers_again(self.trained)
        without_accelerator = on_cpu(config)
        arguments = TrainingArguments(
            output_dir=str(out / CHECKPOINTS),
            max_steps=config.max_steps or UNLIMITED_STEPS,
            per_device_train_batch_size=config.rows,
            gradient_accumulation_steps=config.accumulate,
            learning_rate=config.learning_rate,
            max_grad_norm=config.clip_norm,
            logging_steps=config.log_every,
            logging_nan_inf_filter=False,
            eval_strategy="steps" if config.evaluate_every and held_out else "no",
            eval_steps=config.evaluate_every,
            save_strategy="steps" if config.save_every else "no",
            save_steps=config.save_every or 500,
            save_total_limit=config.keep_last,
            seed=config.seed,
            use_cpu=without_accelerator,
            fp16=self.precision == "float16",
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=not without_accelerator,
            remove_unused_columns=False,
            report_to=list(config.report_to) or "none",
            disable_tqdm=True,
            **_sharding(config, self.trained),
        )
        _one_device(arguments)
        super().__init__(
            model=module,
            args=arguments,
            data_collator=collate,
            train_dataset=cast(Dataset, examples),
            eval_dataset=cast(Dataset, held_out),
            callbacks=[Clock(self.schedule, config.max_seconds), Sanity(), Keep(self), *callbacks],
        )
        check(
            not config.sharded or self.is_fsdp_enabled,
            "weights are shared between accelerators, but these processes run on the "
            f"{self.args.device.type}, where accelerate exchanges gradients only; set sharded to "
            "false",
        )
        self.model_accepts_loss_kwargs = True  # our losses are parts of the step's mean already
        self.remove_callback(PrinterCallback)
        tokens = config.step_tokens * self.args.world_size
        self.add_callback(ProgressBar(self.schedule, tokens, quiet=quiet))

    def get_train_dataloader(self) -> DataLoader:
        """This process's own micro-batches, in their order."""
        return DataLoader(
            _Examples(self.train_dataset),
            batch_sampler=_MicroBatches(
                self.order, self.args.process_index, self.args.max_steps * self.config.accumulate
            ),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser of the settings."""
        if self.optimizer is None:
            module = cast(nn.Module, model or self.model)
            self.optimizer = make_optimizer(self.config, module, self.trained)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Our schedule; its state travels in the checkpoints."""
        if self.lr_scheduler is None:
            chosen = cast(torch.optim.Optimizer, optimizer or self.optimizer)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, self.schedule)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        """bfloat16 products, without a copy of all outputs in float32."""
        return torch.autocast(
            self.args.device.type,
            torch.bfloat16,
            enabled=self.precision == "bfloat16",
            cache_enabled=cache_enabled,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step and the targets that they hold on all processes."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        count = torch.stack([_targets(batch) for batch in batches]).sum().to(device)
        self.targets = int(self._over_processes(count))
        check(self.targets > 0, "every step must have targets, but one holds none; give more text")
        self.schedule.targets += self.targets
        self.micro = 0
        return batches, self.targets

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's part of the mean over the step."""
        output: ObjectiveOutput = model(inputs, step=self.state.global_step, micro=self.micro)
        self.micro += 1
        for name, value in output.figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach() / self.targets
        # Gradients are averaged over processes, losses of the curve too: both must be sums.
        loss = output.loss_sum * (self.args.world_size / self.targets)
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With every point of the curve, also what the objective measured beside its loss."""
        if "loss" in logs:
            steps = self.state.global_step - self.schedule.logged
            for name, value in self.sums.items():
                logs[f"{name}_loss"] = float(self._over_processes(value)) / steps
            self.schedule.logged, self.sums = self.state.global_step, {}
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss over every target of the held-out examples, the same on any number of processes.

        ``eval_loss`` is the objective's, ``eval_model_loss`` the model's own without memory, where
        the objective states it.
        """
        examples = cast(Sequence[Any], eval_dataset or self.held_out)
        collate, module = cast(Collate, self.data_collator), cast(nn.Module, self.model).eval()
        rows, size, rank = self.config.rows, self.args.world_size, self.args.process_index
        sums: dict[str, Tensor] = {}
        for first in range(0, len(examples), rows * size):
            begin = first + rank * rows
            present = range(begin, min(begin + rows, len(examples))) or (_NOTHING,)
            collated = collate([_example(examples, number) for number in present])
            batch = cast(dict[str, Tensor], self._prepare_inputs(collated))
            with self.compute_loss_context_manager():
                output: ObjectiveOutput = module(batch)
            for name, value in (
                ("targets", output.count),
                ("loss", output.loss_sum),
                *((f"{name}_loss", value) for name, value in output.figures.items()),
            ):
                sums[name] = sums.get(name, 0.0) + value.detach().double()
        totals = {name: float(self._over_processes(value)) for name, value in sums.items()}
        targets = totals.pop("targets")
        check(targets > 0, "held-out text must have targets, but has none; give more")
        metrics = {f"{metric_key_prefix}_{name}": total / targets for name, total in totals.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def final_evaluation(self) -> dict[str, Any]:
        """The held-out losses now; not computed twice if the last step evaluated already."""
        found = [entry for entry in self.state.log_history if "eval_loss" in entry]
        if not found or found[-1]["step"] != self.state.global_step:
            found = [self.evaluate()]
        losses = {name: value for name, value in found[-1].items() if name.endswith("loss")}
        return {name.removeprefix("eval_"): value for name, value in losses.items()}

    def save_to(self, folder: Path) -> None:
        """The model as ``from_pretrained`` reads it, whole on whatever devices it is."""
        state = None
        if self.is_fsdp_enabled:  # every process gives its part
            state = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            self._save(str(folder), state)
            self.save_beside(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        if state_dict is not None:
            inside = "model."
            state_dict = {
                name.removeprefix(inside): value
                for name, value in state_dict.items()
                if name.startswith(inside)
            }
        with _quiet_saving():
            self.trained.save_pretrained(cast(str, output_dir), state_dict=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = _saved(self.trained, resume_from_checkpoint)
        self.trained.load_state_dict(saved.state_dict())
        return None

    def summary(self) -> dict[str, Any]:
        """What came out, with all that is needed to repeat it."""
        schedule, history = self.schedule, self.state.log_history
        points = ("step", "loss", "model_loss", "learning_rate", "grad_norm")
        return {
            "format_version": 2,
            "config": self.config.to_dict(),
            "parameters": self.trained.num_parameters(),
            "precision": self.precision,
            "device": self.args.device.type,
            "processes": self.args.world_size,
            "steps": self.state.global_step,
            "plans": schedule.plans,
            "tokens": schedule.targets,
            "seconds": schedule.elapsed,
            "tokens_per_second": schedule.targets / schedule.elapsed,
            "curve": [
                {name: entry[name] for name in points if name in entry}
                for entry in history
                if "loss" in entry
            ],
            "evaluations": [
                {
                    name.removeprefix("eval_"): value
                    for name, value in entry.items()
                    if name == "step" or name.startswith("eval_")
                }
                for entry in history
                if "eval_loss" in entry
            ],
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def _over_processes(self, value: Tensor) -> Tensor:
        """The sum of a scalar over all processes."""
        if self.args.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value


class _MicroBatches:
    """The example numbers of one process, micro-batch by micro-batch."""

    def __init__(self, order: Order, process: int, count: int):
        self.order, self.process, self.count = order, process, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.count):
            yield list(self.order.items(batch, self.process)) or [_NOTHING]


class _Examples(Dataset):
    """The examples, and one without targets for a process that has nothing to read."""

    def __init__(self, examples: Any):
        self.examples = examples

    def __getitem__(self, number: int) -> Any:
        return _example(self.examples, number)


def _example(examples: Any, number: int) -> Any:
    """An example; `_NOTHING` takes part where processes exchange keys, but predicts nothing."""
    if number != _NOTHING:
        return examples[number]
    return {
        name: torch.full_like(value, IGNORED) if name.endswith("labels") else value
        for name, value in examples[0].items()
    }


def _targets(batch: dict[str, Tensor]) -> Tensor:
    return (batch.get("shift_labels", batch["labels"]) != IGNORED).sum()


def _saved(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """A model of the same kind from a folder; one that stands on another model is given that."""
    beneath: Any = {} if getattr(model, "base", None) is None else {"base": model.base}
    return cast(Any, type(model)).from_pretrained(folder, dtype=torch.float32, **beneath)


def on_cpu(config: RunConfig) -> bool:
    """Whether a run has no accelerator to run on."""
    return config.device == "cpu" or not torch.accelerator.is_available()


def _sharding(config: RunConfig, model: PreTrainedModel) -> dict[str, Any]:
    if not config.sharded:
        return {}
    present = {type(module).__name__ for module in model.modules()}
    settings = {
        "version": 2,
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",
        "transformer_layer_cls_to_wrap": sorted(present & set(model._no_split_modules or ())),
    }
    return {"fsdp": True, "fsdp_config": settings}


def _compute_layers_again(model: PreTrainedModel) -> None:
    check(
        model.supports_gradient_checkpointing,
        f"checkpoint_layers needs a model that offers it, but {type(model).__name__} does not",
    )
    # transformers before 5.2x know it by its old name only
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _one_device(arguments: TrainingArguments) -> None:
    """A process uses one device; several GPUs are for several processes."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1


@contextmanager
def _quiet_saving() -> Iterator[None]:
    """No progress bar for writing one small file."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
