"""memlm: language models that remember.

Everything a user needs is here by name and loaded at first use, so that ``import memlm`` costs
nothing:

    store  = memlm.build_datastore(model, tokenizer, "my_docs/", out="stores/docs")
    memory = memlm.KnnMemory(store, k=1024)
    lm     = memlm.attach(model, memory, merge=memlm.Mixture(lam=0.25))
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from memlm.core.errors import MemlmError as MemlmError
    from memlm.core.merges import Gate as Gate
    from memlm.core.merges import Mixture as Mixture
    from memlm.core.merges import Union as Union
    from memlm.data.documents import Document as Document
    from memlm.data.documents import read_documents as read_documents
    from memlm.data.tokens import TokenCorpus as TokenCorpus
    from memlm.data.tokens import tokenize as tokenize
    from memlm.data.windows import BlockWindows as BlockWindows
    from memlm.data.windows import SlidingWindows as SlidingWindows
    from memlm.data.windows import StrideWindows as StrideWindows
    from memlm.evaluation.perplexity import evaluate as evaluate
    from memlm.evaluation.tune import tune as tune
    from memlm.explain.provenance import explain_tokens as explain_tokens
    from memlm.extract.build import build_datastore as build_datastore
    from memlm.extract.config import ExtractionConfig as ExtractionConfig
    from memlm.importers.datastore import export_datastore as export_datastore
    from memlm.importers.datastore import import_datastore as import_datastore
    from memlm.index.cluster import ClusterConfig as ClusterConfig
    from memlm.index.cluster import cluster_store as cluster_store
    from memlm.index.plan import IndexConfig as IndexConfig
    from memlm.memory.automaton import AutomatonMemory as AutomatonMemory
    from memlm.memory.knn import KnnMemory as KnnMemory
    from memlm.memory.local import LocalMemory as LocalMemory
    from memlm.memory.long import LongMemory as LongMemory
    from memlm.memory.skipping import SkippingMemory as SkippingMemory
    from memlm.memory.together import Together as Together
    from memlm.methods.knn_lm import index_store as index_store
    from memlm.methods.knn_lm import knn_lm as knn_lm
    from memlm.methods.lm_infinite import lm_infinite as lm_infinite
    from memlm.methods.pruning import prune_store as prune_store
    from memlm.methods.retomaton import retomaton as retomaton
    from memlm.methods.retro import retro_database as retro_database
    from memlm.methods.trime import trime as trime
    from memlm.methods.tupe import pretrain_tupe as pretrain_tupe
    from memlm.models.attach import MemoryForCausalLM as MemoryForCausalLM
    from memlm.models.attach import attach as attach
    from memlm.models.extend import extend_context as extend_context
    from memlm.models.extend import restore_context as restore_context
    from memlm.models.retro.causal_lm import RetroForCausalLM as RetroForCausalLM
    from memlm.models.retro.config import RetroConfig as RetroConfig
    from memlm.models.retro.fit import retro_fit as retro_fit
    from memlm.models.tupe.config import TupeConfig as TupeConfig
    from memlm.models.tupe.heads import TupeForMaskedLM as TupeForMaskedLM
    from memlm.models.tupe.retrofit import untie_positions as untie_positions
    from memlm.ops.middle_rule import MiddleConfig as MiddleConfig
    from memlm.positions.untied import UntiedPositions as UntiedPositions
    from memlm.retrieval.chunks import ChunkDatabase as ChunkDatabase
    from memlm.retrieval.dataset import RetroDataset as RetroDataset
    from memlm.store.deleted import delete_documents as delete_documents
    from memlm.store.reader import Datastore as Datastore
    from memlm.store.rewrite import compact_store as compact_store
    from memlm.store.rewrite import join_stores as join_stores
    from memlm.training.causal_lm import TrainConfig as TrainConfig
    from memlm.training.causal_lm import train_causal_lm as train_causal_lm
    from memlm.training.finetune import finetune as finetune
    from memlm.training.tokenizer import train_tokenizer as train_tokenizer


_HOME = {
    "AutomatonMemory": "memlm.memory.automaton",
    "BlockWindows": "memlm.data.windows",
    "ChunkDatabase": "memlm.retrieval.chunks",
    "ClusterConfig": "memlm.index.cluster",
    "Datastore": "memlm.store.reader",
    "Document": "memlm.data.documents",
    "ExtractionConfig": "memlm.extract.config",
    "Gate": "memlm.core.merges",
    "IndexConfig": "memlm.index.plan",
    "KnnMemory": "memlm.memory.knn",
    "LocalMemory": "memlm.memory.local",
    "LongMemory": "memlm.memory.long",
    "MemlmError": "memlm.core.errors",
    "MemoryForCausalLM": "memlm.models.attach",
    "MiddleConfig": "memlm.ops.middle_rule",
    "Mixture": "memlm.core.merges",
    "RetroConfig": "memlm.models.retro.config",
    "RetroDataset": "memlm.retrieval.dataset",
    "RetroForCausalLM": "memlm.models.retro.causal_lm",
    "SkippingMemory": "memlm.memory.skipping",
    "SlidingWindows": "memlm.data.windows",
    "StrideWindows": "memlm.data.windows",
    "Together": "memlm.memory.together",
    "TokenCorpus": "memlm.data.tokens",
    "TrainConfig": "memlm.training.causal_lm",
    "TupeConfig": "memlm.models.tupe.config",
    "TupeForMaskedLM": "memlm.models.tupe.heads",
    "Union": "memlm.core.merges",
    "UntiedPositions": "memlm.positions.untied",
    "attach": "memlm.models.attach",
    "build_datastore": "memlm.extract.build",
    "cluster_store": "memlm.index.cluster",
    "compact_store": "memlm.store.rewrite",
    "delete_documents": "memlm.store.deleted",
    "evaluate": "memlm.evaluation.perplexity",
    "explain_tokens": "memlm.explain.provenance",
    "export_datastore": "memlm.importers.datastore",
    "extend_context": "memlm.models.extend",
    "finetune": "memlm.training.finetune",
    "import_datastore": "memlm.importers.datastore",
    "index_store": "memlm.methods.knn_lm",
    "join_stores": "memlm.store.rewrite",
    "knn_lm": "memlm.methods.knn_lm",
    "lm_infinite": "memlm.methods.lm_infinite",
    "pretrain_tupe": "memlm.methods.tupe",
    "prune_store": "memlm.methods.pruning",
    "read_documents": "memlm.data.documents",
    "restore_context": "memlm.models.extend",
    "retomaton": "memlm.methods.retomaton",
    "retro_database": "memlm.methods.retro",
    "retro_fit": "memlm.models.retro.fit",
    "tokenize": "memlm.data.tokens",
    "train_causal_lm": "memlm.training.causal_lm",
    "train_tokenizer": "memlm.training.tokenizer",
    "trime": "memlm.methods.trime",
    "tune": "memlm.evaluation.tune",
    "untie_positions": "memlm.models.tupe.retrofit",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'memlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
