"""Whether published weights can be downloaded, found out within seconds."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request

from huggingface_hub import constants

# Seconds: of a try to connect, and of all the waiting (name resolution knows no timeout).
_CONNECT, _WAIT = 3.0, 5.0


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids downloads."""
    stated = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return stated or constants.HF_HUB_OFFLINE


def unreachable(url: str) -> str | None:
    """Why a host does not answer, within seconds; None where it does. Any HTTP status is one."""
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_CONNECT)
            outcome.append(None)
        except urllib.error.HTTPError:
            outcome.append(None)
        except (OSError, ValueError) as error:
            outcome.append(str(getattr(error, "reason", error)))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_WAIT)
    return outcome[0] if outcome else "no answer"
