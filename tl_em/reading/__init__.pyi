"""A text read token by token."""

from .reading import Reading as Reading
from .watch import Alarm as Alarm
