"""TUPE on one page: what an encoder learns with positions added, and with positions apart. Offline.

Meant for the documentation that every Python carries. A vocabulary is learnt from its training
documents; then two encoders of one size read the same blocks with the same masks for as many steps:

    bert-r    positions added to the words, and relative buckets
    tupe-r    positions scored apart, [CLS] untied, and the buckets          (Ke et al. 2021)

Shown are their losses on masked tokens of held-out documents, words that they put into blanks, what
their heads do by position alone, and how well they tell, once fine-tuned, whether the words of a
held-out sentence were shuffled, as in half of them: against guessing, and against an encoder that
was not pre-trained. One seed each, so small differences are luck.
"""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from memlm.core.config import check
from memlm.core.errors import MissingExtraError
from memlm.core.files import read_json, write_json
from memlm.core.threads import torch_threads
from memlm.data.cleaning import prepare
from memlm.data.documents import Document
from memlm.data.glue import GlueTask
from memlm.models.tupe.heads import TupeForMaskedLM, TupeForSequenceClassification
from memlm.models.tupe.maps import draw_maps, position_maps
from memlm.training.finetune import finetune
from memlm.training.finetune_config import FinetuneConfig
from memlm.training.masked_lm import tokenize_sentences, train_masked_lm
from memlm.training.masked_lm_config import MaskedLMConfig
from memlm.training.sentence_tokenizer import train_sentence_tokenizer

SCHEMES = ("bert-r", "tupe-r")
VOCABULARY, LENGTH, BATCH = 2048, 128, 1024
SAMPLES, TESTED, EPOCHS, RATE = 2000, 500, 3, 1e-3  # of fine-tuning
FRESH = "tupe-r, not pre-trained"
SHORTEST, LONGEST = 6, 40  # words of its sentences
BLANKS, WORDS = 5, (8, 16)  # sentences with a blank, and how long they may be

Say = Callable[[str], None]


class Blank(NamedTuple):
    """A sentence with one word taken out.

    Attributes:
        sentence: with ``<mask>`` for the word.
        word: that was there; empty if unknown.
        guesses: by scheme, the three likeliest, best first.
    """

    sentence: str
    word: str
    guesses: dict[str, list[str]]


class TupeDemo(NamedTuple):
    """What came out.

    Attributes:
        models: by scheme, in evaluation mode.
        losses: by scheme, nats per masked token of held-out text.
        tokens: that each training predicted, in ``steps`` steps.
        steps: alike.
        labels: by scheme, what every head does by position alone.
        blanks: filled by both.
        accuracies: of telling shuffled held-out sentences, by scheme, and of a TUPE-R that was not
            pre-trained; empty if there were no sentences for it.
    """

    models: dict[str, TupeForMaskedLM]
    losses: dict[str, float]
    tokens: int
    steps: int
    labels: dict[str, tuple[str, ...]]
    blanks: list[Blank]
    accuracies: dict[str, float]

    def describe(self) -> str:
        """Everything as lines to print, with its protocol."""
        lines = [f"{'':<8}{'loss':>8}{'perplexity':>12}  heads by position alone"]
        lines += [
            f"{name:<8}{loss:>8.3f}{np.exp(loss):>12.1f}  {', '.join(self.labels[name])}"
            for name, loss in self.losses.items()
        ]
        lines.append(
            f"masked tokens of held-out documents, nats; learnt from {self.tokens:,} masked tokens "
            f"in {self.steps:,} steps"
        )
        for blank in self.blanks:
            lines += ["", blank.sentence.replace("<mask>", "____")]
            lines += [f"  {name}: {', '.join(words)}" for name, words in blank.guesses.items()]
            if blank.word:
                lines.append(f"  it was: {blank.word}")
        if self.accuracies:
            lines += ["", "a held-out sentence, or its words shuffled? (right answers)"]
            lines += [f"  {name:<24}{value:>7.1%}" for name, value in self.accuracies.items()]
        return "\n".join(lines)


def demo(
    out: str | Path,
    train_documents: list[Document],
    test_documents: list[Document],
    *,
    seconds: float = 110.0,
    prompt: str | None = None,
    threads: int | None = None,
    say: Say = lambda line: None,
    **changes: Any,
) -> TupeDemo:
    """The whole way, in ``out``; what is there from an earlier call is used again.

    Args:
        out: directory of models, picture and results.
        train_documents: to learn from.
        test_documents: held out.
        seconds: of the first pre-training; the second takes as many steps.
        prompt: a sentence with ``<mask>`` for a word, to fill beside held-out ones.
        threads: CPU threads; None: as they are.
        say: told what happens, line by line.
        changes: to the settings of the pre-trainings, see `MaskedLMConfig`.

    Raises:
        InputError: if there is too little text, or a prompt without ``<mask>``.
    """
    out = Path(out)
    check(
        prompt is None or prompt.count("<mask>") == 1,
        f"the prompt must hold <mask> once, for the word to fill in, got {prompt!r}",
    )
    learnt, held = sentences(train_documents), sentences(test_documents)
    seen = set(learnt)
    held = [sentence for sentence in held if sentence not in seen]
    check(bool(learnt and held), "the text must have sentences to learn and to hold out, got none")
    tokenizer = train_sentence_tokenizer(learnt, VOCABULARY)
    tokens = [tokenize_sentences(part, tokenizer) for part in (learnt, held)]
    say(f"{len(learnt):,} sentences to learn from, {len(held):,} held out")
    settings: dict[str, Any] = {
        "block_length": LENGTH,
        "batch_tokens": BATCH,
        "optimizer": "muon",
        "dropout": 0.0,
        "mask_prob": 0.3,
        "warmup_steps": 20,
        "threads": threads,
        **changes,
    }
    limit: dict[str, Any] = {"max_seconds": seconds}
    models, losses, run = {}, {}, {}
    for scheme in SCHEMES:
        config = MaskedLMConfig(scheme=scheme, **limit, **settings)
        say(f"pre-training {scheme}")
        models[scheme] = train_masked_lm(
            tokens[0], tokenizer, config, out / scheme, held_out=tokens[1], resume=True
        )
        run = read_json(out / scheme / "training.json")
        losses[scheme] = run["held_out"]["loss"]
        limit = {"max_steps": run["steps"]}
    with torch_threads(threads):
        maps = {name: position_maps(model, min(64, LENGTH)) for name, model in models.items()}
        blanks = fill(models, tokenizer, held, prompt)
    picture = out / "tupe-r.png"
    try:
        draw_maps(maps["tupe-r"], picture)
        say(f"drawn: {picture}")
    except MissingExtraError as error:
        say(str(error))
    accuracies = tell_shuffled(models, tokenizer, learnt, held, out / "order", threads, say)
    found = TupeDemo(
        models,
        losses,
        run["tokens"],
        run["steps"],
        {name: one.labels for name, one in maps.items()},
        blanks,
        accuracies,
    )
    write_json(
        out / "results.json",
        {name: value for name, value in found._asdict().items() if name != "models"}
        | {"blanks": [blank._asdict() for blank in blanks]},
    )
    return found


def sentences(documents: Iterable[Document]) -> list[str]:
    """Clean sentences, each once."""
    paragraphs = prepare(document.text for document in documents)
    return list(dict.fromkeys(sentence for paragraph in paragraphs for sentence in paragraph))


@torch.inference_mode()
def fill(
    models: dict[str, TupeForMaskedLM],
    tokenizer: PreTrainedTokenizerBase,
    held: list[str],
    prompt: str | None,
) -> list[Blank]:
    """The middle word of some held-out sentences, and the blank of the prompt, as guessed."""
    blanks = [] if prompt is None else [(prompt, "")]
    fitting = [
        words
        for text in held
        if WORDS[0] <= len(words := text.removesuffix(" .").split()) <= WORDS[1]
        and all(map(str.isalpha, words))
    ]
    for number in np.linspace(0, len(fitting) - 1, min(BLANKS, len(fitting))).astype(int):
        words = [*fitting[number], "."]
        middle = len(words) // 2
        blanks.append((" ".join([*words[:middle], "<mask>", *words[middle + 1 :]]), words[middle]))
    found = []
    for sentence, word in blanks:
        ids = torch.tensor([tokenizer(sentence)["input_ids"]])
        place = ids[0].tolist().index(tokenizer.mask_token_id)
        guesses = {
            name: [
                str(tokenizer.decode([token])).strip()
                for token in model(ids).logits[0, place].topk(3).indices.tolist()
            ]
            for name, model in models.items()
        }
        found.append(Blank(sentence, word, guesses))
    return found


def tell_shuffled(
    models: dict[str, TupeForMaskedLM],
    tokenizer: PreTrainedTokenizerBase,
    learnt: list[str],
    held: list[str],
    out: Path,
    threads: int | None,
    say: Say,
) -> dict[str, float]:
    """Fine-tune to tell sentences whose words are shuffled; accuracy on held-out ones."""
    rows = {"train": shuffled(learnt, SAMPLES), "validation": shuffled(held, TESTED)}
    if not all(rows.values()):
        say(f"no sentences of {SHORTEST} words to shuffle: no fine-tuning")
        return {}
    task = GlueTask("order", ("sentence",), (0,), 1, ("as it was", "shuffled"))
    config = FinetuneConfig(
        task=task.name,
        learning_rates=(RATE,),
        seeds=(1,),
        epochs=EPOCHS,
        max_length=LENGTH,
        threads=threads,
    )
    accuracies = {}
    for name in (*models, FRESH):
        source = models.get(name)

        def make(labels: int, source: TupeForMaskedLM | None = source):
            first = models["tupe-r"] if source is None else source
            shape = copy.deepcopy(first.config)
            shape.num_labels = labels
            classifier = TupeForSequenceClassification(shape)
            if source is not None:
                classifier.tupe.load_state_dict(source.tupe.state_dict())
            return classifier

        say(f"fine-tuning on {len(rows['train']):,} sentences: {name}")
        table = finetune(make, tokenizer, rows, config, out / name, task=task, quiet=True)
        accuracies[name] = table["best"]["validation accuracy"]
    return accuracies


def shuffled(texts: list[str], most: int) -> list[dict[str, str]]:
    """Sentences with their label; in every second one the words but the last are shuffled."""
    draw = np.random.default_rng(0)
    fitting = [words for text in texts if SHORTEST <= len(words := text.split()) <= LONGEST]
    rows = []
    for number, place in enumerate(draw.permutation(len(fitting))[:most]):
        *words, last = fitting[place]
        if number % 2:
            words = [words[i] for i in draw.permutation(len(words))]
        label = "shuffled" if number % 2 else "as it was"
        rows.append({"sentence": " ".join([*words, last]), "label": label})
    return rows
