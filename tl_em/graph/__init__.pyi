"""Attribution graphs: made, pruned, compared, shown, exchanged."""

from .attention import attention_view as attention_view
from .attention import head_loadings as head_loadings
from .build import attribute as attribute
from .build import leading_nodes as leading_nodes
from .build import node_scores as node_scores
from .exchange_reading import load_graph as load_graph
from .graph import AttributionGraph as AttributionGraph
from .graph import GraphDiff as GraphDiff
from .over_prompts import attribute_over as attribute_over
from .rules.base import Rule as Rule
from .targets import Completion as Completion
