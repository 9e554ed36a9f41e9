"""Who runs in the next step, and which pages hold whose keys and values. Plain Python and numpy."""

from pjax.scheduler.plan import StepPlan
from pjax.scheduler.request import Request, RequestStatus
from pjax.scheduler.scheduler import Scheduler

__all__ = ["Request", "RequestStatus", "Scheduler", "StepPlan"]
