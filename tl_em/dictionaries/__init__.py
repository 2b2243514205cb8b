"""Sparse dictionaries: SAEs and transcoders as plain tensors, from every library's files."""

from tl_em.dictionaries.checks import Activation as Activation
from tl_em.dictionaries.dictionary import Dictionary as Dictionary
from tl_em.dictionaries.dictionary import Feature as Feature
from tl_em.dictionaries.formats.sae_lens import sae_lens as sae_lens
from tl_em.dictionaries.loading import from_sae_lens as from_sae_lens
from tl_em.dictionaries.loading import load_dictionary as load_dictionary
from tl_em.dictionaries.protocol import SparseDictionary as SparseDictionary
