"""HiFT: full-parameter fine-tuning on one GPU, one block of layers at a time.

Importing this package registers the strategy: ``lightning.Trainer(strategy="hift")``.
"""

from importlib.metadata import version

from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.settings import HiFTSettings
from hift_lightning.manual import HiFTManualMixin
from hift_lightning.strategies import HiFTDDPStrategy, HiFTFSDP2Strategy, HiFTStrategy

__all__ = ["HiFT", "HiFTDDPStrategy", "HiFTFSDP2Strategy", "HiFTManualMixin", "HiFTSettings", "HiFTStrategy"]

__version__ = version("hift-lightning")
