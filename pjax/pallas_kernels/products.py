"""Former name of `pjax.native.products`."""

from pjax.moved import attribute_of

__getattr__ = attribute_of(__name__, "pjax.native.products")
