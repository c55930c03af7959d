"""A relay before a web server, which holds its answers back or hangs up while a test says so."""

import http.client
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Relay:
    """asked, answered: paths of the requests that came in and of those that were answered."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.asked: list[str] = []
        self.answered: list[str] = []
        self.failing = False  # hangs up
        self._answering = threading.Event()
        self.answer()

    def hold(self) -> None:
        self._answering.clear()

    def answer(self) -> None:
        self._answering.set()

    def wait(self) -> None:
        self._answering.wait()


@contextmanager
def relayed(uri: str) -> Iterator[Relay]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            relay.asked.append(self.path)
            if relay.failing:
                return
            kept = {name: self.headers[name] for name in self.headers if name != "Host"}
            with closing(http.client.HTTPConnection(urlsplit(uri).netloc)) as behind:
                behind.request(self.command, self.path, body, kept)
                answer = behind.getresponse()
                content = answer.read()
            relay.wait()
            relay.answered.append(self.path)
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_PATCH = do_POST = do_PUT = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        relay = Relay(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield relay
        finally:
            relay.answer()
            server.shutdown()
            thread.join()
