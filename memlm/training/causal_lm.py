"""Train a small causal language model from scratch, on the Trainer of transformers.

The model is a Llama with its embedding matrix tied to the head; it learns to predict every next
token of the corpus (mean cross-entropy over the scored tokens) with AdamW. Checkpoints and resuming
are the Trainer's; what is added here is what a small run on a CPU needs: a loss that never holds
all logits (``loss``), an order of examples that survives a resume (``blocks``) and a time budget
(``schedule``).

The folder of a run holds the model and its tokenizer (``AutoModelForCausalLM.from_pretrained``
reads it), ``run.json`` (what the run is: settings, corpus, tokenizer), ``checkpoints/``, and in the
end ``training.json`` (what came out).
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from memlm.core.config import check
from memlm.core.errors import FingerprintError, InputError
from memlm.core.files import read_json, write_json
from memlm.core.progress import bar
from memlm.core.randomness import random_state_kept
from memlm.core.threads import torch_threads
from memlm.data.tokens import TokenCorpus
from memlm.models.fingerprint import tokenizer_hash
from memlm.training.blocks import HeldOutBlocks, TrainingBlocks, collate, pack
from memlm.training.config import TrainConfig
from memlm.training.loss import head_cross_entropy
from memlm.training.optimizer import muon_adamw
from memlm.training.schedule import Clock, Schedule

_UNLIMITED_STEPS = 10**9  # under a time budget, until the clock has fixed the number
_NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # names of torch.cpu.get_capabilities


def train_causal_lm(
    corpus: TokenCorpus,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    out: str | Path,
    *,
    held_out: TokenCorpus | None = None,
    resume: bool = False,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> LlamaForCausalLM:
    """Train a model and leave it, with its tokenizer and a summary, in a folder.

    With ``max_steps`` the result depends only on corpus, tokenizer, settings, threads and machine
    type. One process; if it sees several GPUs all are used, ``batch_blocks`` examples on each. The
    state of the global random generators is the same after the call as before.

    Args:
        corpus: text to learn from, tokenised with ``tokenizer``.
        tokenizer: decides the size of the vocabulary; saved beside the model.
        config: everything else.
        out: folder of the run; created.
        held_out: text to report the loss on, in packed blocks like the training text.
        resume: continue from the last checkpoint in ``out`` (from the start if there is none; a
            finished run is only loaded).
        quiet: no progress bar.
        callbacks: further callbacks of the Trainer.

    Returns:
        The trained model in evaluation mode.

    Raises:
        InputError: if the corpus does not fill a block, its tokens are not the tokenizer's, ``out``
            already holds a run and ``resume`` is not set, or the loss stops being a number.
        FingerprintError: if the run to resume has other settings, another corpus or tokenizer.
    """
    out = Path(out)
    vocab_size = len(tokenizer)
    _check_vocabulary(corpus, vocab_size)
    if held_out is not None:
        _check_vocabulary(held_out, vocab_size)
    _open_run(out, config, corpus, tokenizer, resume=resume)
    if (out / "training.json").exists():
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        return cast(LlamaForCausalLM, loaded.eval())

    examples = TrainingBlocks(
        pack(corpus),
        config.block_length,
        items=(config.max_steps or _UNLIMITED_STEPS) * config.batch_blocks * config.accumulate,
        seed=config.seed,
    )
    evaluated = None if held_out is None else HeldOutBlocks(pack(held_out), config.block_length)
    with random_state_kept(), torch_threads(config.threads) as threads:
        torch.manual_seed(config.seed)
        trainer = _BlockTrainer(
            config,
            new_model(config, tokenizer),
            out / "checkpoints",
            examples,
            evaluated,
            quiet=quiet,
            callbacks=callbacks,
        )
        checkpoint = last_checkpoint(out / "checkpoints") if resume else None
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        loss = None if evaluated is None else trainer.final_loss()
    model = trainer.trained
    with _quiet_saving():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    summary = _summary(trainer, config, corpus, threads)
    if held_out is not None and loss is not None:
        summary["held_out"] = _held_out_summary(trainer, config, held_out, loss)
    write_json(out / "training.json", summary)
    return cast(LlamaForCausalLM, model.eval())


def new_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama of the configured shape with random weights (from torch's global generator)."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.block_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,  # type: ignore[arg-type]
            eos_token_id=tokenizer.eos_token_id,  # type: ignore[arg-type]
            pad_token_id=tokenizer.pad_token_id,  # type: ignore[arg-type]
        )
    )


def describe_training(
    config: TrainConfig, vocab_size: int, corpus: TokenCorpus | None = None
) -> dict[str, Any]:
    """What a run will be, before it starts: sizes, memory and a line to print.

    Returns:
        ``parameters``, ``step_tokens``, ``precision``, ``memory_bytes`` (an estimate for one
        device: weights, gradients, both AdamW averages and the activations of a micro-batch),
        ``epochs`` (None without a corpus or under a time budget) and ``text``.
    """
    parameters = config.parameters(vocab_size)
    precision = resolve_precision(config)
    # Kept for the backward pass, per token and layer: about 16 rows of the width and 5 of the
    # feed-forward, in 4 bytes each (half of them in 2 under bfloat16).
    row = 16 * config.hidden_size + 5 * config.intermediate_size
    width = 4 if precision == "float32" else 3
    activations = config.batch_blocks * config.block_length * config.layers * row * width
    memory = 16 * parameters + activations
    epochs = None
    if corpus is not None and config.max_steps is not None:
        epochs = config.max_steps * config.step_tokens / len(corpus)
    limit = f"{config.max_steps:,} steps" if config.max_steps else f"{config.max_seconds:g} s"
    text = (
        f"{parameters:,} parameters, {config.step_tokens:,} tokens per step, {limit}"
        f"{'' if epochs is None else f' ({epochs:.1f} epochs)'}, {precision}, "
        f"about {memory / 1e6:,.0f} MB"
    )
    return {
        "parameters": parameters,
        "step_tokens": config.step_tokens,
        "precision": precision,
        "memory_bytes": memory,
        "epochs": epochs,
        "text": text,
    }


def resolve_precision(config: TrainConfig) -> str:
    """``"float32"`` or ``"bfloat16"``: what ``"auto"`` means on this machine."""
    if config.precision != "auto":
        return config.precision
    if config.device == "auto" and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if any(found.get(name) for name in _NATIVE_BFLOAT16) else "float32"


def last_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint; one that a crash cut short has no readable state and is left."""
    found: list[tuple[int, Path]] = []
    for state in directory.glob("checkpoint-*/trainer_state.json"):
        try:
            step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
        except (ValueError, KeyError):
            continue
        found.append((step, state.parent))
    return max(found)[1] if found else None


class _BlockTrainer(Trainer):
    """The Trainer with our order of examples, loss, precision and schedule."""

    def __init__(
        self,
        config: TrainConfig,
        model: LlamaForCausalLM,
        directory: Path,
        examples: TrainingBlocks,
        held_out: HeldOutBlocks | None,
        *,
        quiet: bool,
        callbacks: Sequence[TrainerCallback],
    ):
        self.config = config
        self.precision = resolve_precision(config)
        self.schedule = Schedule(config.schedule, config.warmup_steps, config.max_steps)
        self.trained = model
        self.examples = examples
        self.held_out = held_out
        on_cpu = config.device == "cpu" or not torch.accelerator.is_available()
        super().__init__(
            model=model,
            args=TrainingArguments(
                output_dir=str(directory),
                max_steps=config.max_steps or _UNLIMITED_STEPS,
                per_device_train_batch_size=config.batch_blocks,
                per_device_eval_batch_size=config.batch_blocks,
                gradient_accumulation_steps=config.accumulate,
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                max_grad_norm=config.clip_norm,
                optim="adamw_torch_fused",
                logging_steps=config.log_every,
                logging_nan_inf_filter=False,
                eval_strategy="steps" if config.evaluate_every and held_out else "no",
                eval_steps=config.evaluate_every,
                save_strategy="steps" if config.save_every else "no",
                save_steps=config.save_every or 500,
                save_total_limit=2,
                seed=config.seed,
                use_cpu=on_cpu,
                dataloader_pin_memory=not on_cpu,
                prediction_loss_only=True,
                remove_unused_columns=False,
                report_to="none",
                disable_tqdm=True,
            ),
            data_collator=collate,
            train_dataset=examples,
            eval_dataset=held_out,
            callbacks=[Clock(self.schedule, config.max_seconds), _Sanity(), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(_Bar(self.schedule, config.step_tokens, quiet=quiet))

    def get_train_dataloader(self) -> DataLoader:
        """Examples in their own order: they are shuffled already, by their number."""
        loader = DataLoader(
            self.examples,
            batch_size=self.args.train_batch_size,
            sampler=SequentialSampler(self.examples),
            collate_fn=collate,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model=None):
        """The Trainer's AdamW, or Muon for the matrices."""
        if self.config.optimizer == "adamw":
            return super().create_optimizer()
        if self.optimizer is None:
            self.optimizer = muon_adamw(
                self.trained,
                self.trained.lm_head.weight,
                muon_learning_rate=self.config.muon_learning_rate,
                learning_rate=self.config.learning_rate,
                weight_decay=self.config.weight_decay,
                betas=(self.config.beta1, self.config.beta2),
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Our schedule; its state travels in the checkpoints."""
        if self.lr_scheduler is None:
            chosen = cast(torch.optim.Optimizer, optimizer or self.optimizer)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, self.schedule)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def final_loss(self) -> float:
        """The held-out loss now; not computed twice if the last step evaluated already."""
        evaluations = [entry for entry in self.state.log_history if "eval_loss" in entry]
        if evaluations and evaluations[-1]["step"] == self.state.global_step:
            return evaluations[-1]["eval_loss"]
        return float(self.evaluate()["eval_loss"])

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        """bfloat16 products, without a copy of all outputs in float32."""
        return torch.autocast(
            self.args.device.type,
            torch.bfloat16,
            enabled=self.precision == "bfloat16",
            cache_enabled=cache_enabled,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over the scored tokens of the whole step, or of the whole held-out text."""
        labels = inputs["shift_labels"]
        count: Any = num_items_in_batch
        if not model.training and self.held_out is not None:
            # The Trainer averages over rows: rows times the mean number of targets makes it exact.
            count = len(labels) * self.held_out.targets / len(self.held_out)
        if model is not self.trained or count is None:
            # Wrapped for several devices: gradients are exchanged in the wrapper's own forward.
            return super().compute_loss(model, inputs, return_outputs, count)
        body = self.trained.model(input_ids=inputs["input_ids"], use_cache=False)
        hidden = body.last_hidden_state.flatten(0, 1)
        total = head_cross_entropy(hidden, self.trained.lm_head.weight, labels.flatten())
        loss = total / count
        return (loss, {"loss": loss}) if return_outputs else loss


class _Sanity(TrainerCallback):
    """Stops a training whose loss is no number any more."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise InputError(
                f"the loss must stay a number but is {loss} at step {state.global_step}; lower "
                "learning_rate or give more warmup_steps"
            )


class _Bar(TrainerCallback):
    """Tokens per second, time left and the latest loss."""

    def __init__(self, schedule: Schedule, step_tokens: int, *, quiet: bool):
        self.schedule = schedule
        self.step_tokens = step_tokens
        self.quiet = quiet

    def on_train_begin(self, args, state, control, **kwargs):
        self.shown = bar(
            self._total(),
            label="train",
            unit="token",
            initial=state.global_step * self.step_tokens,
            quiet=self.quiet or not state.is_world_process_zero,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.shown.total = self._total()
        self.shown.update(self.step_tokens)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.shown.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.shown.close()

    def _total(self) -> int | None:
        return None if self.schedule.steps is None else self.schedule.steps * self.step_tokens


def _check_vocabulary(corpus: TokenCorpus, vocab_size: int) -> None:
    largest = int(corpus.tokens.max(initial=0))
    check(
        largest < vocab_size,
        f"the corpus must be made with this tokenizer, but has token {largest} where the tokenizer "
        f"has {vocab_size} tokens; tokenise the text again",
    )


def _open_run(
    out: Path,
    config: TrainConfig,
    corpus: TokenCorpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    resume: bool,
) -> None:
    """Claim the folder: write what this run is, or compare it with what is there."""
    identity = {
        "config": config.identity(),
        "corpus_hash": corpus.hash,
        "tokenizer_hash": tokenizer_hash(tokenizer),
    }
    record = out / "run.json"
    if not record.exists():
        check(
            not out.exists() or (out.is_dir() and not any(out.iterdir())),
            f"{out} must be a new or empty folder, but holds other files; choose another",
        )
        out.mkdir(parents=True, exist_ok=True)
        write_json(record, identity)
        return
    check(resume, f"{out} already holds a training; resume it or choose another folder")
    before = read_json(record)
    if before != identity:
        old, new = (
            {**run.get("config", {}), **{key: run.get(key) for key in run if key != "config"}}
            for run in (before, identity)
        )
        changed = ", ".join(
            f"{name} ({old.get(name)} then, {new.get(name)} now)"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        )
        raise FingerprintError(
            f"{out} can only be resumed as it was begun, but these differ: {changed}; use the old "
            "settings or another folder"
        )


def _summary(
    trainer: _BlockTrainer, config: TrainConfig, corpus: TokenCorpus, threads: int
) -> dict[str, Any]:
    """What came out of a run, with all that is needed to repeat it."""
    steps, schedule = trainer.state.global_step, trainer.schedule
    rows = steps * trainer.args.train_batch_size * config.accumulate
    tokens = trainer.examples.targets(rows)
    return {
        "format_version": 1,
        "config": config.to_dict(),
        "parameters": trainer.trained.num_parameters(),
        "precision": trainer.precision,
        "device": trainer.args.device.type,
        "devices": max(1, trainer.args.n_gpu),
        "threads": threads,
        "corpus": corpus.describe(),
        "steps": steps,
        "plans": schedule.plans,
        "tokens": tokens,
        "epochs": rows / trainer.examples.blocks,
        "seconds": schedule.elapsed,
        "tokens_per_second": tokens / schedule.elapsed,
        "curve": [
            {name: entry[name] for name in ("step", "loss", "learning_rate", "grad_norm")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        "evaluations": [
            {"step": entry["step"], "loss": entry["eval_loss"]}
            for entry in trainer.state.log_history
            if "eval_loss" in entry
        ],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _held_out_summary(
    trainer: _BlockTrainer, config: TrainConfig, held_out: TokenCorpus, loss: float
) -> dict[str, Any]:
    targets = cast(HeldOutBlocks, trainer.held_out).targets
    sizes = held_out.text_bytes
    return {
        "protocol": f"packed blocks of {config.block_length} tokens, documents end to end",
        "targets": targets,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": (
            None if sizes is None else loss * targets / math.log(2) / int(sizes.sum())
        ),
    }


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
