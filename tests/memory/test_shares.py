"""Several stores in one model, each with a weight: order, empty ones, and the plain formula."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from memlm.core.errors import FingerprintError, InputError
from memlm.core.merges import Mixture, Shares, merge_from_dict
from memlm.core.types import TargetPartial
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import SlidingWindows
from memlm.evaluation.perplexity import evaluate
from memlm.memory.knn import KnnMemory
from memlm.memory.together import Together
from memlm.models.attach import attach
from memlm.models.fingerprint import model_hash
from memlm.ops.merge import merge_logits, merge_target, union_logits
from memlm.ops.tokens import target_partial
from memlm.store.arrays import save_arrays
from memlm.store.deleted import delete_documents
from memlm.store.reader import Datastore
from memlm.testing.tiny import tiny_model, tiny_tokens

DIM, VOCABULARY = 8, 20
LAMS = (0.3, 0.2, 0.1)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def knn(path, seed, k=5):
    """Half of the entries are of document 1, so that one can be deleted."""
    values = torch.randint(0, VOCABULARY, (12,), generator=torch.Generator().manual_seed(seed))
    store = save_arrays(
        path / f"store-{seed}",
        draw(12, DIM, seed=seed).float(),
        values,
        documents=torch.arange(12) // 6,
        positions=torch.arange(12) % 6,
    )
    return KnnMemory(store, k=k, temperature=3.0)


@pytest.fixture
def members(tmp_path):
    return [knn(tmp_path, seed, k=3 + seed) for seed in range(3)]


QUERIES, LOGITS = draw(7, DIM, seed=50), draw(7, VOCABULARY, seed=51)
TARGETS = torch.randint(0, VOCABULARY, (7,), generator=torch.Generator().manual_seed(52))
BASE = TargetPartial(LOGITS.logsumexp(-1), LOGITS.gather(1, TARGETS[:, None])[:, 0])


def merged(members, lams, merge=None):
    memory = Together(*members, lams=lams)
    return merge_logits(merge or Shares(), LOGITS, memory.read(QUERIES, None)[0])


def by_hand(members, lams):
    """(1 - sum lam_i) p_model + sum lam_i p_i, over those that have a candidate."""
    answers = [member.read(QUERIES, None)[0] for member in members]
    spoke = [candidates.valid.any(1) for candidates in answers]
    total = sum(lam * s for lam, s in zip(lams, spoke, strict=True))
    probability = (1 - total)[:, None] * LOGITS.softmax(-1)
    nothing = torch.full_like(LOGITS, -torch.inf)
    for candidates, lam, s in zip(answers, lams, spoke, strict=True):
        own = union_logits(nothing, candidates).softmax(-1)
        probability = probability + torch.where(s[:, None], lam * own.nan_to_num(), 0)
    return probability


def test_it_is_the_plain_formula(members):
    assert_close(merged(members, LAMS).softmax(-1), by_hand(members, LAMS))


def test_known_targets_agree_with_rows(members):
    memory = Together(*members, lams=LAMS)
    scored = merge_target(Shares(), BASE, memory.score(QUERIES, TARGETS, None)[0])
    rows = merged(members, LAMS).log_softmax(-1)
    assert_close(scored.target_lse - scored.lse, rows.gather(1, TARGETS[:, None])[:, 0])
    again = target_partial(memory.read(QUERIES, None)[0], TARGETS)
    assert_close(merge_target(Shares(), BASE, again).target_lse, scored.target_lse)


def test_the_order_does_not_matter(members):
    expected = merged(members, LAMS)
    for order in itertools.permutations(range(3)):
        found = merged([members[i] for i in order], [LAMS[i] for i in order])
        assert_close(found, expected)


def test_one_store_is_a_mixture(members):
    candidates, _ = members[0].read(QUERIES, None)
    expected = merge_logits(Mixture(0.3), LOGITS, candidates)
    assert_close(merged(members[:1], [0.3]), expected)


class Silent(KnnMemory):
    """A store in which nothing is found."""

    def read(self, query, state=None):
        candidates, state = super().read(query)
        return candidates._replace(valid=torch.zeros_like(candidates.valid)), state


@pytest.mark.parametrize("how", ["nothing found", "weight zero"])
def test_an_empty_store_is_as_if_it_were_not_there(how, members):
    silent = Silent(members[1].store, k=3) if how == "nothing found" else members[1]
    lams = (0.3, 0.5 if how == "nothing found" else 0.0, 0.1)
    three = merged([members[0], silent, members[2]], lams)
    assert_close(three, merged([members[0], members[2]], (0.3, 0.1)))
    memory = Together(members[0], silent, members[2], lams=lams)
    two = Together(members[0], members[2], lams=(0.3, 0.1))
    assert_close(memory.score(QUERIES, TARGETS, None)[0], two.score(QUERIES, TARGETS, None)[0])


def test_nothing_found_anywhere_is_the_model(members):
    silent = [Silent(member.store, k=3) for member in members]
    assert merged(silent, LAMS) is not None
    assert torch.equal(merged(silent, LAMS), LOGITS)
    assert torch.equal(merged(members, (0, 0, 0)), LOGITS)


def test_all_weight_on_the_stores(members):
    rows = merged(members, (0.5, 0.25, 0.25))
    assert_close(rows.softmax(-1), by_hand(members, (0.5, 0.25, 0.25)))


def test_deleted_documents_stay_out(tmp_path, members):
    store = delete_documents(Datastore.open(members[0].store.path), [1])
    left = KnnMemory(store, k=6, temperature=3.0)
    candidates, _ = Together(left, members[1], lams=(0.5, 0.2)).read(QUERIES, None)
    assert int(candidates.ids[:, :6].max()) < 6


@pytest.mark.parametrize("lams", [(0.5,), (0.5, 0.6), (-0.1, 0.5)])
def test_bad_weights(lams, members):
    with pytest.raises(InputError, match="lams must be 2 weights"):
        Together(*members[:2], lams=lams)


def test_a_memory_without_weights_is_refused():
    far = TargetPartial(torch.full((7,), 3.0), torch.zeros(7))
    with pytest.raises(InputError, match="sum to one at most"):
        merge_target(Shares(), BASE, far)
    assert merge_from_dict(Shares().to_dict()) == Shares()


# --- in a model


@pytest.fixture
def lm(tmp_path):
    model = tiny_model("llama")
    tap = "final"
    stores = []
    for seed in range(2):
        keys = draw(40, model.config.hidden_size, seed=seed).float()
        values = torch.randint(3, 60, (40,), generator=torch.Generator().manual_seed(seed))
        identity = {"model_hash": model_hash(model), "tap": tap}
        stores.append(save_arrays(tmp_path / f"of-model-{seed}", keys, values, **identity))
    memory = Together(*(KnnMemory(store, k=4) for store in stores), lams=(0.4, 0.2))
    return attach(model, memory, merge=Shares())


def test_generate_evaluate_and_saving(lm, tmp_path):
    prompt = tiny_tokens(2, 6)
    tokens = lm.generate(prompt, max_new_tokens=5, do_sample=False)
    corpus = TokenCorpus.from_tokens(tiny_tokens(1, 40)[0].numpy())
    windows = SlidingWindows(length=16, stride=8)
    with_both = evaluate(lm, corpus, windows, progress=False)
    assert "lam=0.4 + knn" in with_both.describe() or "lam=0.4" in str(with_both.protocol["memory"])
    swapped = Together(*lm.memory.members[::-1], lams=lm.memory.lams[::-1])
    other = evaluate(
        lm.detach(), corpus, windows, memory=swapped, merge=Shares(), tap="final", progress=False
    )
    assert_close(other.perplexity, with_both.perplexity)
    lm.save_pretrained(tmp_path / "saved")
    loaded = type(lm).from_pretrained(tmp_path / "saved")
    assert loaded.memory.lams == (0.4, 0.2)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=5, do_sample=False), tokens)


def test_every_store_must_be_of_the_model(lm, tmp_path):
    foreign = save_arrays(
        tmp_path / "foreign", draw(9, 16, seed=1).float(), torch.arange(9), model_hash="another"
    )
    memory = Together(*lm.memory.members, KnnMemory(foreign, k=2), lams=(0.2, 0.2, 0.2))
    with pytest.raises(FingerprintError, match="another"):
        attach(lm.detach(), memory, merge=Shares())
