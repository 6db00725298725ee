"""Fine-tune a classifier with HiFT: `python train.py`; see `conf/train.yaml` for what can be chosen."""

from hift_lightning.train import main

if __name__ == "__main__":
    main()
