"""Estimates, intervals, units and multiplicity: the only place where the prompt axis is reduced."""

from tl_em.stats.estimate import Estimate as Estimate
from tl_em.stats.estimate import Resampled as Resampled
from tl_em.stats.estimate import middle_95 as middle_95
from tl_em.stats.intervals import bootstrap as bootstrap
from tl_em.stats.means import difference as difference
from tl_em.stats.means import mean as mean
from tl_em.stats.means import mean_over_units as mean_over_units
from tl_em.stats.means import paired_difference as paired_difference
from tl_em.stats.multiplicity import benjamini_hochberg as benjamini_hochberg
from tl_em.stats.multiplicity import control_p as control_p
from tl_em.stats.multiplicity import holm as holm
from tl_em.stats.prediction import Prediction as Prediction
from tl_em.stats.prediction import beyond_next as beyond_next
from tl_em.stats.ranks import auroc as auroc
from tl_em.stats.ranks import auroc_of as auroc_of
from tl_em.stats.units import Groups as Groups
from tl_em.stats.units import design_effect as design_effect
from tl_em.stats.units import half_splits as half_splits
from tl_em.stats.units import shuffled_labels as shuffled_labels
from tl_em.stats.units import tied as tied
