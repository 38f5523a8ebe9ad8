"""The secret that a policy server shares with its clients."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence


class Token:
    """A bearer token; keeps a digest alone.

    Raises:
        ValueError: a text that no HTTP header can hold.
    """

    def __init__(self, text: str) -> None:
        if not text or not all("!" <= character <= "~" for character in text):
            raise ValueError(
                "the token must be of visible ASCII characters without spaces, at least one"
            )
        self._digest = _digest(text)

    def allows(self, authorization: Sequence[str]) -> bool:
        """Whether the request's ``Authorization`` headers are one, with this token.

        ``Bearer <token>``, or openpi's ``Api-Key <token>``. The time it takes tells nothing of the
        token: digests are compared, all of one length, in constant time.
        """
        value = authorization[0] if len(authorization) == 1 else ""
        scheme, _, text = value.strip().partition(" ")
        is_equal = hmac.compare_digest(_digest(text.strip()), self._digest)
        return is_equal and scheme.lower() in ("bearer", "api-key")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()
