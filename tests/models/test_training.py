"""A model with memory is trained, saved and loaded by the ordinary Trainer."""

import torch
from transformers import Trainer, TrainingArguments

from memlm.core.merges import Mixture
from memlm.memory.local import LocalMemory
from memlm.models.attach import MemoryForCausalLM, attach
from memlm.testing.tiny import tiny_model, tiny_tokens

from .memories import Fixed


def train(lm, out, steps: int = 8) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tiny_tokens(4, 10)]
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=lm, args=arguments, train_dataset=rows)
    trainer.train()
    return trainer


def test_the_loss_falls_and_the_checkpoint_loads(tmp_path):
    memory = LocalMemory(size=4, temperature=4.0)
    lm = attach(tiny_model(), memory, Mixture(0.2))
    trainer = train(lm, tmp_path / "run")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    trainer.save_model(str(tmp_path / "saved"))
    loaded = MemoryForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    tokens = tiny_tokens(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, lm.eval()(tokens).logits)


def test_training_with_an_idle_memory_is_training_the_base(tmp_path):
    alone, within = tiny_model(), tiny_model()
    train(alone, tmp_path / "a", steps=2)
    train(attach(within, Fixed(), Mixture(0.0)), tmp_path / "b", steps=2)
    for name, weight in within.state_dict().items():
        assert torch.equal(weight, alone.state_dict()[name]), name
