"""The Hydra configuration of `train.py`; installed as `hift_lightning.conf`."""
