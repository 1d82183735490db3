"""TUPE on one page: what an encoder learns with positions added, and with positions apart. Offline.

Meant for the documentation that every Python carries. A vocabulary is learnt from its training
documents; then two encoders of one size read the same blocks with the same masks for as many steps:

    bert-r    positions added to the words, and relative buckets
    tupe-r    positions scored apart, [CLS] untied, and the buckets          (Ke et al. 2021)

Shown are their losses on masked tokens of held-out documents, words that they put into blanks, what
their heads do by position alone, and how well they tell, once fine-tuned, which part of the text a
held-out sentence is from: against the commonest part, and against an encoder that was not
pre-trained. One seed each, so small differences are luck.
"""

import copy
import re
from collections import Counter
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
CLASSES, SAMPLES, FEWEST = 6, 300, 8  # parts of the text; sentences to learn each from, to test on
EPOCHS, RATE = 4, 1e-3
BLANKS, WORDS = 5, (8, 16)  # sentences with a blank, and how long they may be

Say = Callable[[str], None]
Labelled = list[tuple[str, str]]


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
        parts: of the text, told apart after fine-tuning; empty if there were too few.
        accuracies: of telling them apart on held-out sentences: by scheme, "not pre-trained", and
            "commonest part"; empty likewise.
    """

    models: dict[str, TupeForMaskedLM]
    losses: dict[str, float]
    tokens: int
    steps: int
    labels: dict[str, tuple[str, ...]]
    blanks: list[Blank]
    parts: tuple[str, ...]
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
            lines += ["", f"which part is a held-out sentence from: {', '.join(self.parts)}?"]
            lines += [f"  {name:<16}{value:>7.1%}" for name, value in self.accuracies.items()]
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
        train_documents: to learn from; the first part of their names says what part they are of.
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
    seen = {text for _, text in learnt}
    held = [(part, text) for part, text in held if text not in seen]
    check(bool(learnt and held), "the text must have sentences to learn and to hold out, got none")
    tokenizer = train_sentence_tokenizer((text for _, text in learnt), VOCABULARY)
    tokens = [tokenize_sentences((text for _, text in part), tokenizer) for part in (learnt, held)]
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
    parts, accuracies = tell_apart(models, tokenizer, learnt, held, out / "parts", threads, say)
    found = TupeDemo(
        models,
        losses,
        run["tokens"],
        run["steps"],
        {name: one.labels for name, one in maps.items()},
        blanks,
        parts,
        accuracies,
    )
    write_json(
        out / "results.json",
        {name: value for name, value in found._asdict().items() if name != "models"}
        | {"blanks": [blank._asdict() for blank in blanks]},
    )
    return found


def sentences(documents: Iterable[Document]) -> Labelled:
    """Clean sentences, each with the part of the text it is from.

    The part is a document's name up to the first dot or slash: a module, a folder.
    """
    return [
        (re.split(r"[./]", document.name)[0], sentence)
        for document in documents
        for paragraph in prepare([document.text])
        for sentence in paragraph
    ]


@torch.inference_mode()
def fill(
    models: dict[str, TupeForMaskedLM],
    tokenizer: PreTrainedTokenizerBase,
    held: Labelled,
    prompt: str | None,
) -> list[Blank]:
    """The middle word of some held-out sentences, and the blank of the prompt, as guessed."""
    blanks = [] if prompt is None else [(prompt, "")]
    fitting = [words for _, text in held if WORDS[0] <= len(words := text.split()) <= WORDS[1]]
    for number in np.linspace(0, len(fitting) - 1, min(BLANKS, len(fitting))).astype(int):
        words = fitting[number]
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


def tell_apart(
    models: dict[str, TupeForMaskedLM],
    tokenizer: PreTrainedTokenizerBase,
    learnt: Labelled,
    held: Labelled,
    out: Path,
    threads: int | None,
    say: Say,
) -> tuple[tuple[str, ...], dict[str, float]]:
    """Fine-tune to the parts with the most sentences; the accuracy on held-out ones.

    Sentences that stand in several parts are left out.
    """
    known = Counter(part for part, _ in learnt)
    tested = Counter(part for part, _ in held)
    common = [part for part, count in known.most_common() if count >= FEWEST <= tested[part]]
    parts = tuple(common[:CLASSES])
    if len(parts) < 2:
        say(f"fewer than two parts of the text have {FEWEST} held-out sentences: no fine-tuning")
        return (), {}
    parts_of = Counter(text for _, text in {*learnt, *held})
    rows: dict[str, list[dict[str, str]]] = {}
    taken: Counter[str] = Counter()
    for split, labelled in (("train", learnt), ("validation", held)):
        rows[split] = []
        for part, text in labelled:
            limited = split == "train" and taken[part] >= SAMPLES
            if part in parts and parts_of[text] == 1 and not limited:
                taken[part] += 1
                rows[split].append({"sentence": text, "label": part})
    task = GlueTask("parts", ("sentence",), (0,), 1, parts)
    config = FinetuneConfig(
        task=task.name,
        learning_rates=(RATE,),
        seeds=(1,),
        epochs=EPOCHS,
        max_length=LENGTH,
        threads=threads,
    )
    say(f"fine-tuning on {len(rows['train']):,} sentences of {len(parts)} parts")
    accuracies = {}
    for name in (*models, "not pre-trained"):
        source = models.get(name)

        def make(labels: int, source: TupeForMaskedLM | None = source):
            first = models["tupe-r"] if source is None else source
            shape = copy.deepcopy(first.config)
            shape.num_labels = labels
            classifier = TupeForSequenceClassification(shape)
            if source is not None:
                classifier.tupe.load_state_dict(source.tupe.state_dict())
            return classifier

        table = finetune(make, tokenizer, rows, config, out / name, task=task, quiet=True)
        accuracies[name] = table["best"]["validation accuracy"]
    largest = Counter(row["label"] for row in rows["validation"]).most_common(1)[0][1]
    accuracies["commonest part"] = largest / len(rows["validation"])
    return parts, accuracies
