"""Fine-tuning, and what is watched or added while it runs."""

from .fine_tune import fine_tune_ as fine_tune_
from .monitors import Monitor as Monitor
from .prevention import steered_training as steered_training
