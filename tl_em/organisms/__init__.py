"""Model organisms: tiny transformers of a synthetic world whose training is known, so that an audit can be checked."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
