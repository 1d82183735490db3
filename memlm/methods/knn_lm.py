"""kNN-LM (Khandelwal et al. 2020): a language model that looks up similar contexts as it reads.

    p(w | context) = (1 - lam) p_model(w | context) + lam p_kNN(w | context)          (eq. 3)
    p_kNN(w | context) ~ sum over the k nearest entries whose value is w of exp(-d^2 / T)  (eq. 2)

The parts: `build_datastore` reads the text once (section 2), `index_store` makes it searchable
(section 3), `KnnMemory` answers queries, `Mixture` interpolates, `attach` joins them to a model.

Settings of the paper: k = 1024, T = 1, lam = 0.25, key = input of the last feed-forward, squared
l2 distance, IVF-PQ with 4096 lists, 64 bytes per key and 32 probes. They differ where they must:
exact search is the default for a store without an index, since it is exact and small stores do
not need more; T should be tuned, because squared distances grow with the model's width.
"""

from memlm.core.merges import Mixture
from memlm.core.types import Index
from memlm.index.build import build_index
from memlm.index.plan import IndexConfig
from memlm.memory.knn import KnnMemory
from memlm.models.attach import MemoryForCausalLM, attach
from memlm.store.reader import Datastore


def knn_lm(model, store: Datastore, *, k=1024, lam=0.25, temperature=1.0) -> MemoryForCausalLM:
    """``model`` with ``store`` as its memory, a Hugging Face model like any other.

    Args:
        model: the causal language model that the store was built with.
        store: from `build_datastore`; its index, if one was built, is used.
        k: neighbours per query.
        lam: weight of the memory, 0 to 1.
        temperature: divides the squared distances.
    """
    return attach(model, KnnMemory(store, k=k, temperature=temperature), merge=Mixture(lam))


def index_store(
    store: Datastore, config: IndexConfig | None = None, *, threads: int | None = None
) -> Index:
    """Build an approximate index beside a store (section 3: FAISS IVF-PQ), with measured recall.

    Args:
        store: a finished datastore.
        config: type and sizes; default: the paper's preset with the store's metric.
        threads: CPU threads of FAISS; None: as they are.
    """
    config = config or IndexConfig(type="ivfpq", metric=store.metric)
    return build_index(store, config, directory=store.path / "index", threads=threads)
