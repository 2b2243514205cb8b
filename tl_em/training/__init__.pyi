"""Fine-tuning, and what is watched or added while it runs."""

from .arms import Inoculated as Inoculated
from .arms import Mixed as Mixed
from .arms import Replayed as Replayed
from .arms import Steered as Steered
from .arms import Triggered as Triggered
from .arms import TuningArm as TuningArm
from .lora import Lora as Lora
from .monitors import Monitor as Monitor
from .prevention import steered_training as steered_training
