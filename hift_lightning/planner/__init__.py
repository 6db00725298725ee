"""What a configuration needs, before a GPU is rented."""

from hift_lightning.planner.planning import BlockPlan, Plan, plan

__all__ = ["BlockPlan", "Plan", "plan"]
