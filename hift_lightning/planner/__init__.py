"""What a configuration needs, before a GPU is rented."""

from hift_lightning.planner.choice import Choice, choose
from hift_lightning.planner.planning import StepPlanner, plan
from hift_lightning.planner.result import BlockPlan, Plan

__all__ = ["BlockPlan", "Choice", "Plan", "StepPlanner", "choose", "plan"]
