"""Shards that are asked at once, and answered for within a time limit."""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from memorizing.errors import MemorizingError, MemoryFolderError
from memorizing.ray.cluster import NAMESPACE, find_head, get, import_ray
from memorizing.ray.shard import UNKNOWN, View
from memorizing.ray.wire import decode, encode

_HEDGE = 0.5
"""After this share of the limit, another replica is asked too."""


def is_unknown(answer: Any) -> bool:
    """Whether a shard answered that it was restarted."""
    return isinstance(answer, str) and answer == UNKNOWN


class Replica:
    """One process that has a shard. What does not answer is not asked again until it has."""

    def __init__(self, name: str, handle: Any) -> None:
        """Take an actor, whose view is open."""
        self.name = name
        self._handle: Any = handle
        self._owed: Any = None
        """What it has to answer first."""
        self._opening: tuple[Any, ...] = ()

    def keep_open(self, view: View, median: float | None) -> None:
        """What it is asked to open when it comes back."""
        self._opening = view, median

    def submit(self, method: str, *arguments: Any) -> Any:
        """Ask, and do not wait; gives Ray's reference of the answer."""
        return getattr(self._handle, method).remote(*arguments)

    def wait_for(self, ref: Any) -> None:
        """Ask nothing more until this is answered."""
        self._owed = ref

    def is_ready(self) -> bool:
        """Whether it answers, as far as is known. What came back is asked to open its view."""
        ray = import_ray()
        if self._owed is None:
            return True
        if not ray.wait([self._owed], timeout=0)[0]:
            return False
        ref, self._owed = self._owed, None
        try:
            if not is_unknown(get(ref)):
                return True
        except (ray.exceptions.RayError, MemorizingError):
            pass
        self.revive()
        return False

    def revive(self) -> None:
        """Ask what was restarted, by Ray or by whoever serves, to open the view again."""
        ray = import_ray()
        with contextlib.suppress(ValueError):  # nobody serves it now
            self._handle = ray.get_actor(self.name, NAMESPACE)
        self._owed = self.submit("open", *self._opening)


class Shards:
    """All shards of a served memory, as one client asks them."""

    def __init__(self, address: str, replicas: Sequence[Sequence[Replica]], limit_s: float) -> None:
        """Take the replicas of every shard.

        Args:
            address: for messages.
            replicas: per shard.
            limit_s: seconds that a round of questions may take.
        """
        self.address, self.replicas, self.limit_s = address, replicas, limit_s
        self.left_out: Counter[int] = Counter()
        """Per shard, the rounds that it was asked in and did not answer."""
        self._view = ""
        self._away: set[int] = set()
        self._turn = itertools.count()

    def open(self, view: View, median: float | None, limit_s: float) -> list[Any]:
        """Open a view in every replica, and wait for all that are there.

        Returns:
            Per shard, what it opened.

        Raises:
            MemorizingError: as `Shard.open`; or a shard has no replica that answers.
        """
        ray = import_ray()
        self._view = view.number
        refs = {}
        for shard, replicas in enumerate(self.replicas):
            for replica in replicas:
                replica.keep_open(view, median)
                refs[replica.submit("open", view, median)] = shard, replica
        ray.wait(list(refs), num_returns=len(refs), timeout=limit_s)
        answers: dict[int, Any] = {}
        for ref, (shard, replica) in refs.items():
            if not ray.wait([ref], timeout=0)[0]:
                replica.wait_for(ref)
                continue
            try:
                answers[shard] = get(ref)
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError:
                replica.revive()
        missing = sorted(set(range(len(self.replicas))) - answers.keys())
        if missing:
            raise MemoryFolderError(
                f"shards {missing} of {self.address} do not answer; open it again when they do "
                "(Ray restarts them), or look at `memorizing memory serve`"
            )
        return [answers[shard] for shard in range(len(self.replicas))]

    def ask(
        self,
        method: str,
        arguments: Mapping[int, Sequence[Any]],
        among: Mapping[int, Replica] | None = None,
    ) -> dict[int, tuple[Any, Replica]]:
        """Ask shards at once. What does not answer within the limit is left out, and warned of.

        Args:
            method: of `OpenShard`.
            arguments: per shard that is asked.
            among: per shard, the replica that has to answer; None is any.

        Returns:
            Per shard that answered, its answer and the replica that gave it.

        Raises:
            MemorizingError: a shard raised it.

        Warns:
            UserWarning: a shard did not answer that did before.
        """
        ray = import_ray()
        find_head(ray).check()
        start, turn = time.monotonic(), next(self._turn)
        answers: dict[int, tuple[Any, Replica]] = {}
        pending: dict[Any, tuple[int, Replica]] = {}
        untried = {
            shard: self._list_replicas(shard, turn) if among is None else [among[shard]]
            for shard in arguments
        }

        # All shards are often asked the same.
        payloads = {id(one): encode(one) for one in arguments.values()}

        def submit(shard: int) -> None:
            while untried[shard]:
                replica = untried[shard].pop(0)
                if replica.is_ready():
                    payload = payloads[id(arguments[shard])]
                    ref = replica.submit("ask", self._view, method, payload)
                    pending[ref] = shard, replica
                    return

        for shard in arguments:
            submit(shard)
        is_hedged = False
        while any(shard not in answers for shard, _ in pending.values()):
            end = start + self.limit_s * (1.0 if is_hedged else _HEDGE)
            refs = list(pending)
            done = ray.wait(refs, timeout=max(0.0, end - time.monotonic()))[0]
            if done and len(refs) > 1:
                # All that are there: waiting for one of many again and again takes the square.
                done = ray.wait(refs, num_returns=len(refs), timeout=0)[0]
            if not done and is_hedged:
                break
            if not done:
                is_hedged = True
                for shard in arguments.keys() - answers.keys():
                    submit(shard)
            for ref in done:
                shard, replica = pending.pop(ref)
                try:
                    answer = get(ref)
                except ray.exceptions.RayTaskError:
                    raise
                except ray.exceptions.RayError:
                    answer = UNKNOWN
                if isinstance(answer, str):  # UNKNOWN: all else is bytes
                    replica.revive()
                    submit(shard)
                else:
                    answers.setdefault(shard, (decode(answer), replica))
        for ref, (_, replica) in pending.items():
            replica.wait_for(ref)
        self._note(arguments.keys(), answers.keys())
        return answers

    def _list_replicas(self, shard: int, turn: int) -> list[Replica]:
        """Another one first every time."""
        replicas = self.replicas[shard]
        first = turn % len(replicas)
        return [*replicas[first:], *replicas[:first]]

    def _note(self, asked: Any, answered: Any) -> None:
        missing = asked - answered
        self.left_out.update(missing)
        new, self._away = missing - self._away, (self._away - answered) | missing
        if new:
            warnings.warn(
                f"shards {sorted(new)} of the {len(self.replicas)} of {self.address} did not "
                f"answer within {self.limit_s:g} s: what they hold is left out until they do",
                stacklevel=2,
            )
