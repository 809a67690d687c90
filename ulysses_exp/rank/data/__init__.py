"""Where tokens come from and which of them each rank works on."""

from ulysses_exp.rank.data.batches import Batches, MicroBatch
from ulysses_exp.rank.data.corpus import Corpus, load_corpus

__all__ = ["Batches", "Corpus", "MicroBatch", "load_corpus"]
