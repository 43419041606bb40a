"""How many users are there? Answered over HTTP, exactly and at once, from PostgreSQL.

Two routes, GET /api/usercount and GET /health. An answer is never older than its request, and no
request waits longer than two reads of the database take, READ_SECONDS each.
"""

import json
import logging
import os
import select
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from datetime import datetime, timezone
from pathlib import Path

import psycopg2
from dotenv import load_dotenv
from flask import Flask, Response
from psycopg2.extensions import POLL_OK, POLL_READ, STATUS_READY, TRANSACTION_STATUS_IDLE
from psycopg2.pool import ThreadedConnectionPool
from werkzeug.exceptions import HTTPException, ServiceUnavailable

# --- Settings: from the environment, or from .env; the environment wins ---


def setting(name, default, convert=str, expected="text"):
    """Return a converted setting; a wrong one ends the process with one line that names it."""
    text = os.environ.get(name) or default
    try:
        return convert(text)
    except ValueError:
        sys.exit(f"{name} must be {expected}, not {text!r}")


def hosts(text):
    names = [host.strip() for host in text.split(",")]
    if not all(names):
        raise ValueError
    return names


def port(text):
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 65535):
        raise ValueError
    return int(text)


def ports(text):
    numbers = [port(number) for number in text.split(",")]
    if len(numbers) not in (1, len(DB_HOSTS)):
        raise ValueError
    return numbers


def processes(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def environment(text):
    if text not in ("development", "production"):
        raise ValueError
    return text


load_dotenv(Path(__file__).with_name(".env"))
DB_HOSTS = setting("DB_HOST", "localhost", hosts, "a host, or several with commas")
DB_PORTS = setting("DB_PORT", "5432", ports, "a port from 1 to 65535, or one for each host")
DB_NAME = setting("DB_NAME", "test001")
DB_USER = setting("DB_USER", "postgres")
DB_PASSWORD = os.environ.get("DB_PASSWORD") or None  # None: libpq looks for PGPASSWORD, ~/.pgpass
PORT = setting("PORT", "6776", port, "a port from 1 to 65535")
APP_ENV = setting("APP_ENV", "development", environment, "development or production")
WEB_CONCURRENCY = setting("WEB_CONCURRENCY", "1", processes, "a number of processes, at least 1")

READ_SECONDS = 2  # for all of a read: to connect, to query, and to repeat it if need be
SLOW_QUERY_MILLISECONDS = 100
GATHER_SECONDS = 0.0005  # that those who waited for an answer to others let more join theirs
POOL_CONNECTIONS = 20  # of a process, at most
IDLE_CONNECTIONS = 2  # that a process keeps: each of the two routes reads one at a time

logging.basicConfig(
    format="[%(asctime)s] [%(process)d] [%(levelname)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S %z"
)
app = Flask(__name__, static_folder=None)
app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False  # OPTIONS is a wrong method like any other
app.url_map.merge_slashes = False  # /api//usercount is another path, not a redirect
app.logger.setLevel(logging.INFO if APP_ENV == "production" else logging.DEBUG)

# --- The database ---

# What nobody waits for any more ends on the server too.
COUNT_SQL = f"""
    SET LOCAL statement_timeout = '{READ_SECONDS}s';
    SELECT total_users, last_updated FROM user_stats
"""

# libpq tries the hosts in order, but waits for a silent one until the deadline. So there is a pool
# for each rotation of the list, and a read that ran out of time puts the next one in front.
pools = deque()
for first in range(len(DB_HOSTS)):
    pool = ThreadedConnectionPool(
        minconn=0,  # connects nothing here
        maxconn=POOL_CONNECTIONS,
        host=",".join(DB_HOSTS[first:] + DB_HOSTS[:first]),
        port=",".join(map(str, DB_PORTS[first:] + DB_PORTS[:first])),
        dbname=DB_NAME,
        user=DB_USER,
        password=DB_PASSWORD,
        fallback_application_name="usercount",
        # Connects outside the pool's lock, waits no longer than we do, and is in autocommit.
        async_=True,
    )
    pool.minconn = IDLE_CONNECTIONS  # it closes those above that when they are returned
    pools.append(pool)

outage = {}  # why the database could not be read, each reason with the time it was first seen


def read_count():
    """Return the number of users and when it last changed (an aware datetime), as of now.

    Raises ServiceUnavailable if the database does not tell within READ_SECONDS.
    """
    deadline = time.monotonic() + READ_SECONDS
    try:
        count = query_count(pools[0], deadline)
    except (psycopg2.Error, TimeoutError) as error:
        log_outage(error)
        raise ServiceUnavailable("The count cannot be read now.", retry_after=1) from error
    log_recovery()
    return count


def query_count(pool, deadline):
    """Return the row of user_stats.

    A connection that is lost, most often while it was idle, costs nobody an error: the query is
    repeated on the other idle ones, and on up to two new ones.
    """
    new_connections_left = 2
    while True:
        connection = pool.getconn()
        is_new = connection.status != STATUS_READY
        new_connections_left -= is_new
        try:
            wait(connection, deadline)
            if is_new and not outage:  # in an outage there may be many, all for nothing
                app.logger.debug("Connected to %s", connection.info.host)
            began = time.monotonic()
            with connection.cursor() as cursor:
                cursor.execute(COUNT_SQL)
                wait(connection, deadline)
                row = cursor.fetchone()
            milliseconds = (time.monotonic() - began) * 1000
            if milliseconds > SLOW_QUERY_MILLISECONDS:
                app.logger.warning("Slow query: %.0f ms", milliseconds)
            return row
        except (psycopg2.OperationalError, psycopg2.InterfaceError):
            if not new_connections_left:
                raise
        except TimeoutError:
            if pool is pools[0]:
                pools.rotate(-1)
            raise
        finally:
            is_usable = connection.info.transaction_status == TRANSACTION_STATUS_IDLE
            pool.putconn(connection, close=not is_usable)


def wait(connection, deadline):
    """Wait until `connection` has done what it was asked; raise TimeoutError at the deadline."""
    while (state := connection.poll()) != POLL_OK:
        poller = select.poll()
        event = select.POLLIN if state == POLL_READ else select.POLLOUT
        poller.register(connection.fileno(), event)
        if not poller.poll(max(0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(f"no answer within {READ_SECONDS} s")


def log_outage(error):
    """Log why the database cannot be read: a line for each reason, not for each request."""
    reason = isinstance(error, psycopg2.Error) and error.diag.message_primary
    reason = reason or " ".join(str(error).split())
    if isinstance(error, psycopg2.errors.UndefinedTable):
        reason += " (run python setup_db.py)"
    if reason not in outage:
        outage[reason] = time.monotonic()
        app.logger.error("Database lost: %s", reason)


def log_recovery():
    began = min(outage.values(), default=None)
    if began is not None:
        outage.clear()
        app.logger.info("Database back after %.1f s", time.monotonic() - began)


# --- HTTP ---


def answer(payload, status=200):
    """Return the response: `payload` as one line of JSON that no cache may keep."""
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
    total_users, last_updated = read_count()
    return answer({"totalUsers": total_users, "lastUpdated": iso_utc(last_updated)})


@app.get("/health")
def health():
    try:
        read_count()
        status, connected = "healthy", True
    except ServiceUnavailable:
        status, connected = "unhealthy", False
    return answer(
        {
            "status": status,
            "timestamp": iso_utc(datetime.now(timezone.utc)),
            "database": {"status": status, "connected": connected},
        },
        200 if connected else 503,
    )


@app.errorhandler(HTTPException)
def error(error):
    response = answer(
        {"statusCode": error.code, "error": error.name, "message": error.description}, error.code
    )
    response.headers.extend(  # Allow, Retry-After
        (name, value) for name, value in error.get_headers() if name != "Content-Type"
    )
    return response


class SharedAnswers:
    """WSGI middleware: requests that wait for the same path share one answer of the application.

    A request may get any answer that the application began to make after the request arrived, and
    never an older one. So under load one answer is in the making for each path, and who arrives
    meanwhile waits, together with the others, for the next. Errors are shared like the rest.
    """

    def __init__(self, application, paths):
        self.application = application
        self.turns = {path: threading.Lock() for path in paths}  # held while an answer is made
        self.next_answers = {}  # the answer, not begun yet, of those who wait for a path
        self.next_answers_lock = threading.Lock()

    def __call__(self, environ, start_response):
        path = "/" + environ["PATH_INFO"].lstrip("/")  # as Flask takes it
        method = environ["REQUEST_METHOD"]
        if path not in self.turns or method not in ("GET", "HEAD"):
            return self.application(environ, start_response)
        with self.next_answers_lock:
            shared = self.next_answers.get(path)
            is_first = shared is None
            if is_first:
                shared = self.next_answers[path] = Future()
        if is_first:
            self.make_answer(path, shared, {**environ, "REQUEST_METHOD": "GET"})
        status, headers, body = shared.result()
        start_response(status, headers)
        return [] if method == "HEAD" else body

    def make_answer(self, path, shared, environ):
        is_crowded = self.turns[path].locked()
        with self.turns[path]:
            time.sleep(GATHER_SECONDS if is_crowded else 0)  # whoever is here by then comes along
            del self.next_answers[path]  # and whoever comes from here on waits for the next one
            try:
                response = Response.from_app(self.application, environ, buffered=True)
                body, status, headers = response.get_wsgi_response(environ)
                shared.set_result((status, headers, list(body)))
            except BaseException as error:
                shared.set_exception(error)


app.wsgi_app = SharedAnswers(app.wsgi_app, {rule.rule for rule in app.url_map.iter_rules()})
