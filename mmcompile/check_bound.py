"""Warn of heads whose output was further from dense attention than the user allows.

No prefill waits for the device: the errors are copied to the host behind it, and whatever call comes next (a decode
step, another prefill, `stats`) looks at those that have arrived.
"""

import threading
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_NAMED = 20  # heads in one warning, the worst first


class CheckWarning(UserWarning):
    """Some heads of a prefill were further from dense attention than `check_bound`."""


@dataclass(frozen=True)
class Bound:
    """The largest error of a head that is no news, and whom the errors belong to: the name of each head, in order."""

    error: float
    names: tuple[str, ...]

    def message(self, errors: Sequence[float]) -> str | None:
        """What to say of these errors; None where all are within the bound, or not known (NaN)."""
        over = [(error, name) for error, name in zip(errors, self.names, strict=True) if error > self.error]
        if not over:
            return None
        over.sort(key=lambda one: -one[0])
        named = ", ".join(f"{name} ({error:.2g})" for error, name in over[:MOST_NAMED])
        more = f", and {len(over) - MOST_NAMED} more" if len(over) > MOST_NAMED else ""
        return (
            f"a prefill's output was further from dense attention than check_bound={self.error:g} in {len(over)} heads "
            f"of those that were checked: {named}{more}. A larger density or recall computes more of them"
        )


@dataclass(frozen=True, eq=False)
class _Sent:
    """Errors on their way to the host."""

    bound: Bound
    errors: Tensor  # float32 [heads], on the host
    arrived: torch.cuda.Event | None  # None where they have been there all along


_sent: deque[_Sent] = deque()
_lock = threading.Lock()


def send(bound: Bound, errors: Sequence[Tensor]) -> None:
    """Let the calls that follow know. errors: float32 [H] of each site. Waits for nothing."""
    of_all = torch.cat(list(errors))
    arrived = None
    if of_all.is_cuda:
        with torch.cuda.device(of_all.device):  # an event stands in the stream of the current device
            of_all = of_all.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
    with _lock:
        _sent.append(_Sent(bound, of_all, arrived))


def warn_of_arrived(*, wait: bool = False) -> None:
    """Warn of what has arrived by now. wait: for all of it."""
    while _sent:
        with _lock:
            if not _sent or not (wait or _sent[0].arrived is None or _sent[0].arrived.query()):
                return
            one = _sent.popleft()
        if one.arrived is not None:
            one.arrived.synchronize()
        message = one.bound.message(one.errors.tolist())
        if message is not None:
            warnings.warn(message, CheckWarning, stacklevel=3)
