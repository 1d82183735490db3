"""kNN-MT (Khandelwal et al. 2021): a translation model that looks up how it wrote before.

    p(y_t | source, y_<t) = (1 - lam) p_model(y_t | ...) + lam p_kNN(y_t | ...)          (eq. 3)
    p_kNN ~ sum over the k nearest decoder states whose next token was y_t of exp(-d^2 / T)  (eq. 2)

The parts: `build_pair_datastore` reads pairs with the true targets and keeps every decoder state
(section 2), `KnnMemory` answers queries, `Mixture` interpolates, `attach_seq2seq` joins them to a
model, and any search of `generate` works on the mixture.

Settings of the paper: k = 64, T from 10 to 100 and lam from 0.4 to 0.8, tuned per domain; those of
knn-transformers, which are the defaults here, are k = 32, T = 50, lam = 0.25.
"""

from memlm.core.merges import Mixture
from memlm.memory.knn import KnnMemory
from memlm.models.attach_seq2seq import MemoryForSeq2SeqLM, attach_seq2seq
from memlm.store.reader import Datastore


def knn_mt(model, store: Datastore, *, k=32, lam=0.25, temperature=50.0) -> MemoryForSeq2SeqLM:
    """``model`` with ``store`` as its memory, a Hugging Face model like any other.

    Args:
        model: the encoder-decoder that the store was built with.
        store: from `build_pair_datastore`; its index, if one was built, is used.
        k: neighbours per query.
        lam: weight of the memory, 0 to 1.
        temperature: divides the squared distances.
    """
    return attach_seq2seq(model, KnnMemory(store, k=k, temperature=temperature), Mixture(lam))
