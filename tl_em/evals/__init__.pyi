"""What a model answers, judged."""

from .answered_contrasts import answered_contrast as answered_contrast
from .choices import ForcedChoice as ForcedChoice
from .endpoint import EndpointJudge as EndpointJudge
from .evaluation import Evaluation as Evaluation
from .evaluation import Judged as Judged
from .facts import Facts as Facts
from .facts import known_by_choice as known_by_choice
from .facts import prefers_truth as prefers_truth
from .judges import ModelJudge as ModelJudge
from .judges import Phrases as Phrases
from .judges import TextClassifier as TextClassifier
from .lies import LieReport as LieReport
from .lies import lie_or_hallucination as lie_or_hallucination
from .local import LocalJudge as LocalJudge
from .misaligned import Misaligned as Misaligned
from .published import load_judged as load_judged
from .questions import OpenQuestion as OpenQuestion
from .questions import QuestionSet as QuestionSet
from .questions import load_questions as load_questions
from .rates import evaluate as evaluate
from .reliability import Agreement as Agreement
from .reliability import agreement as agreement
from .reliability import corrected as corrected
