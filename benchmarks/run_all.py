"""Run every benchmark, one after another, each in a process of its own; then write the table."""

import json
import subprocess
import sys

from benchmarks.common import RESULTS

BENCHMARKS = ("bench_import", "bench_extraction", "bench_evaluation", "bench_automaton")


def main():
    for name in BENCHMARKS:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
    (RESULTS / "README.md").write_text(table(), encoding="utf-8")


def table() -> str:
    """The committed results as Markdown."""

    def load(name):
        return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))

    imports, extraction, evaluation = load("import"), load("extraction"), load("evaluation")
    lines = [
        "# Results",
        "",
        "One benchmark a file, `python -m benchmarks.bench_<name>`; `make bench` runs all. The",
        "JSON files beside this hold everything, the machine included.",
        "",
    ]
    lines += [
        f"Import, {imports['machine']['cores']} cores, {imports['date']}: "
        f"`import memlm` {imports['import_seconds'] * 1000:.0f} ms beyond Python's own start, "
        f"`memlm --help` {imports['help_seconds'] * 1000:.0f} ms.",
        "",
        f"Extraction against the bare forward pass of the body, in turn, {extraction['windows']}, "
        f"{extraction['machine']['threads']} threads, median of "
        f"{extraction['cases'][0]['rounds']} rounds:",
        "",
        "| extraction: model | extraction tokens/s | bare body tokens/s | extraction / body |",
        "|---|---|---|---|",
    ]
    for case in extraction["cases"]:
        lines.append(
            f"| {case['parameters'] / 1e6:.1f} M parameters, {case['layers']} layers "
            f"| {case['extraction_tokens_per_second']:,.0f} "
            f"| {case['body_tokens_per_second']:,.0f} "
            f"| {case['extraction_speed_over_body']:.2f} |"
        )
    lines += [
        "",
        f"Evaluation of {evaluation['tokens']:,} random tokens, made-up store (256 dimensions, "
        f"near a 24-dimensional surface), {evaluation['model']}, k = {evaluation['k']:,}, "
        f"{evaluation['machine']['threads']} threads, median of "
        f"{evaluation['cases'][0]['rounds']} rounds; the floor is the operations of the products "
        "and the bytes of the keys at this machine's measured speeds:",
        "",
        "| evaluation: entries | index | recall@1024 | kNN-LM time / base time | ms per query "
        "| search / floor |",
        "|---|---|---|---|---|---|",
    ]
    for case in evaluation["cases"]:
        floor = f"{case['search_over_floor']:.2f}" if "search_over_floor" in case else "-"
        lines.append(
            f"| {case['entries']:,} | {case['index']} | {case['recall']:.2f} "
            f"| {case['knn_over_base']:.1f} | {case['milliseconds_per_query']:.2f} | {floor} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
