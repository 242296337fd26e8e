"""lmd3: does a language model do well where its training data is dense?"""

from lmd3._lmd3 import __version__

__all__ = ["__version__"]
