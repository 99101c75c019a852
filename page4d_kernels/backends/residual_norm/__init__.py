"""The backends of `residual_norm` and the order in which "auto" tries them."""

from ..registry import declare
from . import reference, triton
from .problem import ResidualNormProblem

BACKENDS = declare("residual_norm", "PAGE4D_RESIDUAL_NORM", order=("reference",), safe=("reference",), typical=ResidualNormProblem.typical)
for _module in (reference, triton):
    BACKENDS.register(_module.BACKEND)
