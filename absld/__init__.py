"""Anti-Bias Soft Label Distillation: small, robust image classifiers without weak classes.

The public names are listed in __init__.pyi and loaded when first used: importing the package does
not import torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.2.0"
