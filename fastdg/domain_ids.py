"""Integer domain ids from domain names."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class DomainIds:
    """Ids 0 to D - 1 of domain names: strings, years, database keys.

    Args:
        names: the training domains in the order of their ids, a list, an array or a tensor. Repeats
            count once, so a column of the whole data set is fine. Sort it if runs on other data
            need the same ids.

    ``ids(names)`` gives the ids of a batch, ``[N]`` int64; ``ids[name]`` gives one id;
    ``ids.inverse(ids)`` gives the names; ``len(ids)`` is D, for ``num_domains=``. To checkpoint,
    save the list ``ids.names``; to restore, call ``DomainIds(names)``.

    Raises:
        TypeError, ValueError: ``names`` is empty, or one of them cannot be a key.

    Example:
        >>> ids = fastdg.DomainIds(["art", "photo", "sketch"])
        >>> opt = fastdg.Fishr(base, num_domains=len(ids))
        >>> opt.backward(losses, ids(batch["domain"]))
    """

    def __init__(self, names: Iterable[Hashable]) -> None:
        self.names: list[Any] = list(dict.fromkeys(_listed(names)))
        if not self.names:
            raise ValueError("names: expected at least one name, got none.")
        self._ids = {name: i for i, name in enumerate(self.names)}

    def __call__(
        self, names: Iterable[Hashable], device: torch.device | str | None = None
    ) -> Tensor:
        """Return the ids of these names, ``[N]`` int64, on ``device``.

        The default device is the CPU, where wrappers check ids without a host sync.

        Raises:
            TypeError, ValueError: a name is not among ``self.names``.
        """
        return torch.tensor([self[name] for name in _listed(names)], dtype=torch.int64).to(device)

    def __getitem__(self, name: Hashable) -> int:
        if name in self:
            return self._ids[name]
        texts = {str(known): known for known in self.names}
        near = [texts[t] for t in difflib.get_close_matches(str(name), texts, n=3, cutoff=0.0)]
        raise ValueError(
            f"names: expected one of {len(self)} domains, got {name!r}; the nearest are {near}. "
            "Pass all training domains to DomainIds."
        )

    def __contains__(self, name: object) -> bool:
        return isinstance(name, Hashable) and name in self._ids

    def __iter__(self) -> Iterator[Any]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def inverse(self, ids: Iterable[int] | Tensor) -> list[Any]:
        """Return the names of these ids.

        Raises:
            ValueError: an id is not one of 0 to D - 1.
        """
        numbers = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        for number in numbers:
            if not 0 <= number < len(self):
                raise ValueError(f"ids: expected ids from 0 to {len(self) - 1}, got {number}.")
        return [self.names[number] for number in numbers]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DomainIds) and self.names == other.names

    def __hash__(self) -> int:
        return hash(tuple(self.names))

    def __repr__(self) -> str:
        return f"DomainIds({self.names!r})"


def _listed(names: Any) -> list[Any]:
    """Return the names as a list of Python values."""
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise TypeError(
            f"names: expected a list of names, got {names!r}. For one name, use ids[name]."
        )
    listed = names.tolist() if hasattr(names, "tolist") else list(names)
    listed = listed if isinstance(listed, list) else [listed]
    listed = [name.item() if isinstance(name, Tensor) else name for name in listed]
    for name in listed:
        if not isinstance(name, Hashable) or name != name:
            raise TypeError(
                f"names: expected names that can be keys (strings, numbers), got {name!r}."
            )
    return listed
