"""Tables of what was trained and measured, for `benchmarks.tables`."""

from typing import Any

from benchmarks.common import table

Result = dict[str, Any]


def trime_training(result: Result) -> list[str]:
    columns = [
        "alone", "cache", "local", "local+long", "local+long+ext", "local+long,mixed", "kNN-LM"
    ]  # fmt: skip
    rows = []
    for name, run in result["runs"].items():
        found = run["rows"]
        rows.append([name, *(_perplexity(found[c]) if c in found else "" for c in columns)])
    return [
        f"One small Llama trained on {result['protocol']['tokens']:,} tokens of Wikipedia articles "
        "by four objectives, read with memories whose settings were chosen on other articles; "
        "perplexity of held-out articles (95 % intervals over articles):",
        "",
        *table(["objective", *columns], rows),
    ]


def _perplexity(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['perplexity']:.1f} ({low:.1f}-{high:.1f})"


def retro_training(result: Result) -> list[str]:
    rows, protocol = [], result["protocol"]
    for name, run in result["runs"].items():
        row = [name]
        for mode in ("off", "on", "shuffled"):
            found = run.get(mode)
            row.append(f"{found['bits_per_byte']:.4f}" if found else "")
        gain = run.get("on", {}).get("against_none")
        row.append(_difference(gain) if gain else "")
        row.append(f"{run.get('on', run['off'])['perplexity']:.1f}")
        rows.append(row)
    return [
        f"RETRO trained on {protocol['tokens']:,} tokens of Wikipedia articles, by how neighbours "
        f"were found in {protocol['database_chunks']:,} chunks; bits per byte of "
        f"{protocol['test_articles']} held-out articles, with retrieval off, on, and with the "
        "neighbours of other chunks (95 % intervals over articles):",
        "",
        *table(
            ["neighbours", "off", "on", "shuffled", "on less the model without", "perplexity"],
            rows,
        ),
    ]


def _difference(found: dict[str, Any]) -> str:
    text = f"{found['bits_per_byte']:+.4f}"
    if "interval" in found:
        low, high = found["interval"]
        text += f" ({low:+.4f} to {high:+.4f})"
    return text


def retro_fit(result: Result) -> list[str]:
    modes = ("off", "on", "shuffled")
    rows = [
        [name, f"{text['steps']:,}"]
        + [f"{text['retrieval'][mode]['bits_per_byte']:.4f}" for mode in modes]
        for name, text in result["texts"].items()
    ]
    return [
        "A frozen small model that learns to read neighbours, bits per byte of held-out documents:",
        "",
        *table(
            ["text", "steps", *modes],
            rows,
        ),
    ]


def tupe_schemes(result: Result) -> list[str]:
    rows = [
        [
            f"{row['scheme']}, seed {row['seed']}",
            f"{row['parameters']:,}",
            f"{row['held_out_nats']:.3f}",
            "" if row["reaches_baseline_at"] is None else f"{row['reaches_baseline_at']:,}",
        ]
        for row in result["rows"]
    ]
    steps = result["settings"]["steps"]
    lines = [
        f"Position schemes, {steps} steps of 1,024 tokens of Wikipedia: loss of masked held-out "
        "tokens, and the step at which it first is below what BERT-A ends with:",
        "",
        *table(["scheme", "parameters", "nats", "reaches BERT-A's end at step"], rows),
    ]
    return lines + _glue(result) if result["glue"] else lines


def _glue(result: Result) -> list[str]:
    """Schemes by tasks; every task has the same schemes and metrics of its own."""
    tasks = result["glue"]
    seeds = result["settings"]["glue_seeds"]
    columns = [(task, name) for task, found in tasks.items() for name in next(iter(found.values()))]
    rows = [
        [scheme, *(f"{100 * tasks[task][scheme][name]:.1f}" for task, name in columns)]
        for scheme in next(iter(tasks.values()))
    ]
    return [
        "",
        f"The models of seed 1 fine-tuned on GLUE, in %, median of seeds {seeds}:",
        "",
        *table(["scheme", *(f"{task}: {name}" for task, name in columns)], rows),
    ]
