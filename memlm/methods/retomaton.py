"""RetoMaton (Alon et al. 2022): kNN-LM that walks its datastore and searches when the walk ends.

    p(w | context) = (1 - lam) p_model(w | context) + lam p_automaton(w | context)    (section 2.1)

A datastore's entries are in the order of its text, so an entry that agreed with the token that came
points to where the text went on (section 3.2); entries with close keys are one state and share
their pointers (section 3.3). The automaton answers from the states that are alive, and searches
only when fewer than `min_knns` pointers are.

The parts: `build_datastore` and `index_store` as for kNN-LM, `cluster_store` joins entries into
states, `AutomatonMemory` walks them, `Mixture` interpolates, `attach` joins memory and model.

Settings of the paper: k = 1024, T = 1, lam = 0.25, one cluster per 100 entries; `min_knns` chooses
between speed and perplexity: 1 saves most searches, a number no step can reach (say 10^9) saves
none and follows pointers all the same, which had the best perplexity.
"""

from memlm.core.merges import Mixture
from memlm.memory.automaton import AutomatonMemory
from memlm.models.attach import MemoryForCausalLM, attach
from memlm.store.reader import Datastore


def retomaton(
    model, store: Datastore, *, k=1024, lam=0.25, temperature=1.0, min_knns=1, max_knns=1024
) -> MemoryForCausalLM:
    """``model`` with ``store`` as its automaton, a Hugging Face model like any other.

    Args:
        model: the causal language model that the store was built with.
        store: from `build_datastore`; its index and its clusters, if they were made, are used.
        k: neighbours per search.
        lam: weight of the memory, 0 to 1.
        temperature: divides the squared distances.
        min_knns: search when fewer pointers are alive.
        max_knns: entries that pointers and their clusters contribute to a step, at most.
    """
    memory = AutomatonMemory(
        store, k=k, temperature=temperature, min_knns=min_knns, max_knns=max_knns
    )
    return attach(model, memory, merge=Mixture(lam))
