"""What ``memlm diagnose`` finds in two small real models, on stories like those of their training.

    python -m benchmarks.bench_diagnosis --data DATA

Both were trained on 512 tokens and read pieces of 2048. The picture shows the first one.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.bench_lminfinite import MODELS, TRAINED, load, texts
from benchmarks.common import RESULTS, save, save_picture
from memlm.core.threads import torch_threads
from memlm.data.tokens import tokenize
from memlm.evaluation.diagnosis import DiagnosisConfig, cut_pieces, diagnose
from memlm.evaluation.diagnosis_plot import draw_diagnosis
from memlm.evaluation.recommend import RecommendConfig, recommend
from memlm.evaluation.report import plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of corpora and models")
    parser.add_argument("--length", type=int, default=4 * TRAINED)
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    config = DiagnosisConfig(options.length, TRAINED, pieces=options.pieces)
    tried = RecommendConfig(windows=tuple(TRAINED // n for n in (16, 8, 4, 2, 1)))
    result: dict[str, Any] = {}
    for name in MODELS:
        model, tokenizer = load(options.data, name)
        corpus = tokenize(texts(options.data, "stories", 600_000), tokenizer)
        pieces = cut_pieces(
            corpus.tokens, options.length, options.pieces, begin_token=corpus.begin_token
        )
        with torch_threads(options.threads):
            found = diagnose(model, pieces, config)
            chosen = recommend(model, pieces, tried, progress=False)
        for part in (found, chosen):
            print(name, plain(part.table()), sep="\n", flush=True)
        kept = found.to_dict()
        del kept["components"]  # every hidden state's place: the picture shows them
        result[name] = {"diagnosis": kept, "recommendation": chosen.to_dict()}
        if name == MODELS[0]:
            save_picture(
                draw_diagnosis(found, chosen),
                RESULTS / "diagnosis.svg",
                f"Attention of {name} within and beyond its trained length",
                "Largest score by distance, entropy by number of keys, attention on the first "
                "tokens by head, how far first tokens lie apart, features on two principal "
                "components, and loss by window and sinks.",
            )
    save("diagnosis", result)


if __name__ == "__main__":
    main()
