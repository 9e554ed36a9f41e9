"""Former name of `pjax.layers.kernels`."""

from pjax.moved import attribute_of

__getattr__ = attribute_of(__name__, "pjax.layers.kernels")
