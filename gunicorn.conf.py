"""Configures gunicorn, which reads this file on its own."""

from gevent import monkey

monkey.patch_all()  # before anything creates a lock

import resource  # noqa: E402
import runpy  # noqa: E402
import socket  # noqa: E402
from contextlib import suppress  # noqa: E402
from pathlib import Path  # noqa: E402

import gevent  # noqa: E402
from gevent.pywsgi import Input, unquote_latin1  # noqa: E402
from gunicorn.workers.ggevent import GeventPyWSGIWorker, PyWSGIHandler  # noqa: E402
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, parse_url  # noqa: E402

# Run, not imported: gunicorn's master would cache it, and SIGHUP would serve the old code.
settings = runpy.run_path(str(Path(__file__).with_name("usercount.py")), run_name="usercount")

KEEPALIVE_TIMEOUT_SECONDS = 5  # between two packets, hence also between requests
REQUEST_TIMEOUT_SECONDS = 12  # from the end of a response to the end of the next
MAX_HEAD_BYTES = 65536  # of a request
MAX_OPEN_FILES = 16384  # per worker


class Handler(PyWSGIHandler):
    """Handles a connection. As bodies are not read, a request with one is its last."""

    is_stopping = False

    def handle(self):
        self.socket.settimeout(KEEPALIVE_TIMEOUT_SECONDS)
        loop = gevent.get_hub().loop
        self.timer = loop.timer(REQUEST_TIMEOUT_SECONDS, repeat=REQUEST_TIMEOUT_SECONDS)
        try:
            with suppress(OSError):  # the client is gone
                super().handle()
        finally:
            self.timer.close()

    def cut_off(self):
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def read_requestline(self):
        gevent.sleep(0)  # a fast client must not starve the others
        self.timer.again(self.cut_off, update=True)  # restarts it
        self.environ = None
        return super().read_requestline()

    def read_request(self, raw_requestline):
        """Parse a request's head; return False if none came, raise ValueError if it is invalid.

        With llhttp, as Python's email parser, which gevent uses, takes longer than all the rest.
        """
        self.requestline = raw_requestline.rstrip()
        head = [raw_requestline.encode("latin-1")]
        size = 0
        while head[-1] not in (b"\r\n", b"\n", b""):
            try:
                head.append(self.rfile.readline(MAX_HEAD_BYTES))
            except OSError:  # the client is gone, or silent for too long
                return False
            size += len(head[-1])
            if size > MAX_HEAD_BYTES:
                raise ValueError("head too large")
        self.path, self.headers, self.target = "", {}, None
        self.parser = HttpRequestParser(self)
        try:
            with suppress(HttpParserUpgrade):  # not supported: a request like any other
                self.parser.feed_data(b"".join(head))
        except HttpParserError as error:
            raise ValueError(error.__context__ or error) from None
        if self.target is None:
            raise ValueError("head not complete")
        return True

    def on_url(self, url):
        self.path += url.decode("latin-1")

    def on_header(self, name, value):
        name, value = name.decode("latin-1").lower(), value.decode("latin-1")
        self.headers[name] = f"{self.headers[name]},{value}" if name in self.headers else value

    def on_headers_complete(self):
        self.target = parse_url(self.path.encode("latin-1"))
        self.command = self.parser.get_method().decode()
        self.request_version = f"HTTP/{self.parser.get_http_version()}"
        length = self.headers.get("content-length", "0")
        self.has_body = length != "0" or "transfer-encoding" in self.headers
        self.close_connection = self.has_body or not self.parser.should_keep_alive()

    def get_environ(self):
        self.wsgi_input = Input(self.rfile, 0)
        address, port = self.client_address[:2] or ("", "")  # a Unix socket has none
        return {
            **self.server.get_environ(),
            **{
                "HTTP_" + name.upper().replace("-", "_"): value
                for name, value in self.headers.items()
                if "_" not in name  # it would pass for one with a hyphen
            },
            "REQUEST_METHOD": self.command,
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote_latin1((self.target.path or b"/").decode("latin-1")),
            "QUERY_STRING": (self.target.query or b"").decode("latin-1"),
            "SERVER_PROTOCOL": self.request_version,
            "REMOTE_ADDR": address,
            "REMOTE_PORT": str(port),
            "RAW_URI": self.path,  # for the access log
            "wsgi.input": self.wsgi_input,
        }

    def handle_one_response(self):
        super().handle_one_response()
        if self.has_body:  # closing before it is read would lose the response in a reset
            self.socket.shutdown(socket.SHUT_WR)
            while self.rfile.read1(65536):
                pass

    def finalize_headers(self):
        super().finalize_headers()
        self.close_connection |= self.is_stopping
        if self.close_connection and self.request_version != "HTTP/1.0":  # gevent adds it itself
            self.response_headers.append((b"Connection", b"close"))

    def process_result(self):
        """Send the response in one packet; gevent would send its head and body separately."""
        body = b"".join(self.result)
        self.headers_sent = True
        self.finalize_headers()
        head = [b"HTTP/1.1 " + self.status]
        head += [name + b": " + value for name, value in self.response_headers]
        self._sendall(b"\r\n".join([*head, b"", body]))

    def log_request(self):
        if self.environ:  # unless it could not be parsed
            super().log_request()

    def log_error(self, msg, *args):
        self.server.log.write(msg % args if args else msg)  # with a timestamp, like the rest


class Worker(GeventPyWSGIWorker):
    """gevent's own WSGI server: twice the requests per second of gunicorn's gevent worker."""

    wsgi_handler = Handler
    is_quitting = False

    def handle_exit(self, sig, frame):
        Handler.is_stopping = True
        super().handle_exit(sig, frame)

    def handle_quit(self, sig, frame):
        if not self.is_quitting:  # Ctrl-C comes from the terminal and from gunicorn's master
            self.is_quitting = True
            super().handle_quit(sig, frame)


_, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
open_files = MAX_OPEN_FILES if hard_limit < 0 else min(MAX_OPEN_FILES, hard_limit)
resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, hard_limit))

bind = f"0.0.0.0:{settings['PORT']}"
workers = settings["WEB_CONCURRENCY"]
worker_class = Worker
worker_connections = open_files * 9 // 10  # more have to wait, so that files do not run out
graceful_timeout = 8  # longer than any request or idle connection lasts
control_socket_disable = True
