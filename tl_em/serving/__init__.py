"""A loaded model behind a local page and an OpenAI-compatible endpoint, steered by dials."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
