"""The device side: packs plans into arrays, compiles and runs the programs of a step, copies pages to the host and back."""

from pjax.runner.compilation import use_compilation_cache as use_compilation_cache
from pjax.runner.executables import can_keep as can_keep
from pjax.runner.runner import InFlight as InFlight
from pjax.runner.runner import ModelRunner as ModelRunner
from pjax.runner.runner import RunnerConfig as RunnerConfig
from pjax.runner.runner import StepResult as StepResult
