"""Plan a training step before a GPU is rented: `python plan.py`; see `conf/plan.yaml` for what can be chosen."""

from hift_lightning.planner.application import main

if __name__ == "__main__":
    main()
