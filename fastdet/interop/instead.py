"""A function in place of a method of one object: the class stays, and so does what copies and pickles give."""

from collections.abc import Callable
from typing import Any

import torch


class Instead:
    """Stands in an instance's dictionary in place of a method of its class.

    An object rather than a bound function, which would be pickled by its name and so come back as the class's method.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.owner = owner
        self.name = name
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.jit.is_tracing():
            return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)
        return self.function(self.owner, *args, **kwargs)


def own(owner: Any, origin: type, *methods: str) -> str | None:
    """Which of the methods is not that of torchvision's class `origin`, in words; None if all are."""
    for method in methods:
        if getattr(type(owner), method, None) is not getattr(origin, method):
            return f"{type(owner).__name__} has another {method} than torchvision's {origin.__name__}"
        if not isinstance(getattr(owner, "__dict__", {}).get(method), Instead | None):
            return f"{method} was set on the instance"
    return None
