"""Former name of `pjax.layers.linear`, `pjax.layers.norms`, `pjax.layers.stack`."""

from pjax.moved import attribute_of

__getattr__ = attribute_of(__name__, "pjax.layers.linear", "pjax.layers.norms", "pjax.layers.stack")
