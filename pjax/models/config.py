"""Former name of `pjax.layers.rope`, `pjax.models.hf_config`."""

from pjax.moved import attribute_of

__getattr__ = attribute_of(__name__, "pjax.layers.rope", "pjax.models.hf_config")
