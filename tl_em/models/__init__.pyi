"""The only place that knows TransformerLens."""

from .class_means import mean_activation as mean_activation
from .contrasts import ContrastSet as ContrastSet
from .hooks import LensModel as LensModel
from .loading import ModelPair as ModelPair
from .loading import load_model as load_model
from .sites import Position as Position
from .sites import Provenance as Provenance
from .sites import Site as Site
from .stream import capture as capture
