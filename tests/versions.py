"""What an older torch, which the package admits, cannot do."""

import pytest
import torch

sharded_blocks = pytest.mark.skipif(torch.__version__ < "2.13", reason="sharded blocks want torch 2.13")
