"""One experiment, written once: treat, measure per prompt, compare with controls, judge."""

from .claim import Case as Case
from .claim import Finding as Finding
from .claim import Question as Question
from .claim import Row as Row
from .compare import Comparison as Comparison
from .curve import effect_curve as effect_curve
from .dose import calibrate as calibrate
from .feature_check import FeatureCheck as FeatureCheck
from .instructions import TextLogprob as TextLogprob
from .questions.inversion import reply_inversion as reply_inversion
from .questions.latents import verify_feature as verify_feature
from .questions.latents import verify_features as verify_features
from .questions.use import Use as Use
from .selection import Selection as Selection
from .selection import select_candidate as select_candidate
from .selection import select_direction as select_direction
