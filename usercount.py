"""Serves the number of users over HTTP, from a count that PostgreSQL keeps by triggers.

Two routes: GET /api/usercount and GET /health. RequestCoalescer reads the count once for all the
requests that are waiting for it, and has Flask build the responses. None is older than its request,
and each takes at most two reads of READ_TIMEOUT_SECONDS.
"""

import itertools
import json
import logging
import os
import select
import socket
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import psycopg2
from dotenv import load_dotenv
from flask import Flask, Response, request
from psycopg2.extensions import POLL_OK, POLL_READ, TRANSACTION_STATUS_IDLE
from psycopg2.pool import ThreadedConnectionPool
from werkzeug.exceptions import HTTPException, ServiceUnavailable
from werkzeug.test import create_environ, run_wsgi_app

# --- Settings, from the environment or .env; the environment takes precedence ---


def read_setting(name, default, is_valid, expected):
    """Return the text of a setting; exit with a one-line error if it is invalid."""
    text = os.environ.get(name) or default
    if not is_valid(text):
        sys.exit(f"{name} must be {expected}, not {text!r}")
    return text


def is_port(text):
    return text.isascii() and text.isdecimal() and len(text) < 6 and 1 <= int(text) <= 65535


def are_ports(text):
    return all(map(is_port, text.split(","))) and text.count(",") in (0, len(DB_HOSTS) - 1)


try:
    load_dotenv(Path(__file__).with_name(".env"))
except (OSError, ValueError) as error:  # unreadable, or not text
    sys.exit(f".env cannot be read: {error}")
os.environ.pop("PGHOSTADDR", None)  # libpq would connect there instead of to DB_HOST
DB_HOSTS = read_setting(
    "DB_HOST", "localhost", lambda text: all(text.split(",")), "a host, or several: a,b"
).split(",")
DB_PORTS = read_setting("DB_PORT", "5432", are_ports, "a port, or one for each host").split(",")
DB_NAME = os.environ.get("DB_NAME") or "test001"
DB_USER = os.environ.get("DB_USER") or "postgres"
DB_PASSWORD = os.environ.get("DB_PASSWORD") or None  # None: libpq tries PGPASSWORD, ~/.pgpass
PORT = read_setting("PORT", "6776", is_port, "a port from 1 to 65535")
APP_ENVS = "development", "production"
APP_ENV = read_setting("APP_ENV", APP_ENVS[0], APP_ENVS.__contains__, " or ".join(APP_ENVS))
TARGET_SESSION_ATTRS = os.environ.get("PGTARGETSESSIONATTRS") or "primary"
PREFERS_STANDBY = TARGET_SESSION_ATTRS == "prefer-standby"  # in the first attempt of a read

READ_TIMEOUT_SECONDS = 2  # for all its targets and retries; a response takes two reads at most
LOOKUP_TIMEOUT_SECONDS = 0.5  # of these, for DNS
TCP_USER_TIMEOUT_MILLISECONDS = 500  # unacknowledged for this long, a connection counts as lost
MAX_ATTEMPTS = 3  # for each target, per read
RETRY_DELAY_SECONDS = 0.1
MAX_CONNECTION_AGE_SECONDS = 30  # firewalls silently drop idle connections
MAX_POOL_CONNECTIONS = 20
MAX_IDLE_CONNECTIONS = 1  # there is only one read at a time
SLOW_QUERY_MILLISECONDS = 100
BATCH_DELAY_SECONDS = 0.0005  # lets more requests join a batch that had to wait

logging.basicConfig(
    format="[%(asctime)s] [%(process)d] [%(levelname)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S %z"
)
app = Flask(__name__, static_folder=None)
app.url_map.merge_slashes = False  # 404 for /api//usercount, not a redirect
app.logger.setLevel(logging.INFO if APP_ENV == "production" else logging.DEBUG)

# --- The database ---

# Cancels the query on the server once its client has given up.
COUNT_SQL = f"""
    SET LOCAL statement_timeout = '{READ_TIMEOUT_SECONDS}s';
    SELECT total_users, last_updated, pg_is_in_recovery() FROM public.user_stats
"""


class WrongServer(psycopg2.OperationalError):
    """The server is a standby, whose count may be old, or not the standby that is asked for."""


# By pg_is_in_recovery(). libpq asks once, but a connection through PgBouncer outlives a failover.
EXCLUDED = {"primary": True, "read-write": True, "standby": False}

# Worth a retry on a new connection; any other error would recur.
CONNECTION_ERRORS = psycopg2.OperationalError, psycopg2.InterfaceError


class Target(NamedTuple):
    """One address of one of the hosts in DB_HOST."""

    host: str
    address: str | None  # None: host is the directory of a Unix socket; "": not known
    port: str

    def __str__(self):
        name = " ".join(dict.fromkeys([self.host, self.address or self.host]))
        return f"{name} port {self.port}"


class TargetPool(ThreadedConnectionPool):
    """Connections to one target, replaced by a new pool after MAX_CONNECTION_AGE_SECONDS."""

    def __init__(self, target, attrs):
        super().__init__(
            minconn=0,  # opens none yet
            maxconn=MAX_POOL_CONNECTIONS,
            host=target.host,  # what TLS verifies and .pgpass lists
            hostaddr=target.address,
            port=target.port,
            dbname=DB_NAME,
            user=DB_USER,
            password=DB_PASSWORD,
            fallback_application_name="usercount",
            tcp_user_timeout=TCP_USER_TIMEOUT_MILLISECONDS,
            target_session_attrs="any" if attrs in ("primary", "standby") else attrs,
            async_=True,  # connects outside the pool's lock, within our deadline; autocommits
        )
        self.minconn = MAX_IDLE_CONNECTIONS  # beyond that, the pool closes what is returned
        self.target = target
        self.attrs = attrs
        self.has_logged_slow_query = False
        self.expires_at = time.monotonic() + MAX_CONNECTION_AGE_SECONDS

    def read_count(self, deadline):
        """Return total_users, last_updated; raise psycopg2.Error, at the deadline TimeoutError."""
        connection = self.getconn()
        try:
            wait(connection, deadline)  # until connected
            began = time.monotonic()
            cursor = connection.cursor()
            cursor.execute(COUNT_SQL)
            wait(connection, deadline)
            milliseconds = (time.monotonic() - began) * 1000
            app.logger.debug("Read the count in %.1f ms", milliseconds)
            if milliseconds > SLOW_QUERY_MILLISECONDS and not self.has_logged_slow_query:
                self.has_logged_slow_query = True
                app.logger.warning("Slow query: %.0f ms", milliseconds)
            *count, is_standby = cursor.fetchone()
            if is_standby is EXCLUDED.get(self.attrs):
                kind = "a standby" if is_standby else "not a standby"
                raise WrongServer(f"{kind}: set PGTARGETSESSIONATTRS=any to read from it, too")
            return count
        finally:
            is_idle = connection.info.transaction_status == TRANSACTION_STATUS_IDLE
            self.putconn(connection, close=not is_idle)


def wait(connection, deadline):
    """Wait until an asynchronous connection is ready; raise TimeoutError at the deadline."""
    while (state := connection.poll()) != POLL_OK:
        poller = select.poll()
        poller.register(connection, select.POLLIN if state == POLL_READ else select.POLLOUT)
        if not poller.poll(max(0, deadline - time.monotonic()) * 1000):
            raise TimeoutError("no answer in time")


class Database:
    """Reads the count from the first target that answers; supports one read at a time."""

    def __init__(self):
        self.targets = []
        self.addresses = {}  # of each host name, as last looked up
        self.lookups = {}  # the thread that looks up a host name
        self.pool = None  # of the target that answered last
        self.serving = None  # the target that was logged last
        self.logged_reasons = {}  # of each target that has not answered since

    def read_count(self):
        """Return the number of users and when it last changed (an aware datetime), as of now.

        Raises ServiceUnavailable if no target answers within READ_TIMEOUT_SECONDS. Each is retried,
        unless it timed out or rejected the query.
        """
        began = time.monotonic()
        errors = {}  # the last one of each target
        for attempt in range(MAX_ATTEMPTS):
            targets = [
                target
                for target in self.find_targets(began + LOOKUP_TIMEOUT_SECONDS)
                if target not in errors or isinstance(errors[target], CONNECTION_ERRORS)
            ]
            time.sleep(RETRY_DELAY_SECONDS if attempt and targets else 0)
            for index, target in enumerate(targets):
                now = time.monotonic()
                shares = len(targets) - index + (attempt == 0 and PREFERS_STANDBY)  # still needed
                seconds = max(0, began + READ_TIMEOUT_SECONDS - now) / shares
                try:
                    count = self.read_from(target, now + seconds, attempt)
                except (psycopg2.Error, TimeoutError) as error:
                    errors[target] = error
                    self.close_pool()
                else:
                    self.log(errors, target)
                    return count
        self.log(errors, None)
        raise ServiceUnavailable("The count is temporarily unavailable.", retry_after=1)

    def read_from(self, target, deadline, attempt):
        if self.pool:
            with suppress(*CONNECTION_ERRORS):  # the open connection may have been lost
                return self.pool.read_count(deadline)
        if target.address == "":
            raise TimeoutError("its address is not known")
        self.close_pool()
        attrs = TARGET_SESSION_ATTRS.replace("prefer-standby", "any" if attempt else "standby")
        self.pool = TargetPool(target, attrs)
        return self.pool.read_count(deadline)

    def close_pool(self):
        if self.pool:
            self.pool.closeall()
            self.pool = None

    def find_targets(self, deadline):
        """Return the targets, in the order of DB_HOST but for the one whose connection is open.

        That one comes first until its connection has to be replaced; so reads return to the first
        target on their own. Names are looked up in threads, as psycopg2's asynchronous connect does
        it with the interpreter locked; one that no longer resolves keeps its last addresses.
        """
        if self.pool and time.monotonic() < self.pool.expires_at:
            return sorted(self.targets, key=lambda target: target != self.pool.target)
        self.close_pool()  # first, as the server may have no other connection left
        for host in DB_HOSTS:
            if host.startswith(("/", "@")):
                self.addresses[host] = [None]
            elif host not in self.lookups or not self.lookups[host].is_alive():
                self.lookups[host] = threading.Thread(target=self.look_up, args=[host], daemon=True)
                self.lookups[host].start()
        for lookup in self.lookups.values():
            lookup.join(max(0, deadline - time.monotonic()))
        self.targets = [
            Target(host, address, port)
            for host, port in zip(DB_HOSTS, itertools.cycle(DB_PORTS))
            for address in self.addresses.get(host, [""])
        ]
        return self.targets

    def look_up(self, host):
        with suppress(OSError, UnicodeError):  # UnicodeError: no host name
            found = socket.getaddrinfo(host.encode("idna").decode(), None, type=socket.SOCK_STREAM)
            self.addresses[host] = list(dict.fromkeys(address[0] for *_, address in found))

    def log(self, errors, serving):
        """Log what serves when that changes, and errors: a line per reason, not per request."""
        for target, error in errors.items():
            reason = str(error).partition("\n")[0]
            is_excluded = isinstance(error, WrongServer) or "session is" in reason  # by libpq
            if serving and (target == serving or is_excluded):
                continue
            if isinstance(error, psycopg2.errors.UndefinedTable):
                reason += " (run python setup_db.py)"
            if reason not in self.logged_reasons.setdefault(target, set()):
                self.logged_reasons[target].add(reason)
                app.logger.error("Database unavailable: %s: %s", target, reason)
        self.logged_reasons.pop(serving, None)
        if serving and serving != self.serving:
            app.logger.info("Reading from %s", serving)
        self.serving = serving


# --- HTTP ---


def json_response(payload, status=200, headers=()):
    """Return `payload` as a response: one line of JSON that must not be cached."""
    headers = [*headers, ("Cache-Control", "no-store")]
    return Response(json.dumps(payload) + "\n", status, headers, mimetype="application/json")


def iso_utc(moment):
    """Return an aware datetime as ISO 8601 in UTC, to the millisecond: 2024-01-15T10:30:00.000Z."""
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds")[:-6] + "Z"


@app.get("/api/usercount")
def usercount():
    total_users, last_updated = request.environ["usercount.count"].result()
    return json_response({"totalUsers": total_users, "lastUpdated": iso_utc(last_updated)})


@app.get("/health")
def health():
    try:
        request.environ["usercount.count"].result()
        status, database = 200, {"status": "healthy", "connected": True}
    except ServiceUnavailable:
        status, database = 503, {"status": "unhealthy", "connected": False}
    timestamp = iso_utc(datetime.now(timezone.utc))
    payload = {"status": database["status"], "timestamp": timestamp, "database": database}
    return json_response(payload, status)


@app.errorhandler(HTTPException)
def handle_http_error(error):
    payload = {"statusCode": error.code, "error": error.name, "message": error.description}
    return json_response(payload, error.code, error.get_headers())  # Allow, Retry-After


class Batch:
    """Requests that wait for the same read, and the responses to them, by path."""

    def __init__(self):
        self.paths = set()
        self.responses = {}
        self.turnstile = threading.Lock()  # to pass one by one, cheaper than an Event for all
        self.turnstile.acquire()


class RequestCoalescer:
    """WSGI middleware that lets concurrent requests for `paths` share one read and its responses.

    Only a read that began after a request arrived may answer it. So while one batch is being
    answered, new requests gather in the next. Failed reads are shared as well. The application gets
    the count as a Future in environ["usercount.count"], and nothing of the clients' requests.
    """

    def __init__(self, application, paths, read_count):
        self.application = application
        self.environs = {path: create_environ(path) for path in paths}
        self.read_count = read_count
        self.batch_lock = threading.Lock()  # held while a batch is being answered
        self.next_batch = Batch()
        self.next_batch_lock = threading.Lock()

    def __call__(self, environ, start_response):
        path = "/" + environ["PATH_INFO"].lstrip("/")  # as Flask matches it
        method = environ["REQUEST_METHOD"].upper()
        if path not in self.environs or method not in ("GET", "HEAD"):
            return self.application(environ, start_response)
        with self.next_batch_lock:
            batch = self.next_batch
            is_first = not batch.paths
            batch.paths.add(path)
        if is_first:
            self.respond_to(batch)
        with batch.turnstile:
            body, status, headers = batch.responses[path]
            start_response(status, list(headers))  # as WSGI requires, unlike werkzeug's
        return [] if method == "HEAD" else body

    def respond_to(self, batch):
        has_to_wait = self.batch_lock.locked()
        with self.batch_lock:
            time.sleep(BATCH_DELAY_SECONDS if has_to_wait else 0)
            with self.next_batch_lock:
                self.next_batch = Batch()
            try:
                count = Future()
                try:
                    count.set_result(self.read_count())
                except Exception as error:
                    count.set_exception(error)
                for path in batch.paths:
                    environ = {**self.environs[path], "usercount.count": count}
                    response = run_wsgi_app(self.application, environ, buffered=True)
                    batch.responses[path] = response
            finally:
                batch.turnstile.release()


app.wsgi_app = RequestCoalescer(app.wsgi_app, ["/api/usercount", "/health"], Database().read_count)
