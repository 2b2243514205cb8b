"""A loaded model behind a local page and an OpenAI-compatible endpoint, steered by dials."""

from .dials import SteeringDial as SteeringDial
from .server import RunningServer as RunningServer
