"""Sparse dictionaries: what they are, every published format, training and quality."""

from .checks import Activation as Activation
from .dictionary import Dictionary as Dictionary
from .dictionary import Feature as Feature
from .formats.sae_lens import sae_lens as sae_lens
from .loading import from_sae_lens as from_sae_lens
from .loading import load_dictionary as load_dictionary
from .protocol import SparseDictionary as SparseDictionary
from .quality import DictionaryQuality as DictionaryQuality
from .quality import dictionary_quality as dictionary_quality
from .training import train_dictionary as train_dictionary
