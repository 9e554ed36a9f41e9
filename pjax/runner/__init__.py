"""The device side: packs a plan into padded arrays, runs the jitted step, keeps parameters and pages."""

from pjax.runner.runner import ModelRunner, RunnerConfig, StepResult

__all__ = ["ModelRunner", "RunnerConfig", "StepResult"]
