"""A text read token by token."""

from .reading import TextReading as TextReading
from .watch import Alarm as Alarm
