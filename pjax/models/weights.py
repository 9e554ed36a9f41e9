"""Former name of `pjax.checkpoints.weights`."""

from pjax.moved import attribute_of

__getattr__ = attribute_of(__name__, "pjax.checkpoints.weights")
