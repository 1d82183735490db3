"""LM-Infinite on real models: perplexity against length, a long stream, and what it costs.

``--part lengths``: two small models that were trained on 512 tokens, on stories like those of their
training and on novels, at 512 to 32768 tokens, by every method; the last tokens of each piece are
the same at all lengths. ``--part stream``: one million tokens of novels. ``--part speed``: prefill
over the same model's plain window and over its own causal attention, in pairs; a decoding step on
the ring over one that joins, rotates and cuts all held keys, and against the position. ``--part
compiled``: one layer's attention by compiled FlexAttention over what is used instead: tiles, and
blocks where there is a soft-cap or padding; and what the first call takes.
"""

import argparse
import copy
import json
import lzma
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.common import RESULTS, paired, save, seconds
from memlm.core.threads import torch_threads
from memlm.data.documents import Document, read_documents
from memlm.data.tokens import TokenCorpus, tokenize
from memlm.evaluation.length import LengthConfig, LengthCurve, measure_lengths, plot
from memlm.evaluation.report import plain
from memlm.evaluation.streaming import shuffled_epochs, stream_perplexity
from memlm.models.extend import extended
from memlm.models.window_cache import WindowLayer
from memlm.ops.lambda_rule import Keys, LambdaConfig, first_keys
from memlm.ops.window_attention import window_attention

TRAINED = 512
MODELS, CORPORA = ("stories260K", "tinystories-656k"), ("stories", "gutenberg")
METHODS = ("vanilla", "truncation", "window", "streaming-llm", "lm-infinite", "yarn")


def load(data: Path, name: str) -> tuple[Any, Any]:
    folder = data / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def texts(data: Path, corpus: str, characters: int) -> list[Document]:
    if corpus == "stories":
        path = data / "tinystories" / "tinystories_sample.txt.xz"
        found = list(read_documents(path, separator="<|endoftext|>"))
    else:
        with lzma.open(data / "gutenberg" / "books.jsonl.xz", "rt", encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        found = [Document(str(n), record["text"]) for n, record in enumerate(records)]
    chosen, room = [], characters
    for document in found:
        if room > 0:
            chosen.append(Document(document.name, document.text[:room]))
            room -= len(document.text)
    return chosen


def lengths(options: argparse.Namespace) -> None:
    for name in options.models:
        model, tokenizer = load(options.data, name)
        for corpus in options.corpora:
            tokens = tokenize(texts(options.data, corpus, 600_000), tokenizer).tokens
            for window in (TRAINED // 2, TRAINED):
                config = LengthConfig(
                    lengths=tuple(options.lengths),
                    window=window,
                    sinks=10,
                    methods=METHODS if window == TRAINED else ("window", "lm-infinite"),
                    pieces=options.pieces,
                    scored=128,
                    full_limit=options.full_limit,
                )
                curve = measure_lengths(model, tokens, config, progress=False)
                keep(f"{name}, {corpus}, window {window}", curve)


def keep(title: str, curve: LengthCurve) -> None:
    """Add a curve to those of earlier runs, and draw all again: a run takes minutes."""
    path = RESULTS / "lminfinite_lengths.json"
    curves = json.loads(path.read_text(encoding="utf-8"))["curves"] if path.exists() else {}
    curves[title] = curve.to_dict()
    print(title, plain(curve.table()), sep="\n", flush=True)
    save("lminfinite_lengths", {"curves": curves})
    drawn = {
        title: LengthCurve.from_dict(values)
        for title, values in sorted(curves.items())
        if values["config"]["window"] == TRAINED
    }
    if drawn:
        plot(drawn, str(RESULTS / "lminfinite_lengths.svg"))


def documents_of(corpus: TokenCorpus) -> list[list[int]]:
    cuts = corpus.offsets.tolist()
    return [corpus.tokens[a:b].tolist() for a, b in pairwise(cuts)]


def stream(options: argparse.Namespace) -> None:
    model, tokenizer = load(options.data, "stories260K")
    corpus = tokenize(texts(options.data, "gutenberg", 10**9), tokenizer, begin=False)
    tokens = shuffled_epochs(documents_of(corpus), begin_token=tokenizer.bos_token_id)
    points = []
    with extended(model, window=TRAINED, sinks=10):
        for point in stream_perplexity(model, tokens, until=options.tokens, progress=False):
            points.append({**asdict(point), "recent_perplexity": point.recent_perplexity})
            save(
                "lminfinite_stream",
                {"model": "stories260K", "corpus": "gutenberg", "window": TRAINED, "sinks": 10,
                 "chunk": 4096, "points": points},
            )  # fmt: skip


def speed(options: argparse.Namespace) -> None:
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    twin = LlamaForCausalLM(copy.deepcopy(config)).eval()
    twin.load_state_dict(model.state_dict())
    plain_window = LlamaForCausalLM(copy.deepcopy(config)).eval()
    plain_window.load_state_dict(model.state_dict())
    result: dict[str, Any] = {"layers": 2, "heads": 4, "head_dim": 64, "window": 1024, "sinks": 10}
    with (
        torch.inference_mode(),
        extended(model, window=1024, sinks=10),
        extended(plain_window, window=1024, sinks=0),
    ):
        for length, rounds in ((8192, 5), (32_768, 3)):
            tokens = torch.randint(0, 512, (1, length))

            def prefill(which: Any, tokens: torch.Tensor = tokens) -> None:
                which.model(tokens, use_cache=False)

            result[f"prefill_{length}"] = {
                "over_plain_window": paired(
                    lambda: prefill(model), lambda: prefill(plain_window), rounds=rounds
                ),
                "over_full_causal": paired(
                    lambda: prefill(model), lambda: prefill(twin), rounds=1, warm_up=0
                ),
            }
        result["decode_milliseconds_at_position"] = decode(model)
    result["step"] = step(model)
    save("lminfinite_speed", result)


def decode(model: Any) -> dict[int, float]:
    """Median milliseconds of a token after ever more tokens."""
    times: dict[int, float] = {}
    cache, at = None, 0
    for position in (2048, 8192, 32768):
        while at < position:
            count = min(4096, position - at)
            cache = model.model(torch.randint(0, 512, (1, count)), past_key_values=cache,
                                use_cache=True).past_key_values  # fmt: skip
            at += count
        token = torch.zeros(1, 1, dtype=torch.long)
        spent = sorted(
            seconds(lambda: model.model(token, past_key_values=cache, use_cache=True))  # noqa: B023
            for _ in range(100)
        )
        at += 100
        times[position] = 1000 * spent[50]
    return times


def step(model: Any) -> dict[str, Any]:
    """One token in one layer of 4 heads x 64: the ring, and joining and rotating what is held."""
    config = LambdaConfig(window=1024, sinks=10, distance_limit=1024)
    rotary = model.model.rotary_emb

    def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = (part[:, None] for part in rotary(x, positions))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def new(at: int, count: int) -> Keys:
        places = torch.arange(at, at + count)[None]
        return Keys(torch.randn(1, 4, count, 64), torch.randn(1, 4, count, 64), places)

    with torch.inference_mode():
        layer, begun = WindowLayer(config), new(0, 4096)
        layer.update(begun.key, begun.value)
        layer.attend(torch.randn(1, 4, 4096, 64), begun, rotate=rotate)
        sinks, held = first_keys(begun, 10), [begun.narrow(4096 - 1023, 4096)]
        query, places = torch.randn(1, 4, 1, 64), iter(range(4096, 10**9))
        others = iter(range(4096, 10**9))

        def ring() -> None:
            token = new(next(places), 1)
            layer.update(token.key, token.value)
            layer.attend(query, token, rotate=rotate)

        def joined() -> None:
            token = new(next(others), 1)
            keys = Keys(*(torch.cat(parts, dim=2) for parts in zip(held[0][:2], token[:2],
                        strict=True)), torch.cat([held[0][2], token[2]], dim=1))  # fmt: skip
            window_attention(
                query, token.positions, keys, sinks, config, rotate=rotate, impl="blocked"
            )
            held[0] = keys.narrow(1, 1024)

        return paired(
            lambda: [ring() for _ in range(50)],
            lambda: [joined() for _ in range(50)],
            rounds=7,
        )


def compiled(options: argparse.Namespace) -> None:
    """One layer of 4 heads x 64, window 1024, 10 sinks."""
    config, dim = LambdaConfig(window=1024, sinks=10, distance_limit=1024), 64
    steps = 10_000.0 ** -(torch.arange(dim // 2) / (dim // 2))

    def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None, :, None] * steps
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    result: dict[str, Any] = {"heads": 4, "head_dim": dim, "window": 1024, "sinks": 10}
    cases = {"plain": {}, "soft-cap": {"softcap": 30.0}, "padding": {}}
    for name, extra in cases.items():
        for length in (4096, 16_384):
            places = torch.arange(length)[None]
            if name == "padding":
                places = torch.cat([places[:, :1] - 1, places[:, :-1]], dim=1)
            parts = [torch.randn(1, 4, length, dim) for _ in range(3)]
            keys = Keys(parts[1], parts[2], places)
            sinks = first_keys(keys, 10)
            attend = partial(
                window_attention, parts[0], places, keys, sinks, config, rotate=rotate, **extra
            )
            with torch.inference_mode():
                first = seconds(partial(attend, impl="flex"))
                timed = paired(
                    partial(attend, impl="flex"), attend, rounds=5 if length < 8192 else 3
                )
            result[f"{name}_{length}"] = {"first_call_seconds": first, "flex_over_auto": timed}
            print(name, length, f"{first:.1f} s at first,", f"{timed['ratio']:.2f}", flush=True)
    save("lminfinite_compiled", result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of corpora and models")
    parser.add_argument("--part", nargs="+", default=["lengths", "stream", "speed"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--corpora", nargs="+", default=list(CORPORA))
    parser.add_argument("--full-limit", type=int, help="longest piece for full attention")
    parser.add_argument("--pieces", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    options = parser.parse_args()
    parts = {"lengths": lengths, "stream": stream, "speed": speed, "compiled": compiled}
    with torch_threads(options.threads):
        for name in options.part:
            parts[name](options)


if __name__ == "__main__":
    main()
