"""Registry: the names of one kind of function, built-in ones and those that a package of the user adds."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

from gpt2lab.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])


class Registry(Collection[str]):
    """Names in the order in which they were added; the built-in functions are in the module that calls them.

    Args:
        kind: of the functions, for messages.
        built_in: names that cannot be added again.
    """

    def __init__(self, kind: str, *built_in: str) -> None:
        self.kind = kind
        self.built_in = built_in
        self.added: dict[str, Callable[..., Any]] = {}

    def add(self, name: str) -> Callable[[Function], Function]:
        """Return a decorator that adds a function: `@DIVERGENCES.add("my_divergence")`.

        Raises:
            InputError: the name is built in, or another module has added it.
        """

        def add(function: Function) -> Function:
            taken = self.added.get(name)
            if name in self.built_in or (taken is not None and taken.__module__ != function.__module__):
                owner = "is built in" if taken is None else f"is that of {taken.__module__}"
                raise InputError(
                    f"{function.__module__} adds the {self.kind} {name}, a name that {owner}.\nGive it another name."
                )
            self.added[name] = function
            return function

        return add

    def __iter__(self) -> Iterator[str]:
        return iter((*self.built_in, *self.added))

    def __contains__(self, name: object) -> bool:
        return name in self.built_in or name in self.added

    def __len__(self) -> int:
        return len(self.built_in) + len(self.added)
