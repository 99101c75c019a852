"""Registration of the ops with torch.library.

`torch.library.custom_op` does the same, but its operators compare the storages of inputs and outputs at every call, and import
torch._dynamo at the first. That is 10 us and 1.4 s. `torch.library.opcheck` compares them in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("page4d", "FRAGMENT")


class Operator:
    """`torch.ops.page4d.<name>`. It changes none of its arguments, and its results share no memory with them."""

    def __init__(self, name: str, function: Callable[..., Any]):
        self.qualified = f"{LIBRARY.ns}::{name}"
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes, strides and dtypes of the results, for tracing."""
        return torch.library.register_fake(self.qualified, function, lib=LIBRARY)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        torch.library.register_autograd(self.qualified, backward, setup_context=setup_context, lib=LIBRARY)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorate the implementation of an operator. The schema comes from its annotations."""
    return lambda function: Operator(name, function)
