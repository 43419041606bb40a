"""A database in trouble, and where reads go.

Each request is answered within 5 seconds, whatever happens to the database: by 503 if need be, with
few lines in the log, and by 200 again without a restart. Only the primary answers, wherever it is,
unless PGTARGETSESSIONATTRS says otherwise, so no answer is behind.
"""

import itertools
import json
import re
import signal
import socket
import socketserver
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import psycopg2
import pytest

import conftest
import usercount
from conftest import Cluster, in_background, open_cursor, running_cluster, wait_until

SET_UP = {  # of each database; in `roles`, the count is the role of the server it is read from
    "app": f"{conftest.SCHEMA} CREATE ROLE web LOGIN; GRANT SELECT ON user_stats TO web",
    "roles": "CREATE VIEW user_stats AS SELECT now() AS last_updated,"
    " CASE WHEN pg_is_in_recovery() THEN 'standby' ELSE 'primary' END AS total_users",
}
END = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'web'"
LIMIT = "ALTER ROLE web CONNECTION LIMIT"
FAULTS = {  # what causes them, and what ends them; the last one fails no request
    "stopped": [Cluster.stop, Cluster.start],
    "killed": [Cluster.kill, Cluster.start],
    "frozen": [partial(Cluster.signal_all, signum=s) for s in (signal.SIGSTOP, signal.SIGCONT)],
    "locked": ["BEGIN; LOCK TABLE usercount.counts", "ROLLBACK"],
    "renamed": [f"{END}; ALTER DATABASE app RENAME TO x", "ALTER DATABASE x RENAME TO app"],
    "without schema": ["ALTER VIEW user_stats RENAME TO x", "ALTER VIEW x RENAME TO user_stats"],
    "without right": ["REVOKE SELECT ON user_stats FROM web", "GRANT SELECT ON user_stats TO web"],
    "without login": [f"ALTER ROLE web NOLOGIN; {END}", "ALTER ROLE web LOGIN"],
    "full": [f"{LIMIT} 0; {END}", f"{LIMIT} -1"],
    "almost full": [f"{LIMIT} 2; {END}", f"{LIMIT} -1"],  # a connection for each of two processes
}
ERROR = '1 {"statusCode": 503, "error": "Service Unavailable", "message": "The count [a-z ]+."}\n'
DOWN = '"database": {"status": "unhealthy", "connected": false}'
HEALTH = f'None {{"status": "unhealthy", "timestamp": "{conftest.TIMESTAMP_PATTERN}", {DOWN}}}\n'


@contextmanager
def broken(cluster, fault):
    cause, end = FAULTS[fault]
    database = "roles" if fault == "renamed" else "app"
    with closing(psycopg2.connect(**cluster.params, dbname=database)) as connection:
        connection.autocommit = True
        run = connection.cursor().execute if isinstance(cause, str) else lambda do: do(cluster)
        run(cause)
        try:
            yield
        finally:
            run(end)


@pytest.fixture(scope="module")
def cluster():
    with running_cluster() as cluster, open_cursor(cluster.params) as cursor:
        for database, sql in SET_UP.items():
            cursor.execute(f"CREATE DATABASE {database}")
            with open_cursor(cluster.params, database) as database_cursor:
                database_cursor.execute(sql)
        with running_cluster(cluster) as cluster.standby:
            yield cluster


@pytest.fixture(scope="module")
def params(cluster):
    return cluster.params


@pytest.fixture(scope="module")
def services(params, tmp_path_factory):
    """One on each server, as a role that may only read user_stats."""
    settings = conftest.environment(params, "app", DB_USER="web", DB_PASSWORD="secret")
    run = partial(conftest.running_service, settings, tmp_path_factory.mktemp("services"))
    with run(server="gunicorn") as gunicorn, run(server="granian") as granian:
        yield gunicorn, granian


def assert_status(status, services):
    """Send each service 30 requests at once, for both routes; the answers must come in time."""
    errors = [ERROR, HEALTH] * 15
    with ThreadPoolExecutor() as threads:
        for responses in threads.map(conftest.Client.get_at_once, services):
            for (answered, headers, body), error in zip(responses, errors, strict=True):
                assert answered == status, body
                assert status == 200 or re.fullmatch(error, f"{headers.get('Retry-After')} {body}")


@pytest.mark.parametrize("fault", [*FAULTS][:-1])
def test_each_fault_is_answered_in_time_and_recovered_from(cluster, services, fault):
    assert_status(200, services)
    before = [len(service.log.read_text()) for service in services]
    with broken(cluster, fault):
        assert_status(503, services)
        assert {service.get("/")[0] for service in services} == {404}
        if fault == "locked":  # abandoned queries are cancelled on the server
            with open_cursor(cluster.params, "app") as cursor:
                wait_until(lambda: not cursor.has_lock_waiters())
    wait_until(lambda: {service.get()[0] for service in services} == {200})
    assert_status(200, services)
    for service, position in zip(services, before, strict=True):
        log = service.log.read_text()[position:]
        assert 1 <= log.count("[ERROR] Database unavailable: 127.0.0.1 port ") <= 4
        assert log.count("[INFO] Reading from 127.0.0.1 port ") == 1 and log.count("\n") <= 6
        assert "secret" not in log and ("python setup_db.py" in log) == (fault == "without schema")


WRONG = {  # DB_HOST, what is at DB_PORT: what the log says
    ("127.0.0.1", "nothing"): "Connection refused",
    ("127.0.0.1", "silence"): "no answer in time",
    ("127.0.0.1", "standby"): "set PGTARGETSESSIONATTRS=any to read from it, too",
    ("/no/such/folder", "nothing"): "No such file or directory",
    ("no-such-host.invalid", "nothing"): "its address is not known",
    ("label-too-long" * 9, "nothing"): "its address is not known",
}


@pytest.mark.parametrize("host, listener", WRONG)
def test_each_wrong_address_is_answered_in_time(cluster, start, host, listener):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = {"silence": silent.getsockname()[1], "standby": cluster.standby.params["port"]}
        port = str(ports.get(listener, conftest.free_port()))
        with start("app", DB_HOST=host, DB_PORT=port, DB_PASSWORD="secret") as service:
            assert_status(503, [service])
    log = service.log.read_text()
    assert log.count("Database unavailable") == log.count(WRONG[host, listener]) == 1
    assert not re.search("secret|Traceback", log)


def test_lost_connections_fail_no_request(cluster, services):
    assert_status(200, services)
    cluster.stop()
    cluster.start()
    ask, terminated = partial(assert_status, 200, services), []
    with in_background(ask), open_cursor(cluster.params) as cursor:
        wait_until(lambda: terminated.extend(cursor.rows(END)) or len(terminated) > 20)


def test_one_connection_per_process_is_enough(cluster, services):
    with broken(cluster, "almost full"):
        assert_status(200, services)


@pytest.mark.parametrize("server", conftest.SERVERS)
def test_sigterm_lets_waiting_requests_finish_but_not_idle_connections(cluster, start, server):
    with ExitStack() as stack, ThreadPoolExecutor(8) as threads:
        service = stack.enter_context(start("app", server=server))
        idle = stack.enter_context(closing(service.connect()))
        idle.request("GET", "/health")
        assert idle.getresponse().read()
        with broken(cluster, "locked"), open_cursor(cluster.params, "app") as cursor:
            waiting = [threads.submit(service.get) for _ in range(8)]
            wait_until(cursor.has_lock_waiters)
            service.process.terminate()
            wait_until(lambda: re.search("signal: term|Shutting down", service.log.read_text()))
        assert {future.result()[0] for future in waiting} <= {200, 503}
        assert service.process.wait(10) == 0


def test_names_that_no_longer_resolve_keep_their_addresses(monkeypatch):
    known, is_answering = {"a": ["::1", "127.0.0.1"]}, threading.Event()

    def getaddrinfo(host, *arguments, **options):
        is_answering.wait(20)
        if host not in known:
            raise socket.gaierror
        return [(socket.AF_UNSPEC, socket.SOCK_STREAM, 6, "", (each, 0)) for each in known[host]]

    def find(seconds=20):
        return ", ".join(map(str, database.find_targets(time.monotonic() + seconds)))

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(usercount, "DB_HOSTS", ["a", "b", "/run"])
    monkeypatch.setattr(usercount, "DB_PORTS", ["1", "2", "3"])
    database = usercount.Database()
    assert find(0) == "a port 1, b port 2, /run port 3"  # DNS is silent
    is_answering.set()
    assert find() == "a ::1 port 1, a 127.0.0.1 port 1, b port 2, /run port 3"
    known["b"] = known.pop("a")[:1]
    assert find() == "a ::1 port 1, a 127.0.0.1 port 1, b ::1 port 2, /run port 3"
    is_answering.clear()
    assert find(0) == "a ::1 port 1, a 127.0.0.1 port 1, b ::1 port 2, /run port 3"


TARGETS = {  # DB_HOST, PGTARGETSESSIONATTRS: who answers if both run, no primary, no standby
    ("standby,primary", "any"): ["standby", "standby", "primary"],
    ("primary,standby", "any"): ["primary", "standby", "primary"],
    ("standby,primary", ""): ["primary", "nobody", "primary"],
    ("standby,primary", "read-write"): ["primary", "nobody", "primary"],
    ("primary,standby", "standby"): ["standby", "standby", "nobody"],
    ("primary,standby", "prefer-standby"): ["standby", "standby", "primary"],
    ("standby,primary", "prefer-standby"): ["standby", "standby", "primary"],
}
HASTY = "import usercount\nusercount.MAX_CONNECTION_AGE_SECONDS = 0.5\napp = usercount.app"


def in_order(*clusters):
    ports = ",".join(cluster.params["port"] for cluster in clusters)
    return {"DB_HOST": "127.0.0.1,127.0.0.1", "DB_PORT": ports}


def who_answers(service):
    return json.loads(service.get()[2]).get("totalUsers", "nobody")


def test_pgtargetsessionattrs_says_who_answers(cluster, start, tmp_path):
    """Within 0.5 s instead of 30, and no fault costs a request that another server may answer."""
    (tmp_path / "hasty.py").write_text(HASTY)
    clusters, services = {"primary": cluster, "standby": cluster.standby}, []
    serve = partial(start, "roles", "hasty:app", PYTHONPATH=str(tmp_path))
    with ExitStack() as stack, ThreadPoolExecutor(len(TARGETS)) as threads:
        for hosts, attrs in TARGETS:
            server = "granian" if attrs == "any" else "gunicorn"
            options = {"PGTARGETSESSIONATTRS": attrs, "server": server}
            options |= in_order(*(clusters[name] for name in hosts.split(",")))
            services.append(stack.enter_context(serve(**options)))
        expected = dict(zip(["", *clusters], zip(*TARGETS.values(), strict=True), strict=True))
        assert tuple(threads.map(who_answers, services)) == expected[""]
        assert not [each for each in services if "unavailable" in each.log.read_text()]
        for fault, down in itertools.product(["stopped", "killed", "frozen"], clusters):
            with in_background(services[0].count, services[1].count), broken(clusters[down], fault):
                for seconds in (0.6, 0):  # on open connections, and on new ones
                    answers = tuple(threads.map(who_answers, services))
                    assert (fault, down, answers) == (fault, down, expected[down])
                    time.sleep(seconds)
            wait_until(lambda: tuple(threads.map(who_answers, services)) == expected[""])


def test_reads_follow_a_promoted_standby(cluster, start):
    with running_cluster(cluster) as heir, start("roles", **in_order(cluster, heir)) as service:
        assert who_answers(service) == "primary"
        with broken(cluster, "stopped"):
            assert who_answers(service) == "nobody"
            heir.run("pg_ctl", "promote", "-w", "-D", heir.data)
            assert who_answers(service) == "primary"


class Pooler(socketserver.BaseRequestHandler):
    """Like PgBouncer, keeps a client's connection although the server behind it changes."""

    def handle(self):
        startup = message = self.request.recv(65536)
        while message and message[:1] != b"X":  # the client ends the connection
            with socket.create_connection(("127.0.0.1", self.server.port)) as server:
                for each in dict.fromkeys([startup, message]):
                    server.sendall(each)
                    reply = b""
                    while not reply.endswith(b"Z\0\0\0\5I"):  # ready for the next query
                        reply += server.recv(65536)
            self.request.sendall(reply)
            message = self.request.recv(65536)


def test_a_server_that_becomes_a_standby_is_not_read_from(cluster, start):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Pooler) as pooler:
        threading.Thread(target=pooler.serve_forever, daemon=True).start()
        options = {"DB_PORT": str(pooler.server_address[1]), "PGSSLMODE": "disable"}
        with start("roles", PGGSSENCMODE="disable", **options) as service:
            for server, role in (cluster, "primary"), (cluster.standby, "nobody"):
                pooler.port = server.params["port"]
                assert who_answers(service) == role
        pooler.shutdown()
