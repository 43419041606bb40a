"""Serves the number of users over HTTP, from a count that PostgreSQL keeps by triggers.

Two routes: GET /api/usercount and GET /health. Requests for them go through RequestCoalescer, which
reads the count once for all requests that are waiting and has Flask build the responses. A response
is never older than its request, and takes at most two reads of READ_TIMEOUT_SECONDS each.
"""

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
from dataclasses import dataclass, field
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


def read_setting(name, default, parse=str, expected="text"):
    """Return the parsed value of a setting; exit with a one-line error if it is invalid."""
    text = os.environ.get(name) or default
    try:
        return parse(text)
    except ValueError:
        sys.exit(f"{name} must be {expected}, not {text!r}")


def parse_hosts(text):
    hosts = [host.strip().removeprefix("[").removesuffix("]") for host in text.split(",")]
    if not all(hosts):
        raise ValueError
    return hosts


def parse_number(text):
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise ValueError
    return int(text)


def parse_port(text):
    if parse_number(text) > 65535:
        raise ValueError
    return int(text)


def parse_ports(text):
    """Return a port for each host."""
    ports = [parse_port(port) for port in text.split(",")]
    if len(ports) not in (1, len(DB_HOSTS)):
        raise ValueError
    return ports if len(ports) > 1 else ports * len(DB_HOSTS)


def parse_app_env(text):
    if text not in ("development", "production"):
        raise ValueError
    return text


dotenv = Path(__file__).with_name(".env")
try:
    if dotenv.exists() and not dotenv.is_file():
        raise OSError("not a regular file")
    load_dotenv(dotenv)
except (OSError, ValueError) as error:  # unreadable, or not text
    sys.exit(f".env cannot be read: {error}")
os.environ.pop("PGHOSTADDR", None)  # libpq would connect there instead of to DB_HOST
DB_HOSTS = read_setting("DB_HOST", "localhost", parse_hosts, "a host, or several with commas")
DB_PORTS = read_setting("DB_PORT", "5432", parse_ports, "a port from 1 to 65535, or one per host")
DB_NAME = read_setting("DB_NAME", "test001")
DB_USER = read_setting("DB_USER", "postgres")
DB_PASSWORD = os.environ.get("DB_PASSWORD") or None  # None: libpq tries PGPASSWORD, ~/.pgpass
PORT = read_setting("PORT", "6776", parse_port, "a port from 1 to 65535")
APP_ENV = read_setting("APP_ENV", "development", parse_app_env, "development or production")
WEB_CONCURRENCY = read_setting(
    "WEB_CONCURRENCY", "1", parse_number, "a number of worker processes, at least 1"
)

READ_TIMEOUT_SECONDS = 2  # for a whole read, retries and failover included
LOOKUP_TIMEOUT_SECONDS = 0.5  # of these, for DNS
TCP_USER_TIMEOUT_MILLISECONDS = 500  # unacknowledged for this long, a connection counts as lost
MAX_ATTEMPTS = 3  # to connect to each target, per read
RETRY_DELAY_SECONDS = 0.1
MAX_CONNECTION_AGE_SECONDS = 30  # firewalls silently drop idle connections
MAX_POOL_CONNECTIONS = 20
MAX_IDLE_CONNECTIONS = 1  # there is only one read at a time
RECOVERY_SECONDS = 5  # without a failure before an outage counts as over
SLOW_QUERY_MILLISECONDS = 100
BATCH_DELAY_SECONDS = 0.0005  # lets more requests join a batch that had to wait

logging.basicConfig(
    format="[%(asctime)s] [%(process)d] [%(levelname)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S %z"
)
app = Flask(__name__, static_folder=None)
app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False  # 405 for OPTIONS, too
app.url_map.merge_slashes = False  # 404 for /api//usercount, not a redirect
app.logger.setLevel(logging.INFO if APP_ENV == "production" else logging.DEBUG)

# --- The database ---

# Cancels the query on the server once its client has given up.
COUNT_SQL = f"""
    SET LOCAL statement_timeout = '{READ_TIMEOUT_SECONDS}s';
    SELECT total_users, last_updated FROM public.user_stats
"""

# Worth a retry on a new connection; any other error would recur.
CONNECTION_ERRORS = psycopg2.OperationalError, psycopg2.InterfaceError


class Target(NamedTuple):
    """One address of one of the hosts in DB_HOST."""

    host: str
    address: str | None  # None: host is the directory of a Unix socket
    port: int

    def __str__(self):
        address = f" ({self.address})" if self.address not in (None, self.host) else ""
        return f"{self.host}{address} port {self.port}"


class TargetPool(ThreadedConnectionPool):
    """Connections to one target; replaced by a new pool after MAX_CONNECTION_AGE_SECONDS."""

    def __init__(self, target):
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
            async_=True,  # connects outside the pool's lock, within our deadline; autocommits
        )
        self.minconn = MAX_IDLE_CONNECTIONS  # beyond that, the pool closes what is returned
        self.target = target
        self.has_logged_slow_query = False
        self.expires_at = time.monotonic() + MAX_CONNECTION_AGE_SECONDS

    def read_count(self, deadline):
        """Return the row of user_stats; raise psycopg2.Error, or TimeoutError at the deadline."""
        connection = self.getconn()
        try:
            wait(connection, deadline)  # until connected
            began = time.monotonic()
            with connection.cursor() as cursor:
                cursor.execute(COUNT_SQL)
                wait(connection, deadline)
                row = cursor.fetchone()
            milliseconds = (time.monotonic() - began) * 1000
            app.logger.debug("Read the count in %.1f ms", milliseconds)
            if milliseconds > SLOW_QUERY_MILLISECONDS and not self.has_logged_slow_query:
                self.has_logged_slow_query = True
                app.logger.warning("Slow query: %.0f ms", milliseconds)
            return row
        finally:
            is_usable = connection.info.transaction_status == TRANSACTION_STATUS_IDLE
            self.putconn(connection, close=not is_usable)


def wait(connection, deadline):
    """Wait until an asynchronous connection is ready; raise TimeoutError at the deadline."""
    while (state := connection.poll()) != POLL_OK:
        poller = select.poll()
        event = select.POLLIN if state == POLL_READ else select.POLLOUT
        poller.register(connection.fileno(), event)
        if not poller.poll(max(0, deadline - time.monotonic()) * 1000):
            raise TimeoutError("no answer in time")


@dataclass
class Outage:
    """When a target last failed, and the reasons that have been logged."""

    last_failed: float = 0
    reasons: set = field(default_factory=set)


class Database:
    """Reads the count from the first target that answers; supports one read at a time."""

    def __init__(self):
        self.targets = []
        self.pool = None  # of the target that answered last
        self.addresses = {}  # of each host name, as last looked up
        self.lookups = {}  # the thread that looks up a host name
        self.outages = {}  # by target
        self.serving = None  # the target that was logged last

    def read_count(self):
        """Return the number of users and when it last changed (an aware datetime), as of now.

        Raises ServiceUnavailable if no target answers within READ_TIMEOUT_SECONDS.
        """
        deadline = time.monotonic() + READ_TIMEOUT_SECONDS
        failures = {}
        for pool, untried in self.candidates(failures):
            now = time.monotonic()
            if now >= deadline:
                break
            try:
                count = pool.read_count(now + (deadline - now) / untried)
            except (psycopg2.Error, TimeoutError) as error:
                failures[pool.target] = error
                pool.closeall()
                self.pool = None
            else:
                failures.pop(pool.target, None)  # a lost connection, not an outage
                self.pool = pool
                self.log_failures(failures)
                self.log_success(pool.target)
                return count
        self.log_failures(failures)
        raise ServiceUnavailable("The count is temporarily unavailable.", retry_after=1)

    def candidates(self, failures):
        """Yield the pools to try, each with the number of targets that share the time left.

        First the current pool, unless it has expired, then a new one for each target in order, so
        reads return to the first target on their own. A target that could not be connected to or
        whose connection was lost is retried; one that timed out or rejected the query is not.
        """
        if self.pool and time.monotonic() < self.pool.expires_at:
            yield self.pool, len(self.targets)
        elif self.pool:
            self.pool.closeall()  # first, as the server may have no other connection left
            self.pool = None
        self.targets = self.find_targets()
        for host in {*DB_HOSTS} - {target.host for target in self.targets}:
            failures[host] = TimeoutError("no address known")
        for attempt in range(MAX_ATTEMPTS):
            time.sleep(RETRY_DELAY_SECONDS if attempt else 0)
            targets = [
                target
                for target in self.targets
                if target not in failures or isinstance(failures[target], CONNECTION_ERRORS)
            ]
            for index, target in enumerate(targets):
                yield TargetPool(target), len(targets) - index

    def find_targets(self):
        """Return the targets in the order of DB_HOST; a host that never resolved has none.

        Lookups run in threads, as DNS may take longer than a read may. A name that no longer
        resolves keeps its last known addresses.
        """
        deadline = time.monotonic() + LOOKUP_TIMEOUT_SECONDS
        for host in DB_HOSTS:
            if host.startswith(("/", "@")):
                self.addresses[host] = [None]
            elif host not in self.lookups or not self.lookups[host].is_alive():
                self.lookups[host] = threading.Thread(target=self.look_up, args=[host], daemon=True)
                self.lookups[host].start()
        for lookup in self.lookups.values():
            lookup.join(max(0, deadline - time.monotonic()))
        return [
            Target(host, address, port)
            for host, port in zip(DB_HOSTS, DB_PORTS, strict=True)
            for address in self.addresses.get(host, [])
        ]

    def look_up(self, host):
        with suppress(OSError, UnicodeError):  # UnicodeError: not a host name at all
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            self.addresses[host] = list(dict.fromkeys(address[0] for *_, address in found))

    def log_failures(self, failures):
        """Log errors by target: one line per reason, not per request.

        In place of a target, the key is a host name if it has no known address.
        """
        for target, error in failures.items():
            outage = self.outages.setdefault(target, Outage())
            outage.last_failed = time.monotonic()
            reason = isinstance(error, psycopg2.Error) and error.diag.message_primary
            reason = reason or " ".join(str(error).split())
            if isinstance(error, psycopg2.errors.UndefinedTable):
                reason += " (run python setup_db.py)"
            if reason not in outage.reasons:
                outage.reasons.add(reason)
                app.logger.error("Database unavailable: %s: %s", target, reason)

    def log_success(self, target):
        if target != self.serving:
            self.serving = target
            app.logger.info("Reading from %s", target)
        for failed in {target, target.host} & self.outages.keys():
            outage = self.outages[failed]
            if time.monotonic() - outage.last_failed > RECOVERY_SECONDS:
                app.logger.info("Database available again: %s", failed)
                del self.outages[failed]


# --- HTTP ---


def json_response(payload, status=200):
    """Return `payload` as a response: one line of JSON that must not be cached."""
    return Response(
        json.dumps(payload) + "\n",
        status,
        mimetype="application/json",
        headers={"Cache-Control": "no-store"},
    )


def iso_utc(moment):
    """Return an aware datetime as ISO 8601 in UTC, to the millisecond: 2024-01-15T10:30:00.000Z."""
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds")[:-6] + "Z"


@app.get("/api/usercount")
def usercount():
    total_users, last_updated = request.environ["usercount.read"].result()
    return json_response({"totalUsers": total_users, "lastUpdated": iso_utc(last_updated)})


@app.get("/health")
def health():
    try:
        request.environ["usercount.read"].result()
        status, connected = "healthy", True
    except ServiceUnavailable:
        status, connected = "unhealthy", False
    return json_response(
        {
            "status": status,
            "timestamp": iso_utc(datetime.now(timezone.utc)),
            "database": {"status": status, "connected": connected},
        },
        200 if connected else 503,
    )


@app.errorhandler(HTTPException)
def handle_http_error(error):
    response = json_response(
        {"statusCode": error.code, "error": error.name, "message": error.description}, error.code
    )
    response.headers.extend(  # Allow, Retry-After
        (name, value) for name, value in error.get_headers() if name != "Content-Type"
    )
    return response


class Batch:
    """Requests that wait for the same read, and the responses to them, by path."""

    def __init__(self):
        self.paths = set()
        self.responses = {}
        self.is_answered = threading.Event()


class RequestCoalescer:
    """WSGI middleware that lets concurrent requests share one read and its responses.

    Only a read that began after a request arrived may answer it. So while one batch is being
    answered, new requests gather in the next. Failed reads are shared as well. The application gets
    the read as a Future in environ["usercount.read"], and nothing of the clients' requests.
    """

    def __init__(self, application, paths, read):
        self.application = application
        self.environs = {path: create_environ(path) for path in paths}
        self.read = read
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
        batch.is_answered.wait()
        body, status, headers = batch.responses[path]
        start_response(status, headers)
        return [] if method == "HEAD" else body

    def respond_to(self, batch):
        has_to_wait = self.batch_lock.locked()
        with self.batch_lock:
            time.sleep(BATCH_DELAY_SECONDS if has_to_wait else 0)
            with self.next_batch_lock:
                self.next_batch = Batch()
            try:
                read = Future()
                try:
                    read.set_result(self.read())
                except Exception as error:
                    read.set_exception(error)
                for path in batch.paths:
                    environ = {**self.environs[path], "usercount.read": read}
                    response = run_wsgi_app(self.application, environ, buffered=True)
                    batch.responses[path] = response
            finally:
                batch.is_answered.set()


app.wsgi_app = RequestCoalescer(
    app.wsgi_app, [rule.rule for rule in app.url_map.iter_rules()], Database().read_count
)
