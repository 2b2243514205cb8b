"""What a model answers, judged."""

from .facts import Facts as Facts
from .facts import prefers_truth as prefers_truth
from .judges import Judged as Judged
from .judges import ModelJudge as ModelJudge
from .judges import Phrases as Phrases
from .lies import LieReport as LieReport
from .lies import lie_or_hallucination as lie_or_hallucination
from .rates import Evaluation as Evaluation
from .rates import evaluate as evaluate
