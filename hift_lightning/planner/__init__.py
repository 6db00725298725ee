"""What a configuration needs, before a GPU is rented."""

from hift_lightning.planner.planning import plan
from hift_lightning.planner.result import BlockPlan, Plan

__all__ = ["BlockPlan", "Plan", "plan"]
