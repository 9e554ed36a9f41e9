"""Former name of `pjax.layers.attention`."""

from pjax.moved import attribute_of

__getattr__ = attribute_of(__name__, "pjax.layers.attention")
