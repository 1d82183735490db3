"""The committed results as one Markdown page: ``python -m benchmarks.tables`` writes it.

One function a result; a result that is not there has no section.
"""

import json
import math
from typing import Any

from benchmarks.common import RESULTS, table
from benchmarks.training_tables import retro_fit, retro_training, trime_training, tupe_schemes

Result = dict[str, Any]


def imports(result: Result) -> list[str]:
    return [
        f"Import, {result['machine']['cores']} cores, {result['date']}: "
        f"`import memlm` {result['import_seconds'] * 1000:.0f} ms beyond Python's own start, "
        f"`memlm --help` {result['help_seconds'] * 1000:.0f} ms.",
    ]


def extraction(result: Result) -> list[str]:
    return [
        f"Extraction against the bare forward pass of the body, in turn, {result['windows']}, "
        f"{result['machine']['threads']} threads, median of "
        f"{result['cases'][0]['rounds']} rounds:",
        "",
        *table(
            ["extraction: model", "extraction tokens/s", "bare body tokens/s", "extraction / body"],
            [
                [
                    f"{case['parameters'] / 1e6:.1f} M parameters, {case['layers']} layers",
                    f"{case['extraction_tokens_per_second']:,.0f}",
                    f"{case['body_tokens_per_second']:,.0f}",
                    f"{case['extraction_speed_over_body']:.2f}",
                ]
                for case in result["cases"]
            ],
        ),
    ]


def evaluation(result: Result) -> list[str]:
    return [
        f"Evaluation of {result['tokens']:,} random tokens, made-up store (256 dimensions, "
        f"near a 24-dimensional surface), {result['model']}, k = {result['k']:,}, "
        f"{result['machine']['threads']} threads, median of "
        f"{result['cases'][0]['rounds']} rounds; the floor is the operations of the products "
        "and the bytes of the keys at this machine's measured speeds:",
        "",
        *table(
            [
                "evaluation: entries",
                "index",
                "recall@1024",
                "kNN-LM time / base time",
                "ms per query",
                "search / floor",
            ],
            [
                [
                    f"{case['entries']:,}",
                    case["index"],
                    f"{case['recall']:.2f}",
                    f"{case['knn_over_base']:.1f}",
                    f"{case['milliseconds_per_query']:.2f}",
                    f"{case['search_over_floor']:.2f}" if "search_over_floor" in case else "-",
                ]
                for case in result["cases"]
            ],
        ),
    ]


def automaton(result: Result) -> list[str]:
    return [
        "RetoMaton's step (pointers and clusters to about 1,024 entries, no search) against a loop "
        f"over the same entries, {result['dim']} dimensions, {result['machine']['threads']} "
        "threads:",
        "",
        *table(
            ["step: rows", "keys", "loop ms", "vectorised ms", "ratio"],
            [
                [
                    str(step["rows"]),
                    step["keys"],
                    f"{step['plain_milliseconds']:.1f}",
                    f"{step['vectorised_milliseconds']:.2f}",
                    f"{step['speed_up']:.1f}",
                ]
                for step in result["steps"]
            ],
        ),
        "",
        f"RetoMaton (`min_knns=1`) against kNN-LM, token by token as in generation, made-up text, "
        f"{result['dim']} dimensions, k = {result['k']:,}, {result['tokens']} tokens a sequence, "
        f"{result['machine']['threads']} threads, in turn; below 1 walking loses:",
        "",
        *table(
            [
                "walk: entries",
                "index",
                "recall@1024",
                "sequences",
                "clusters",
                "saved",
                "kNN-LM ms/token",
                "RetoMaton ms/token",
                "ratio",
            ],
            [
                [
                    f"{case['entries']:,}",
                    case["index"],
                    f"{case['recall']:.2f}",
                    str(case["rows"]),
                    f"{case['clusters']:,}",
                    f"{case['saved']:.0%}",
                    f"{case['knn_milliseconds']:.2f}",
                    f"{case['retomaton_milliseconds']:.2f}",
                    f"{case['speed_up']:.2f}",
                ]
                for case in result["walks"]
            ],
        ),
    ]


def retomaton(result: Result) -> list[str]:
    rows = []
    for case in result["cases"]:
        for method in dict.fromkeys(point["method"] for point in case["points"]):
            points = [point for point in case["points"] if point["method"] == method]
            full = min(points, key=lambda point: point["saved"])
            half = min(points, key=lambda point: abs(point["saved"] - 0.5))
            rows.append(
                [
                    case["case"],
                    f"{case['base']['perplexity']:.2f}",
                    method,
                    *(
                        f"{point['perplexity']:.2f} ({point['saved']:.2f})"
                        for point in (full, half)
                    ),
                ]
            )
    return [
        f"Perplexity and, in brackets, the fraction of saved searches ({result['windows']}; "
        "protocol of every number in `retomaton.json`):",
        "",
        *table(["case", "base", "method", "none saved", "about half saved"], rows),
    ]


def lminfinite_lengths(result: Result) -> list[str]:
    lines: list[str] = []
    for title, curve in sorted(result["curves"].items()):
        config = curve["config"]
        rows = [
            [
                method,
                *(
                    next(
                        (
                            f"{point['perplexity']:,.2f}"
                            for point in curve["points"]
                            if (point["method"], point["length"]) == (method, length)
                        ),
                        "-",
                    )
                    for length in config["lengths"]
                ),
            ]
            for method in config["methods"]
        ]
        head = ["length", *(f"{length:,}" for length in config["lengths"])]
        lines += ["", f"{title}: {curve['protocol']}:", "", *table(head, rows)]
    return lines[1:]


def lminfinite_stream(result: Result) -> list[str]:
    points = result["points"]
    rows = [
        [
            f"{point['tokens']:,}",
            f"{math.exp(point['nll']):.2f}",
            f"{point['recent_perplexity']:.2f}",
            f"{point['milliseconds_per_token']:.2f}",
            f"{point['cache_bytes'] / 1e6:.2f}",
            f"{point['process_bytes'] / 1e6:,.0f}",
        ]
        for point in points
    ]
    return [
        f"A stream read by {result['model']} ({result['corpus']}, window {result['window']}, "
        f"{result['sinks']} sinks, chunks of {result['chunk']:,} tokens):",
        "",
        *table(["tokens", "perplexity", "of the stretch", "ms/token", "cache MB", "peak MB"], rows),
    ]


def lminfinite_speed(result: Result) -> list[str]:
    rows = []
    for length in (8192, 32_768):
        for name, against in result[f"prefill_{length}"].items():
            low, high = against["ratio_range"]
            rows.append(
                [
                    f"prefill of {length:,} {name.replace('_', ' ')}",
                    f"{against['ratio']:.2f}",
                    f"{low:.2f}-{high:.2f}",
                    str(against["rounds"]),
                ]
            )
    low, high = result["step"]["ratio_range"]
    rows.append(
        [
            "a step on the ring over one that joins and rotates",
            f"{result['step']['ratio']:.2f}",
            f"{low:.2f}-{high:.2f}",
            str(result["step"]["rounds"]),
        ]
    )
    return [
        f"LM-Infinite, {result['layers']} layers of {result['heads']} heads x "
        f"{result['head_dim']}, window {result['window']:,}, {result['sinks']} sinks, "
        f"{result['machine']['threads']} thread(s), in turn:",
        "",
        *table(["lm-infinite: time", "ratio", "range", "rounds"], rows),
    ]


def lminfinite_compiled(result: Result) -> list[str]:
    rows = []
    for name in ("plain", "soft-cap", "padding"):
        for length in (4096, 16_384):
            row = result[f"{name}_{length}"]
            timed, (low, high) = row["flex_over_auto"], row["flex_over_auto"]["ratio_range"]
            ratio = f"{timed['ratio']:.2f} ({low:.2f}-{high:.2f})"
            rows.append([name, f"{length:,}", ratio, f"{row['first_call_seconds']:.1f}"])
    return [
        f"Compiled FlexAttention of LM-Infinite over what a CPU uses instead, one layer of "
        f"{result['heads']} heads x {result['head_dim']}, window {result['window']:,}, "
        f"{result['sinks']} sinks, {result['machine']['threads']} thread(s), in turn:",
        "",
        *table(["", "tokens", "time ratio (range)", "first call, s"], rows),
    ]


def lminfinite_middle(result: Result) -> list[str]:
    rows = []
    for row in result["rows"]:
        low, high = row["ratio_range"]
        rows.append(
            [
                row["case"],
                f"{row['position']:,}",
                f"{row['milliseconds']:.2f}",
                f"{row['plain_milliseconds']:.2f}",
                f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})",
                f"{row['bytes']['device'] / 1e6:.1f}",
                f"{row['bytes']['cpu'] / 1e6:.1f}",
            ]
        )
    return [
        f"Middle tokens of LM-Infinite, {result['layers']} layers of {result['heads']} heads x "
        f"{result['head_dim']}, window {result['window']:,}, {result['sinks']} sinks, "
        f"{result['machine']['threads']} thread(s), 50 steps a round in turn, "
        f"{result['rounds']} rounds; memory of the cache:",
        "",
        *table(
            ["middle tokens", "position", "ms/token", "without", "ratio (range)", "device MB",
             "offloaded MB"],
            rows,
        ),
    ]  # fmt: skip


def passkey(result: Result) -> list[str]:
    methods = result["methods"]
    lengths = next(iter(methods.values()))["config"]["lengths"]
    rows = []
    for name, found in methods.items():
        row = [name]
        for length in lengths:
            shares = [point["accuracy"] for point in found["points"] if point["length"] == length]
            row.append(f"{sum(shares) / len(shares):.0%}")
        rows.append(row)
    return [
        f"Passkeys found by a model trained on {result['trained_length']} tokens, window "
        f"{result['window']}, {result['sinks']} sinks, mean over depths ("
        f"{next(iter(methods.values()))['protocol']}):",
        "",
        *table(["method", *(f"{length:,} tokens" for length in lengths)], rows),
    ]


def diagnosis(result: Result) -> list[str]:
    lines: list[str] = []
    for name in ("stories260K", "tinystories-656k"):
        tried = result[name]["recommendation"]
        config, chosen = tried["config"], tried["chosen"]
        losses = {(one["window"], one["sinks"]): one["nll"] for one in tried["settings"]}
        rows = [
            [str(window), *(f"{losses[window, sinks]:.3f}" for sinks in config["sinks"])]
            for window in config["windows"]
        ]
        head = ["window", *(f"{sinks} sinks" for sinks in config["sinks"])]
        lines += [
            "",
            f"{name}: {tried['protocol']}; recommended: window {chosen['window']}, "
            f"{chosen['sinks']} sinks; the model as it is: {tried['vanilla']:.3f}:",
            "",
            *table(head, rows),
        ]
    return lines[1:]


def ten_million(result: Result) -> list[str]:
    recall = result["recall"]
    return [
        f"{result['factory']} over {result['entries']:,} keys of {result['dim']} dimensions, one "
        "thread, processor time:",
        "",
        *table(
            ["ten million keys", "planned", "measured"],
            [
                ["bytes", f"{result['planned_bytes']:,}", f"{result['bytes']:,}"],
                [
                    "seconds to build",
                    f"{result['planned_seconds']:,.0f}",
                    f"{result['build_processor_seconds']:,.0f}",
                ],
                ["most resident while building", "", f"{result['peak_gigabytes']:.1f} GB"],
                ["ms a search", "", f"{result['milliseconds_per_search']:.1f}"],
                [f"recall@{recall['k']}", "", f"{recall['value']:.2f}"],
            ],
        ),
    ]


def untied_attention(result: Result) -> list[str]:
    return [
        f"Untied positions (TUPE), {result['machine']['threads']} thread(s). {result['protocol']}",
        "",
        *table(
            ["positions: case", "tokens", "step", "seconds", "peak MB"],
            [
                [
                    row["case"],
                    f"{row['length']:,}",
                    "training" if row["learning"] else "forward",
                    f"{row['seconds']:.2f}",
                    f"{row['peak_megabytes']:,.0f}",
                ]
                for row in result["rows"]
            ],
        ),
    ]


def retro(result: Result) -> list[str]:
    ours = result["seconds_per_token"]["ours"]
    rows = [
        [f"a token behind {n}", f"{1000 * ours[n]:.1f} ms", f"{result['ratio_per_token'][n]:.1f}"]
        for n in ours
    ]
    if "ratio_seconds" in result:
        step = result["training_step"]["ours"]
        rows = [
            ["training step", f"{step['seconds']:.2f} s", f"{result['ratio_seconds']:.2f}"],
            ["its memory", f"{step['megabytes']:,.0f} MB", f"{result['ratio_megabytes']:.2f}"],
            *rows,
        ]
    return [
        f"RETRO against {result['compared_with']}, {result['machine']['threads']} thread(s), the "
        "same configuration (in the benchmark); above 1 this library needs less:",
        "",
        *table(["RETRO: what", "here", f"{result['compared_with']} / here"], rows),
    ]


def trime(result: Result) -> list[str]:
    training, grouping = result["training"], result["grouping"]
    return [
        "Training with TRIME's memories against plain cross-entropy, "
        f"{training['machine']['threads']} thread(s), in turn; the floor is the operations of the "
        "products at this machine's measured speed:",
        "",
        *table(
            ["TRIME: memories", "time / CE", "floor / CE", "peak MB", "peak MB of CE"],
            [
                [
                    f"{row['memories']:,}",
                    f"{row['ratio']:.2f}",
                    f"{row['floor_ratio']:.2f}",
                    f"{row['trime_peak_mb']:,.0f}",
                    f"{row['ce_peak_mb']:,.0f}",
                ]
                for row in training["rows"]
            ],
        ),
        "",
        "BM25 neighbours (20 each) and the chain of blocks of "
        f"{grouping['rows'][0]['block_tokens']} tokens in seconds of processor time, "
        f"{grouping['machine']['threads']} thread(s); one by one: bm25s asked for one block after "
        "another, from 50 of them:",
        "",
        *table(
            ["grouping: blocks", "seconds", "chain seconds", "peak MB", "one by one, seconds"],
            [
                [
                    f"{row['blocks']:,}",
                    f"{row['neighbour_seconds']:,.1f}",
                    f"{row['chain_seconds']:.2f}",
                    f"{row['peak_mb']:,.0f}",
                    f"{row['one_by_one_seconds']:,.0f}",
                ]
                for row in grouping["rows"]
            ],
        ),
    ]


SECTIONS = {
    "import": imports,
    "extraction": extraction,
    "evaluation": evaluation,
    "automaton": automaton,
    "automaton-10m": automaton,
    "ten-million": ten_million,
    "retomaton": retomaton,
    "untied_attention": untied_attention,
    "trime": trime,
    "retro": retro,
    "trime_training": trime_training,
    "retro_training": retro_training,
    "retro_fit": retro_fit,
    "tupe_schemes": tupe_schemes,
    "lminfinite_lengths": lminfinite_lengths,
    "lminfinite_stream": lminfinite_stream,
    "lminfinite_speed": lminfinite_speed,
    "passkey": passkey,
    "diagnosis": diagnosis,
    "lminfinite_compiled": lminfinite_compiled,
    "lminfinite_middle": lminfinite_middle,
}


def main():
    lines = [
        "# Results",
        "",
        "One benchmark a file, `python -m benchmarks.bench_<name>`; `make bench` runs those that "
        "need no data. The JSON files beside this hold everything, the machine included.",
    ]
    for name, section in SECTIONS.items():
        file = RESULTS / f"{name}.json"
        if file.exists():
            lines += ["", *section(json.loads(file.read_text(encoding="utf-8")))]
    (RESULTS / "README.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
