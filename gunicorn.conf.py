"""Configures gunicorn, which reads this file on its own. Its command line takes precedence."""

import os
import resource
import runpy
import signal
import socket
import weakref
from pathlib import Path

# Checks all settings before a worker starts. Run, not imported: gunicorn's master would keep the
# module, and SIGHUP would serve the old code.
service = runpy.run_path(str(Path(__file__).with_name("usercount.py")), run_name="usercount")

_, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
open_files = 16384 if hard_limit < 0 else min(16384, hard_limit)  # per worker
resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, hard_limit))

bind = f"{'[::]' if socket.has_dualstack_ipv6() else '0.0.0.0'}:{service['PORT']}"
workers = os.environ.get("WEB_CONCURRENCY", 1)  # gunicorn itself reads it before .env is loaded
worker_class = "gevent"  # a greenlet for each waiting request, however many there are
worker_connections = open_files * 9 // 10  # more have to wait, so that files do not run out
keepalive = 75  # seconds; longer than clients' polling intervals and load balancers' idle timeouts
graceful_timeout = 8  # seconds; longer than any request, and Docker kills after 10
control_socket_disable = True
proxy_allow_ips = "127.0.0.1,::1,::ffff:127.0.0.1"  # the last is how [::] sees the first
# Each worker ignores SIGINT: a terminal's Ctrl-C reaches it, too, but the master is to end it.
# finalize() merely makes a callable that drops its argument, the worker, and calls signal.signal().
post_worker_init = weakref.finalize(signal, signal.signal, signal.SIGINT, signal.SIG_IGN)
