"""TRIME's memories on the command line: the rows of the paper, the cache, and text read before."""

import json

import pytest

import memlm
from memlm.cli.main import main
from memlm.cli.options import METHODS
from memlm.testing.tiny import tiny_model

STORY = "the cat sat on the mat and the dog sat on the log and a story was told once more"
TRIME = ("evaluate", "--method", "trime")
MEMORIES = {
    "local": (),
    "local + long": ("--long", 40),
    "local + long + external": ("--long", 40, "--store", "STORE", "--k", 8),
    "with interpolation": (
        *("--long", 40, "--store", "STORE", "--k", 8),
        *("--interpolate", 0.3, 2.0),
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with model, text and a store that is compared by dot product."""
    folder = tmp_path_factory.mktemp("trime")
    tiny_model("llama", max_position_embeddings=64).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(f"{STORY} . " * 3)
    for metric in ("ip", "l2"):
        build = ("build", folder / "model", folder / "text.txt", "--metric", metric)
        assert run(*build, "--out", folder / "stores" / metric) == 0
    return folder


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def names(place, arguments):
    stores = {"STORE": place / "stores" / "ip", "L2": place / "stores" / "l2"}
    texts = {"MODEL": place / "model", "TEXT": place / "text.txt"}
    return [(stores | texts).get(argument, argument) for argument in arguments]


def evaluation(place, capsys, *more):
    """The saved evaluation of the memory, beside that of the model alone."""
    saved = place / "result.json"
    command = ("evaluate", "MODEL", "TEXT", "--length", 16, "--stride", 4, "--save", saved)
    capsys.readouterr()
    assert run(*names(place, (*command, *more))) == 0
    shown = capsys.readouterr().out
    return json.loads(saved.read_text()), shown


def test_the_rows_of_the_paper_are_what_python_gives(place, capsys):
    """Every row equals `memlm.trime` evaluated window by window."""
    from memlm.cli.options import load_model, load_tokenizer

    model, tokenizer = load_model(str(place / "model")), load_tokenizer(str(place / "model"))
    store = memlm.Datastore.open(place / "stores" / "ip")
    corpus = memlm.tokenize(memlm.read_documents(place / "text.txt"), tokenizer)
    flat = memlm.KnnMemory(store, k=8, temperature=2.0), memlm.Mixture(0.3)
    settings = {
        "local": {},
        "local + long": {"long": 40},
        "local + long + external": {"long": 40, "store": store, "k": 8},
        "with interpolation": {"long": 40, "store": store, "k": 8},
    }
    perplexities = []
    for name, options in MEMORIES.items():
        kept, _ = evaluation(place, capsys, "--method", "trime", "--temperature", 0.5, *options)
        lm = memlm.trime(model, temperature=0.5, **settings[name])
        wanted = memlm.evaluate(
            model,
            corpus,
            memlm.SlidingWindows(16, 4),
            memory=lm.memory,
            merge=lm.merge,
            interpolate=flat if name == "with interpolation" else None,
            carry="window",
            progress=False,
        )
        assert kept["TRIME"]["documents"] == wanted.to_dict()["documents"]
        assert kept["TRIME"]["protocol"]["memory"] == lm.memory.describe()
        perplexities.append(wanted.perplexity)
    assert len(set(perplexities)) == len(perplexities)


def test_the_protocol_names_every_memory(place, capsys):
    _, shown = evaluation(place, capsys, "--method", "trime", *MEMORIES["with interpolation"])
    line = " ".join(shown.split())  # wrapped in a terminal
    for words in ("local size=64", "long size=40", "knn k=8", "exact search", "union"):
        assert words in line
    assert "interpolated with memory knn k=8 temperature=2, exact search, mixture lam=0.3" in line


def test_the_continuous_cache_is_a_mixture_of_the_text_that_was_read(place, capsys):
    kept, shown = evaluation(place, capsys, "--method", "cache", "--long", 40, "--lam", 0.1)
    protocol = kept["continuous cache"]["protocol"]
    assert protocol["merge"]["lam"] == 0.1
    assert protocol["carry"] == "window"
    assert [part["memory"] for part in protocol["memory"]["members"]] == ["local", "long"]
    assert "continuous cache" in shown
    kept, _ = evaluation(place, capsys, "--method", "cache", "--carry", "document")
    assert kept["continuous cache"]["protocol"]["carry"] == "document"


def test_it_continues_a_prompt_from_what_it_read_before(place, capsys):
    def texts(*more):
        prompt = ("generate", "MODEL", "the cat sat", "--max-new-tokens", 6, "--json", *more)
        capsys.readouterr()
        assert run(*names(place, prompt)) == 0
        return json.loads(capsys.readouterr().out)["texts"]

    sharp = ("--method", "trime", "--temperature", 0.02)
    read = texts(*sharp, "--long", 200, "--remember", "TEXT", "--compare")
    assert set(read) == {"base", "TRIME"}
    assert read["TRIME"].startswith("the cat sat on the")
    assert not read["base"].startswith("the cat sat on the")
    assert texts(*sharp, "--long", 200, "--remember", "TEXT", "--beams", 2)["TRIME"]
    assert texts(*sharp)["TRIME"] != read["TRIME"]
    assert texts(*sharp, "--store", "STORE", "--k", 4)["TRIME"]
    assert set(texts("--method", "cache")) == {"continuous cache"}


def test_generation_with_the_store_once_more(place, capsys):
    command = ("generate", "MODEL", "the cat sat on the", "--method", "trime", "--json")
    options = ("--store", "STORE", "--k", 4, "--max-new-tokens", 8)
    flat = ("--interpolate", 0.99, 0.01)
    made = {}
    for name, more in {"union": (), "flat": flat}.items():
        assert run(*names(place, (*command, *options, *more))) == 0
        made[name] = json.loads(capsys.readouterr().out)["texts"]["TRIME"]
    assert made["union"] != made["flat"]


def test_sweep_finds_what_evaluate_then_gives(place, capsys):
    window = ("--length", 16, "--stride", 4)
    store = ("--method", "trime", "--store", "STORE", "--k", 8)
    grid = ("--temperatures", 0.5, 2, "--sizes", 0, 40, "--merges", "union", "gate")
    more = ("--interpolations", 0.3, 2.0, "--cache", place / "kept", "--save", place / "swept.json")
    sweep = ("sweep", "MODEL", "TEXT", *window, *store, "--long", 40, *grid, *more)
    assert run(*names(place, sweep)) == 0
    shown = capsys.readouterr().out
    assert "interpolated" in shown
    assert "0.3 at 2" in shown
    trials = json.loads((place / "swept.json").read_text())["trials"]
    assert len(trials) == 2 * 2 * 2 * 2
    wanted = next(
        trial
        for trial in trials
        if (trial["k"], trial["size"], trial["slope"]) == (8, 40, None)
        and trial["flat"] is not None
        and trial["temperature"] == 2
    )
    flat = ("--temperature", 0.5, "--interpolate", 0.3, 2.0)
    saved, _ = evaluation(place, capsys, *store, "--long", 40, *flat)
    found = saved["TRIME"]["summary"]["perplexity"]
    assert found == pytest.approx(wanted["perplexity"], rel=1e-6)


@pytest.mark.parametrize("method", ["trime", "cache"])
def test_settings_are_chosen_on_other_text(method, place, capsys):
    saved, _ = evaluation(place, capsys, "--method", method, "--long", 40, "--tune", "TEXT")
    best = saved["tuned"]["best"]
    found = saved[METHODS[method]]["summary"]["perplexity"]
    assert found == pytest.approx(best["perplexity"], rel=1e-6)
    assert (best["lam"] is None) == (method == "trime")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*TRIME, "--store", "L2"), "metric must be 'ip', got 'l2'"),
        (("sweep",), "there must be a memory to sweep"),
        (("sweep", "--method", "retomaton", "--store", "L2"), "walks from token to token"),
        (("sweep", "--method", "trime", "--sizes", 8), "sizes are those of a long-term memory"),
        (
            ("generate", "--method", "trime", "--interpolate", 0.3, 1.0),
            "needs --method trime and --store, got trime and no store",
        ),
        ((*TRIME, "--temperature", "auto"), "must be a number"),
        ((*TRIME, "--temperature", 0), "finite number above 0"),
        ((*TRIME, "--long", -1), "long must not be negative, got -1"),
        (
            (*TRIME, "--interpolate", 0.3, 1.0),
            "needs --method trime and --store, got trime and no store",
        ),
        (
            ("evaluate", "--store", "STORE", "--interpolate", 0.3, 1.0),
            "needs --method trime and --store, got knn",
        ),
        (
            (*TRIME, "--store", "STORE", "--k", 8, "--interpolate", 0.3, 0),
            "finite number above 0",
        ),
        (
            (*TRIME, "--long", 8, "--carry", "document"),
            "carry must be 'window'",
        ),
        (
            (*TRIME, "--store", "STORE", "--k", 8, "--leave-out", "position"),
            "only a kNN memory can leave out",
        ),
        (("evaluate", "--method", "cache", "--store", "STORE"), "has no datastore"),
        (("evaluate", "--store", "STORE", "--long", 8), "belongs to --method trime or cache"),
        (("generate", "--method", "trime", "--long", 8), "give --remember TEXT"),
        (
            ("generate", "--method", "trime", "--remember", "TEXT"),
            "--long above 0, got trime and 0",
        ),
        (("generate", "--remember", "TEXT", "--long", 8), "--long above 0, got knn and 8"),
    ],
)
def test_mistakes_exit_with_two_and_one_sentence(arguments, message, place, capsys):
    verb, *options = arguments
    assert run(*names(place, (verb, "MODEL", "TEXT", *options))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("memlm: error: ")
    assert message in error


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_help_explains_the_methods(verb, capsys):
    with pytest.raises(SystemExit):
        run(verb, "--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("local memory", "continuous cache", "--long", "12288"):
        assert words in shown
