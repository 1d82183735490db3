"""kNN-LM on your own text: a model, some text, and what changes when the two meet.

    python examples/knn_lm_on_your_text.py MODEL TEXT [PROMPT]

MODEL is the folder or Hub id of a Hugging Face causal language model, TEXT a file or a folder.
Without arguments nothing is downloaded: a small model is trained on the spot (a few seconds) on
documentation that every Python carries, and then remembers the same documents.
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import memlm
from memlm.data.python_library import python_library
from memlm.models.taps import forward_to_tap


def small_model(documents: list[memlm.Document], out: Path):
    tokenizer = memlm.train_tokenizer(documents, vocab_size=1000)
    corpus = memlm.tokenize(documents, tokenizer)
    config = memlm.TrainConfig(
        hidden_size=64,
        layers=2,
        intermediate_size=128,
        block_length=64,
        batch_tokens=512,
        max_steps=80,
    )
    return memlm.train_causal_lm(corpus, tokenizer, config, out), tokenizer


def complete(model, tokenizer, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(
        **inputs.to(model.device),
        max_new_tokens=30,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return " ".join(tokenizer.decode(tokens[0], skip_special_tokens=True).split())


def main(arguments: list[str], out: Path) -> None:
    if arguments:
        name, text, *rest = arguments
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
        prompt = rest[0] if rest else "The first thing to know is"
    else:
        text = python_library().train[100:180]
        model, tokenizer = small_model(text, out / "model")
        prompt = "Return True if"

    # Read the text once. Interrupted, this line goes on where it stopped.
    store = memlm.build_datastore(model, tokenizer, text, out / "store")
    print(f"{len(store):,} entries of {store.dim} dimensions")

    # A memory over it, and a model that asks it at every token.
    memory = memlm.KnnMemory(store, k=min(64, len(store)), temperature="auto")
    lm = memlm.attach(model, memory, merge=memlm.Mixture(lam=0.5))

    print("\n--- without memory ---\n" + complete(model, tokenizer, prompt))
    print("\n--- with memory ---\n" + complete(lm, tokenizer, prompt))

    # Which entries spoke for the next token, and where do they come from?
    names = [document.name for document in memlm.read_documents(text)]
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    query = forward_to_tap(model, lm.tap, ids)[:, -1]
    candidates, _ = memory.read(query)
    print("\nnearest entries for the token after the prompt:")
    for entry, token in zip(candidates.ids[0, :5], candidates.tokens[0, :5], strict=True):
        name, place = names[store.documents[entry]], int(store.positions[entry])
        print(f"  {tokenizer.decode([int(token)])!r:12} {name}, token {place}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1:], Path("stores/knn-lm-example") if sys.argv[1:] else Path(folder))
