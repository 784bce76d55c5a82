"""Receive webhooks: verify each one, print it, answer 204. Standard library only.

Run it as: SECRET=whsec_… python examples/receive.py 9000
An id may come twice, since delivery is at least once: remember the ids that you have handled.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = base64.b64decode(os.environ["SECRET"].removeprefix("whsec_"))


class Receiver(BaseHTTPRequestHandler):
    """One webhook."""

    def do_POST(self) -> None:
        """Answer 204 to a webhook that is genuine and not old, 401 to any other."""
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        name, sent_at = self.headers.get("webhook-id", ""), self.headers.get("webhook-timestamp", "")
        digest = hmac.new(KEY, f"{name}.{sent_at}.".encode() + body, hashlib.sha256).digest()
        expected = "v1," + base64.b64encode(digest).decode()
        given = self.headers.get("webhook-signature", "").split()
        fresh = sent_at.isdecimal() and abs(time.time() - int(sent_at)) < 300  # noqa: TID251  a receiver has its clock
        genuine = fresh and any(hmac.compare_digest(expected, one) for one in given)
        self.send_response(204 if genuine else 401)
        self.end_headers()
        print(name, body.decode() if genuine else "refused", flush=True)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Receiver).serve_forever()
