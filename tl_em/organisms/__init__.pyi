"""The toy organisms, their worlds and the studies over them."""

from .descent import fine_tune_ as fine_tune_
from .many_models import audit_each as audit_each
from .many_models import evaluate_each as evaluate_each
from .rates import behaviour_rates as behaviour_rates
from .rates import outcome_rates as outcome_rates
from .real_studies import StudyData as StudyData
from .real_studies import run_real as run_real
from .studies import run_study as run_study
from .studies import summarise_study as summarise_study
from .study_backends import shared_value as shared_value
from .world import World as World
from .zoo import Organism as Organism
from .zoo import organism as organism
from .zoo import organisms as organisms
from .zoo import to_hf_directory as to_hf_directory
from .zoo import toy_dictionary as toy_dictionary
from .zoo import train_organism as train_organism
