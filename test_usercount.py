"""Tests what usercount promises, on a real PostgreSQL and the real gunicorn.

The server is an embedded one or, with DB_HOST set, that one, where each test has a throw-away
database and DB_NAME is never touched. Tests that stop, kill or freeze a server always use an
embedded one of their own. pytest -k api, triggers, setup or faults runs a subset.
"""

import http.client
import io
import itertools
import json
import os
import random
import re
import resource
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import psycopg2
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    get_state_machine_test,
    initialize,
    invariant,
    rule,
)
from psycopg2.extensions import TRANSACTION_STATUS_INERROR

import setup_db
import usercount

HERE = Path(__file__).parent
SCHEMA = (HERE / "schema.sql").read_text()
TIMESTAMP_PATTERN = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
ADD_USERS = "INSERT INTO user_list (username, email) SELECT n, n FROM generate_series(%s, %s) AS n"
STATS = "SELECT *, (SELECT count(*) FROM user_list) FROM user_stats"  # of one snapshot
RESPONSE_TIMEOUT_SECONDS = 5  # promised, whatever the database does

# --- Servers, databases, services ---


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out waiting for the condition"
        time.sleep(0.01)


class Cluster:
    """An embedded PostgreSQL on a port of its own, which a test may abuse freely."""

    def __init__(self, primary=None):
        """Create it, as a streaming standby if a primary is given."""
        self.folder = Path(tempfile.mkdtemp(prefix="usercount-"))
        self.folder.chmod(0o755)  # run by root, the server switches to another user
        self.data = self.folder / "data"
        self.postgres = setup_db.embedded_postgres(self.data)
        self.port = free_port()
        self.params = {
            "host": "127.0.0.1",
            "port": str(self.port),
            "user": "postgres",
            "password": None,
        }
        if primary is None:
            self.postgres.ensure_pgdata_inited()
        else:
            self.data.chmod(0o700)
            if self.postgres.system_user:
                shutil.chown(self.data, self.postgres.system_user)
            source = f"host=127.0.0.1 port={primary.port} user=postgres"
            self.run("pg_basebackup", "-R", "-c", "fast", "-d", source, "-D", self.data)

    def run(self, program, *arguments):
        # Into a file: the server inherits the output, and reading a pipe would last until it ends.
        with (self.folder / "log").open("a") as log:
            subprocess.run(
                [self.postgres.bin_path / program, *arguments],
                user=self.postgres.system_user,
                cwd="/",
                stdout=log,
                stderr=log,
                check=True,
            )

    def start(self):
        options = f"-h 127.0.0.1 -p {self.port} -k {self.data} -F"
        options += " -c max_connections=40 -c max_prepared_transactions=10"
        self.run("pg_ctl", "start", "-w", "-D", self.data, "-l", self.data / "log", "-o", options)

    def stop(self, mode="fast"):
        self.run("pg_ctl", "stop", "-w", "-m", mode, "-D", self.data)

    def processes(self):
        try:
            postmaster = psutil.Process(int((self.data / "postmaster.pid").read_text().split()[0]))
        except (FileNotFoundError, psutil.NoSuchProcess):
            return []
        return [postmaster, *postmaster.children()]

    def signal_all(self, signum):
        """Send a signal to every process of the server and return them."""
        processes = self.processes()
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                process.send_signal(signum)
        return processes

    def kill(self):
        """Crash: kill all processes at once, so that none can clean up."""
        psutil.wait_procs(self.signal_all(signal.SIGKILL))

    def remove(self):
        if self.signal_all(signal.SIGCONT):
            self.stop("immediate")
        shutil.rmtree(self.folder)


@contextmanager
def running_cluster(primary=None):
    cluster = Cluster(primary)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture(scope="session")
def server():
    """libpq parameters of the server under test."""
    if os.environ.get("DB_HOST"):
        yield setup_db.CONFIGURED_SERVER
    else:
        with running_cluster() as cluster:
            yield cluster.params


def environment(server, database, **settings):
    """Return the environment for a program that uses `database`, free of inherited settings."""
    names = ("DB_", "PG", "PORT", "APP_ENV", "WEB_CONCURRENCY", "GUNICORN_CMD_ARGS")
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(names)}
    return inherited | {
        "DB_HOST": server["host"],
        "DB_PORT": server["port"],
        "DB_USER": server["user"],
        "DB_PASSWORD": server["password"] or "",
        "DB_NAME": database,
        "APP_ENV": "production",
        **settings,
    }


def run_setup(environment, *arguments, folder=HERE):
    return subprocess.run(
        [sys.executable, folder / "setup_db.py", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def set_up(environment, *arguments):
    """Run setup_db.py, which must succeed; return what it prints."""
    done = run_setup(environment, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@contextmanager
def in_background(*functions):
    """Call each function again and again, in a thread of its own, until the end of the block.

    Yields a list of what each has returned so far; raises their first error at the end.
    """
    is_done = threading.Event()

    def repeat(function, results):
        while not is_done.is_set():
            results.append(function())

    all_results = [[] for _ in functions]
    with ThreadPoolExecutor(len(functions)) as threads:
        futures = [
            threads.submit(repeat, *pair) for pair in zip(functions, all_results, strict=True)
        ]
        try:
            yield all_results
        finally:
            is_done.set()
        for future in futures:
            future.result()


class Cursor(psycopg2.extensions.cursor):
    """A cursor on a connection of its own; can also return the result of a query."""

    def rows(self, sql, parameters=None):
        self.execute(sql, parameters)
        return self.fetchall()

    def row(self, sql, parameters=None):
        [row] = self.rows(sql, parameters)
        return row

    def column(self, sql, parameters=None):
        return [value for (value,) in self.rows(sql, parameters)]

    def value(self, sql, parameters=None):
        [value] = self.row(sql, parameters)
        return value


@contextmanager
def open_cursor(server, database="postgres"):
    with closing(setup_db.connect(server, database)) as connection:
        yield connection.cursor(cursor_factory=Cursor)


@contextmanager
def throwaway_database(server, template="template1"):
    """Create a database, unless `template` is None, and yield its name; drop it at the end."""
    name = f"usercount_test_{secrets.token_hex(6)}"
    with open_cursor(server) as cursor:
        if template:
            cursor.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield name
        finally:
            cursor.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def template(server):
    """A database with the shipped schema, as setup_db.py makes it."""
    with throwaway_database(server) as name:
        set_up(environment(server, name))
        yield name


@pytest.fixture
def database(server, template):
    with throwaway_database(server, template) as name:
        yield name


@pytest.fixture
def empty_database(server):
    with throwaway_database(server) as name:
        yield name


@pytest.fixture
def missing_database(server):
    with throwaway_database(server, template=None) as name:
        yield name


@pytest.fixture
def connect(server, request):
    """A function that returns a cursor on a new autocommit connection to the test's database."""
    name = "database" if "database" in request.fixturenames else "empty_database"
    database = request.getfixturevalue(name)
    with ExitStack() as cursors:
        yield lambda: cursors.enter_context(open_cursor(server, database))


@pytest.fixture
def cursor(connect):
    return connect()


class Client:
    """Sends requests to a local port."""

    def __init__(self, port):
        self.port = port

    def connect(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, RESPONSE_TIMEOUT_SECONDS)
        connection.connect()
        connection.auto_open = False  # or it would reconnect unnoticed
        return connection

    def request(self, method, path, body=None):
        """Return status, headers and body; raise TimeoutError if the response takes too long."""
        with closing(self.connect()) as connection:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.headers, response.read().decode()

    def get(self, path="/api/usercount"):
        try:
            return self.request("GET", path)
        except ConnectionRefusedError:
            return 0, {}, ""

    def get_at_once(self, number=30):
        """Return the responses to `number` concurrent requests, alternating between the routes."""
        with ThreadPoolExecutor(number) as threads:
            return list(threads.map(self.get, ["/api/usercount", "/health"] * (number // 2)))

    def count(self):
        status, _, body = self.get()
        assert status == 200, body
        return json.loads(body)["totalUsers"]


def get_again(connection, path):
    """Return the status of a response, and whether it has a body; the connection stays open."""
    connection.request("GET", path)
    with connection.getresponse() as response:
        return response.status, bool(response.read())


class Service(Client):
    """gunicorn, serving on a free port; its log is in `log`."""

    def __init__(self, environment, folder, *arguments, code=HERE):
        super().__init__(free_port())
        self.log = folder / f"service-{self.port}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", *(arguments or ["usercount:app"])],
                cwd=code,
                env=environment | {"PORT": str(self.port)},
                stderr=log,
                start_new_session=True,
            )
        wait_until(lambda: "Booting worker" in self.log.read_text())
        wait_until(lambda: self.get("/")[0] == 404)

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(10) == 0


@contextmanager
def running_service(environment, folder, *arguments, **options):
    service = Service(environment, folder, *arguments, **options)
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture
def service(server, database, tmp_path):
    with running_service(environment(server, database), tmp_path) as service:
        yield service


# --- The count ---


def has_lock_waiters(cursor):
    return cursor.value(
        "SELECT count(*) > 0 FROM pg_stat_activity"
        " WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )


def assert_exact(cursor, expected=None):
    """The count is the number of rows, and a recalculation finds nothing to repair."""
    stats = row_id, total_users, _, listed = cursor.row(STATS)
    assert (row_id, total_users) == (1, listed)
    assert expected in (None, listed)
    assert cursor.value("SELECT recalculate_user_count()") == listed
    assert cursor.row(STATS) == stats


def assert_total(cursor, expected):
    assert cursor.value("SELECT total_users FROM user_stats") == expected


def copy_two_users(cursor):
    cursor.copy_expert("COPY user_list (username, email) FROM STDIN", io.StringIO("x\tx\ny\ty\n"))


WRITES = {  # what is done to the users 1, 2 and 3, and how many remain
    "insert": (ADD_USERS % (4, 4), 4),
    "many rows": (ADD_USERS % (4, 1003), 1003),
    "no rows": (ADD_USERS % (4, 3), 3),
    "conflict": (ADD_USERS % (3, 5) + " ON CONFLICT DO NOTHING", 5),
    "upsert": (
        ADD_USERS % (2, 4) + " ON CONFLICT (username) DO UPDATE SET email = excluded.email || '@'",
        4,
    ),
    "merge": (
        "MERGE INTO user_list USING (VALUES ('3'), ('4'), ('5')) AS v (n) ON username = n"
        " WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT (username, email) VALUES (n, n)",
        4,
    ),
    "two inserts in one": (f"WITH a AS ({ADD_USERS % (4, 5)}) {ADD_USERS % (6, 6)}", 6),
    "copy": (copy_two_users, 5),
    "update": ("UPDATE user_list SET email = email || '@'", 3),
    "delete": ("DELETE FROM user_list WHERE username <> '2'", 1),
    "delete nothing": ("DELETE FROM user_list WHERE username = '9'", 3),
    "cascade": (
        "CREATE TABLE teams (id int PRIMARY KEY); INSERT INTO teams VALUES (1), (2);"
        "ALTER TABLE user_list ADD team int REFERENCES teams ON DELETE CASCADE;"
        "UPDATE user_list SET team = 1 WHERE username < '3'; DELETE FROM teams WHERE id = 1",
        1,
    ),
    "truncate": ("TRUNCATE user_list", 0),
    "truncate and insert": (f"TRUNCATE user_list; {ADD_USERS % (8, 9)}", 2),
    "truncate rolled back": ("BEGIN; TRUNCATE user_list; ROLLBACK", 3),
    "several statements": (
        f"BEGIN; {ADD_USERS % (4, 6)}; DELETE FROM user_list WHERE username = '1'; COMMIT",
        5,
    ),
    "savepoint": (
        f"BEGIN; {ADD_USERS % (4, 4)}; SAVEPOINT s; {ADD_USERS % (5, 9)};"
        " DELETE FROM user_list WHERE username = '1'; ROLLBACK TO s; COMMIT",
        4,
    ),
    "rollback": (f"BEGIN; {ADD_USERS % (4, 9)}; ROLLBACK", 3),
}


@pytest.mark.parametrize("write", WRITES)
def test_triggers_count_every_kind_of_write(cursor, database, write):
    action, expected = WRITES[write]
    cursor.execute(ADD_USERS, (1, 3))
    cursor.execute(action) if isinstance(action, str) else action(cursor)
    assert_exact(cursor, expected)


def test_triggers_write_nothing_when_nothing_changed(cursor, database):
    cursor.execute(ADD_USERS, (1, 3))
    before = cursor.rows("SELECT ctid, * FROM user_counts")
    cursor.execute("DELETE FROM user_list WHERE username = '9'; " + ADD_USERS % (4, 3))
    assert cursor.rows("SELECT ctid, * FROM user_counts") == before


def test_triggers_count_a_million_rows_in_one_statement(cursor, database):
    cursor.execute(ADD_USERS, (1, 1_000_000))
    assert_exact(cursor, 1_000_000)
    cursor.execute("DELETE FROM user_list WHERE id % 2 = 0")
    assert_exact(cursor, 500_000)


def test_triggers_are_exact_for_a_snapshot_older_than_a_truncate(connect, database):
    reader, writer = connect(), connect()
    writer.execute(ADD_USERS, (1, 3))
    reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    reader.execute("SELECT 1")  # takes the snapshot, and no lock
    before = writer.value("SELECT last_updated FROM user_stats")
    writer.execute("TRUNCATE user_list")
    _, total_users, last_updated, listed = reader.row(STATS)
    assert (total_users, listed, last_updated > before) == (0, 0, True)
    reader.execute("COMMIT")
    assert_exact(reader, 0)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_triggers_let_writers_go_on_without_waiting(connect, database, isolation):
    writers = [connect() for _ in range(3)]
    for number, writer in enumerate(writers):
        writer.execute("SET lock_timeout = '1s'")
        writer.execute(ADD_USERS, (10 * number, 10 * number))  # now each has its own row
    for writer in writers:
        writer.execute(f"BEGIN ISOLATION LEVEL {isolation}")
        writer.execute("SELECT 1")
    for number, writer in enumerate(writers):  # while the transactions of all are open
        writer.execute(ADD_USERS, (10 * number + 1, 10 * number + 5))
        writer.execute("DELETE FROM user_list WHERE username = %s", (str(10 * number),))
    for writer in writers:
        writer.execute("COMMIT")
    assert_exact(writers[0], 15)


def test_triggers_fold_rows_of_terminated_sessions(connect, database):
    for number in range(100):
        writer = connect()
        writer.execute(ADD_USERS, (number, number))
        writer.connection.close()
    cursor = connect()
    rows = cursor.value("SELECT count(*) FROM user_counts")
    assert rows < 10  # a terminated process may be listed for a while
    assert_exact(cursor, 100)


def test_triggers_fold_no_row_newer_than_the_transaction(connect, database):
    """The list of processes may be as old as the transaction: that session may be alive."""
    cursor, writer = connect(), connect()
    cursor.execute(
        "INSERT INTO user_counts (id, backend, users, last_updated)"
        " VALUES (-7, -7, 5, now()), (-8, -8, -5, now() + '1 hour')"
    )
    last_updated = cursor.value("SELECT last_updated FROM user_stats")
    writer.execute(ADD_USERS, (1, 1))
    assert cursor.column("SELECT id FROM user_counts WHERE id < 0") == [-8]
    assert cursor.row("SELECT * FROM user_stats") == (1, 1, last_updated)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_triggers_move_to_a_new_row_after_many_writes(connect, database, isolation):
    """An upsert visits all old versions of its row."""
    writer, reader = connect(), connect()
    writer.execute(f"BEGIN ISOLATION LEVEL {isolation}")
    for n in range(600):
        writer.execute(ADD_USERS, (n, n))
    writer.execute("SAVEPOINT s; DELETE FROM user_list WHERE username < '3'; ROLLBACK TO s")
    assert_exact(reader, 0)
    writer.execute("COMMIT")
    assert_exact(reader, 600)
    assert reader.value("SELECT max(writes) FROM user_counts") <= 64


def test_triggers_do_not_wait_for_a_session_that_folds(connect, database):
    """After a restart process ids repeat, and all sessions find the same rows to fold."""
    folding, writer = connect(), connect()
    folding.execute(
        "INSERT INTO user_counts (id, backend, users) VALUES (-1, -1, 1), (-2, %s, -1)",
        [writer.connection.info.backend_pid],
    )
    folding.execute("BEGIN; " + ADD_USERS, (1, 1))
    writer.execute("SET lock_timeout = '1s'; " + ADD_USERS, (2, 2))
    folding.execute("COMMIT")
    assert_exact(folding, 2)


def test_triggers_let_another_session_fold_what_a_snapshot_still_shows(connect, database):
    first, second, gone = connect(), connect(), connect()
    gone.execute(ADD_USERS, (1, 1))
    gone.connection.close()
    processes = "SELECT FROM pg_stat_activity WHERE pid = %s"
    wait_until(lambda: not first.rows(processes, [gone.connection.info.backend_pid]))
    first.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT total_users FROM user_stats")
    second.execute(ADD_USERS, (2, 2))
    first.execute(ADD_USERS, (3, 3))  # without a serialization failure
    first.execute("COMMIT")
    assert_exact(first, 3)


@pytest.mark.parametrize("row", ["0", "-1", "1", "2", "999999999999"])
def test_triggers_are_exact_whatever_usercount_row_is_set_to(connect, database, row):
    first, second = connect(), connect()
    first.execute(ADD_USERS, (1, 3))
    second.execute(f"SET usercount.row = '{row}'; " + ADD_USERS, (4, 5))
    for number in range(10, 14):
        connect().execute(ADD_USERS, (number, number))
    first.execute("DELETE FROM user_list WHERE username = '4'; " + ADD_USERS, (6, 6))
    second.execute("DISCARD ALL")
    second.execute("DELETE FROM user_list WHERE username = '5'")
    assert_exact(first, 8)


def test_triggers_of_a_renamed_table_do_not_count(cursor, database):
    cursor.execute(ADD_USERS, (1, 3))
    cursor.execute("ALTER TABLE user_list RENAME TO former_list")
    cursor.execute(SCHEMA)
    cursor.execute(ADD_USERS, (1, 2))
    for statement in (
        "INSERT INTO former_list (username, email) VALUES ('x', 'x')",
        "DELETE FROM former_list WHERE username < '3'",
        "TRUNCATE former_list",
    ):
        cursor.execute(statement)
        assert_total(cursor, 2)
    assert_exact(cursor, 2)


def test_triggers_lose_what_a_killed_backend_did_not_commit(connect, database):
    victim, cursor = connect(), connect()
    victim.execute(ADD_USERS, (1, 3))
    victim.execute("BEGIN")
    victim.execute(ADD_USERS, (4, 9))
    pid = victim.connection.info.backend_pid
    cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
    assert_exact(cursor, 3)
    cursor.execute(ADD_USERS, (4, 4))
    assert_exact(cursor, 4)


def test_triggers_survive_a_crash_of_the_server():
    with running_cluster() as cluster:
        with open_cursor(cluster.params) as cursor:
            cursor.execute(SCHEMA)
            cursor.execute(ADD_USERS, (1, 1000))
            cursor.execute("BEGIN")
            cursor.execute(ADD_USERS, (1001, 2000))
            cluster.kill()
        cluster.start()
        with open_cursor(cluster.params) as cursor:
            assert_exact(cursor, 1000)


def test_triggers_last_updated_and_updated_at_follow_changes(cursor, database):
    times = [cursor.value("SELECT last_updated FROM user_stats")]
    delete = "DELETE FROM user_list WHERE username = '1'"
    for change in (ADD_USERS % (1, 3), delete, "TRUNCATE user_list"):
        cursor.execute(change)
        times.append(cursor.value("SELECT last_updated FROM user_stats"))
    assert times == sorted(set(times))
    cursor.execute(ADD_USERS, (1, 2))
    cursor.execute("UPDATE user_list SET email = 'new' WHERE username = '1'")
    is_updated = "SELECT updated_at > created_at FROM user_list ORDER BY username"
    assert cursor.column(is_updated) == [True, False]


def test_triggers_recalculation_repairs_what_bypassed_them(cursor, database):
    cursor.execute(ADD_USERS, (1, 3))
    cursor.execute("ALTER TABLE user_list DISABLE TRIGGER USER")
    cursor.execute(ADD_USERS, (4, 8))
    cursor.execute("ALTER TABLE user_list ENABLE TRIGGER USER")
    assert_total(cursor, 3)
    recalculate = "SELECT recalculate_user_count(), pg_typeof(recalculate_user_count())::text"
    assert cursor.row(recalculate) == (8, "bigint")
    assert_exact(cursor, 8)


def test_triggers_recalculation_folds_rows_of_terminated_sessions(cursor, database):
    cursor.execute("INSERT INTO user_counts (backend, users) VALUES (-1, 4), (-2, -4)")
    cursor.execute("SELECT recalculate_user_count()")
    assert cursor.rows("SELECT id, users FROM user_counts") == [(0, 0)]


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_triggers_recalculation_needs_read_committed(cursor, database, isolation):
    """With a snapshot older than a rewrite of user_list it would be wrong for good."""
    cursor.execute(f"BEGIN ISOLATION LEVEL {isolation}")
    with pytest.raises(psycopg2.Error, match="needs READ COMMITTED"):
        cursor.execute("SELECT recalculate_user_count()")
    cursor.execute("ROLLBACK")


def test_triggers_recalculation_is_not_misled_by_row_level_security(cursor, database, role):
    cursor.execute(f"ALTER TABLE user_list OWNER TO {role[0]}")
    cursor.execute(SCHEMA)
    cursor.execute(ADD_USERS, (1, 3))
    cursor.execute(
        "ALTER TABLE user_list ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;"
        "CREATE POLICY few ON user_list USING (username = '1')"
    )
    for statement in ("SELECT recalculate_user_count()", SCHEMA):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="row-level security"):
            cursor.execute(statement)
        cursor.execute("ROLLBACK")
    assert_total(cursor, 3)


def test_triggers_recalculations_take_turns(connect, database):
    """Otherwise two would find the same users missing, and both add them."""
    first, second, cursor = connect(), connect(), connect()
    cursor.execute("UPDATE user_counts SET users = -7 WHERE id = 0")
    first.execute("BEGIN; SELECT recalculate_user_count()")
    with ThreadPoolExecutor(1) as threads:
        recalculation = threads.submit(second.execute, "SELECT recalculate_user_count()")
        wait_until(lambda: has_lock_waiters(cursor))
        first.execute("COMMIT")
        recalculation.result()
    assert_exact(cursor, 0)


def test_triggers_recalculation_loses_nothing_under_load(connect, database):
    """Two sessions keep recalculating while others write and corrupt the count."""

    def write(number):
        cursor = connect()
        for n in range(150):
            cursor.execute(ADD_USERS, (number * 10_000 + n, number * 10_000 + n))
            if n % 3 == 0:
                cursor.execute(
                    "DELETE FROM user_list WHERE username = %s", [str(number * 10_000 + n)]
                )
            if n % 50 == 49:
                cursor.execute("UPDATE user_counts SET users = users + 7 WHERE id = 0")  # drift
            if (number, n) == (0, 70):
                cursor.execute("TRUNCATE user_list")

    recalculate = "SELECT recalculate_user_count()"
    recalculating = [partial(connect().execute, recalculate) for _ in range(2)]
    with in_background(*recalculating) as rounds, ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(8)))
    assert min(map(len, rounds)) > 3
    cursor = connect()
    assert cursor.value(recalculate) > 0
    assert_exact(cursor)


@pytest.fixture
def role(cursor):
    """A role that may log in and nothing else, and its password."""
    name, password = f"usercount_test_{secrets.token_hex(6)}", secrets.token_hex(8)
    cursor.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'")
    yield name, password
    cursor.execute(f"RESET SESSION AUTHORIZATION; DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def test_triggers_need_rights_on_user_list_alone(cursor, database, role):
    cursor.execute(f"GRANT SELECT, INSERT, DELETE, TRUNCATE ON user_list TO {role[0]}")
    cursor.execute(f"SET SESSION AUTHORIZATION {role[0]}")
    cursor.execute("CREATE TEMPORARY TABLE user_counts (backend int PRIMARY KEY, users bigint)")
    cursor.execute("CREATE TEMPORARY TABLE trap (n int)")
    cursor.execute(ADD_USERS, (1, 5))
    cursor.execute("DELETE FROM user_list WHERE username = '1'")
    for forbidden in (
        "SELECT * FROM public.user_counts",
        "UPDATE public.user_counts SET users = 9",
        "SELECT recalculate_user_count()",
        "CREATE TRIGGER t AFTER INSERT ON trap REFERENCING NEW TABLE AS changed_rows"
        " FOR EACH STATEMENT EXECUTE FUNCTION update_user_count()",
    ):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            cursor.execute(forbidden)
    assert cursor.value("SELECT count(*) FROM pg_temp.user_counts") == 0
    cursor.execute("DROP TABLE pg_temp.user_counts; RESET SESSION AUTHORIZATION")
    assert_exact(cursor, 4)


# --- The count under any interleaving of sessions ---

# HYPOTHESIS_PROFILE=thorough searches longer, and elsewhere each time.
IS_THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
SEEDS = [secrets.randbits(32) for _ in range(300)] if IS_THOROUGH else range(15)
SEARCH = settings(
    max_examples=10,  # independent ones; later examples only vary earlier ones
    stateful_step_count=50,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
WAITED = psycopg2.errors.LockNotAvailable, psycopg2.errors.SerializationFailure
REFUSED = (
    *WAITED,
    psycopg2.errors.UniqueViolation,
    psycopg2.errors.ActiveSqlTransaction,  # a recalculation in REPEATABLE READ
    psycopg2.errors.ObjectNotInPrerequisiteState,  # max_prepared_transactions = 0
)
ADD_ONE = "INSERT INTO user_list (username, email) VALUES ({}, {})".format
TRIGGERS = "SELECT set_config('session_replication_role', '{}', true); ".format
CHANGES = {  # statements, and the users that each adds, given the number of rows it reports
    "insert": (ADD_ONE("'taken'", "{n}"), int),
    "conflict": (ADD_ONE("'taken'", "{n}") + " ON CONFLICT DO NOTHING", int),
    "upsert": (
        "WITH upserted AS (" + ADD_ONE("'taken'", "{n}") + " ON CONFLICT (username)"
        " DO UPDATE SET email = excluded.email RETURNING xmax = 0 AS is_new)"
        " SELECT FROM upserted WHERE is_new",
        int,
    ),
    "merge": (
        "MERGE INTO user_list USING (SELECT id FROM user_list WHERE id % 3 = 0 UNION SELECT NULL)"
        " AS listed ON user_list.id = listed.id WHEN MATCHED THEN DELETE"
        " WHEN NOT MATCHED THEN INSERT (username, email) VALUES ({n}, {n})",
        lambda rows: 2 - rows,
    ),
    "cascade": (
        "INSERT INTO teams VALUES ({n}); INSERT INTO user_list (username, email, team)"
        " VALUES ({n}, {n}, {n}); DELETE FROM teams WHERE id = {n}",
        lambda rows: 0,
    ),
    "delete": ("DELETE FROM user_list WHERE id % 3 = {n} % 3", lambda rows: -rows),
    "update": ("UPDATE user_list SET email = 'of ' || id WHERE id % 3 = 0", lambda rows: 0),
    "recalculate": ("SELECT recalculate_user_count()", lambda rows: 0),
    "recalculate after a bypass": (
        f"{TRIGGERS('replica')}{ADD_ONE('{n}', '{n}')};"
        f"{TRIGGERS('origin')}SELECT recalculate_user_count()",
        int,
    ),
}
ISOLATION_LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
ACTIONS = [  # methods and arguments, repeated to be chosen more often
    *itertools.product(["begin"], ISOLATION_LEVELS, [True, False, False]),
    *itertools.product(["end"], ["COMMIT", "COMMIT", "ROLLBACK"] * 2),
    *itertools.product(["sign_up"], ["INSERT", "INSERT", "COPY", "150 INSERTs"] * 4),
    *itertools.product(["change"], CHANGES),
    *itertools.product(["end_savepoint"], ["RELEASE s", "ROLLBACK TO s"]),
    *itertools.product(["end_prepared"], ["COMMIT PREPARED", "ROLLBACK PREPARED"]),
    *itertools.product(["reset"], ["DISCARD ALL", "DISCARD ALL", "schema.sql"]),
    *itertools.product(["replace"], [True, False] * 2),
    *[("prepare",), ("truncate",), ("look",)] * 3,
]
OPTIONAL = ["change", "look", "prepare", "replace", "reset", "truncate"]


class Session:
    """A cursor, and what the model knows of its session and of its open transaction."""

    def __init__(self, number, cursor):
        self.number, self.cursor = number, cursor
        self.backend_pid = cursor.connection.info.backend_pid
        self.max_rows = 1  # in user_counts
        self.has_prepared = False  # a transaction that its own row may have to wait for
        self.end()

    def __repr__(self):
        return f"state.sessions[{self.number}]"

    def end(self):
        self.users_added = []  # empty outside a transaction; one number more per savepoint
        self.isolation, self.is_watched, self.has_read = "READ COMMITTED", False, False


class Interleaving(RuleBasedStateMachine):
    """Three sessions that take turns on one database, and the number of users they have committed.

    A transaction that is not watched reads nothing unless told to. So it keeps no TRUNCATE waiting
    and, in SERIALIZABLE, causes no conflict.
    """

    def __init__(self, server, database):
        super().__init__()
        self.connections = ExitStack()
        self.server, self.database = server | {"options": "-c lock_timeout=10ms"}, database
        self.cursor = self.connect()
        self.last_updated = self.cursor.value(
            f"{TRIGGERS('replica')}TRUNCATE user_list, user_counts, teams RESTART IDENTITY;"
            f"{TRIGGERS('origin')}SELECT recalculate_user_count();"
            "SELECT last_updated FROM user_stats"
        )
        self.sessions = [Session(number, self.connect()) for number in range(3)]
        self.users, self.prepared, self.numbers = 0, {}, itertools.count(1)
        self.has_truncated = False

    def connect(self):
        return self.connections.enter_context(open_cursor(self.server, self.database))

    def disconnect(self, *sessions):
        for session in sessions:
            session.cursor.connection.close()
        pids = [[session.backend_pid for session in sessions]]
        listed = "SELECT FROM pg_stat_activity WHERE pid = ANY (%s)"
        wait_until(lambda: not self.cursor.rows(listed, pids))

    def is_truncated(self, but_for=None):
        """Whether a transaction of another session has truncated user_list and is not committed."""
        if not self.has_truncated:
            return False
        return self.cursor.value(
            "SELECT count(*) > 0 FROM pg_locks JOIN pg_database ON pg_database.oid = database"
            " WHERE datname = current_database() AND relation = 'user_list'::regclass"
            " AND mode = 'AccessExclusiveLock' AND pid IS DISTINCT FROM %s",
            [but_for.backend_pid if but_for else 0],
        )

    def conflicts(self, session):
        """The errors that SERIALIZABLE may raise: none unless it or a prepared one has read."""
        is_exposed = session.has_read or "SERIALIZABLE" in dict(self.prepared.values())
        return WAITED if session.isolation == "SERIALIZABLE" and is_exposed else ()

    def attempt(self, session, expected, sql, file=None):
        """Return whether it succeeded; after an expected error, roll back to the last savepoint."""
        try:
            session.cursor.copy_expert(sql, file) if file else session.cursor.execute(sql)
            return True
        except expected:
            status = session.cursor.connection.info.transaction_status
        if status == TRANSACTION_STATUS_INERROR and session.users_added[1:]:
            session.cursor.execute("ROLLBACK TO s")
            session.users_added[-1] = 0
        else:
            session.cursor.execute("ROLLBACK")
            session.end()
        return False

    def add(self, session, users):
        if session.users_added:
            session.users_added[-1] += users
        else:
            self.users += users
        if session.isolation != "READ COMMITTED":
            session.max_rows += 3  # its moves and first writes may leave their rows behind

    @initialize(
        isolation=st.sampled_from([None, *ISOLATION_LEVELS]),
        omitted=st.sets(st.sampled_from(OPTIONAL)),
    )
    def choose(self, isolation, omitted):
        """Omit some actions, or the few that reveal a fault would seldom occur together."""
        self.actions = [
            action
            for action in ACTIONS
            if action[0] not in omitted and (action[0] != "begin" or isolation in (None, action[1]))
        ]

    @rule(
        session=st.runner().flatmap(lambda state: st.sampled_from(state.sessions)),
        action=st.runner().flatmap(lambda state: st.sampled_from(state.actions)),
    )
    def act(self, session, action):  # one rule, as hypothesis omits some rules in each run
        getattr(self, action[0])(session, *action[1:])

    @invariant()
    def every_snapshot_is_exact(self):
        for session in self.sessions:
            if session.is_watched:
                self.look(session)
        if not self.is_truncated():
            row_id, total_users, last_updated, listed = self.cursor.row(STATS)
            assert (row_id, total_users, listed) == (1, self.users, self.users)
            assert last_updated >= self.last_updated
            self.last_updated = last_updated

    def look(self, session):
        session.has_read = True
        if self.is_truncated(but_for=session):
            return
        if self.attempt(session, self.conflicts(session), STATS):
            [(row_id, total_users, _, listed)] = session.cursor
            assert (row_id, total_users) == (1, listed)

    def begin(self, session, isolation, is_watched):
        """Begin a transaction, with a snapshot and a list of processes; within one, a savepoint."""
        if session.users_added:
            session.cursor.execute("SAVEPOINT s")
        else:
            list_processes = "SELECT FROM pg_stat_get_activity(NULL)"
            session.cursor.execute(f"BEGIN ISOLATION LEVEL {isolation}; {list_processes}")
            session.isolation, session.has_read = isolation, False
            session.is_watched = is_watched and isolation != "SERIALIZABLE"
        session.users_added.append(0)

    def end(self, session, how):
        if session.users_added:
            users = sum(session.users_added)
            if self.attempt(session, self.conflicts(session), how) and how == "COMMIT":
                self.users += users
            session.end()

    def prepare(self, session):
        if session.users_added:
            name = f"{self.database}-{next(self.numbers)}"
            prepared = session.isolation, sum(session.users_added)
            if self.attempt(session, REFUSED, f"PREPARE TRANSACTION '{name}'"):
                self.prepared[name] = prepared
                session.has_prepared = True
            session.end()

    def end_savepoint(self, session, how):
        if session.users_added[1:]:
            session.cursor.execute(f"{how}; SAVEPOINT s" if how == "RELEASE s" else how)
            users = session.users_added.pop()
            session.users_added[-1] += users if how == "RELEASE s" else 0
            session.users_added.append(0)

    def end_prepared(self, session, how):
        if self.prepared:
            name, (_, users) = self.prepared.popitem()
            self.cursor.execute(f"{how} '{name}'")
            self.users += users if how == "COMMIT PREPARED" else 0

    def sign_up(self, session, how):
        """Add users that no other session refers to, which must neither wait nor fail."""
        may_wait = session.has_prepared or self.is_truncated(but_for=session)
        expected = WAITED if may_wait else self.conflicts(session)
        numbers = [next(self.numbers) for _ in range(150 if how == "150 INSERTs" else 2)]
        sql, file = ADD_USERS % (numbers[0], numbers[-1]), None
        if how == "COPY":
            sql = "COPY user_list (username, email) FROM STDIN"
            file = io.StringIO("".join(f"{n}\t{n}\n" for n in numbers))
        elif how == "150 INSERTs":  # after 64 the session moves to a new row
            commit = "" if session.users_added or expected else "COMMIT;"
            loop = f"FOR n IN {numbers[0]}..{numbers[-1]} LOOP {ADD_ONE('n', 'n')}; {commit}"
            sql = f"DO $$ BEGIN {loop} END LOOP; END $$"
        if not self.attempt(session, expected, sql, file):
            return
        self.add(session, len(numbers))
        if session.isolation != "SERIALIZABLE" and not session.has_prepared:
            own = (
                "SELECT count(*) <= %s, max(writes) <= 64, current_setting('usercount.row') <> ''"
                " FROM user_counts WHERE backend = pg_backend_pid()"
            )
            assert session.cursor.row(own, [session.max_rows]) == (True, True, True)

    def change(self, session, name):
        sql, users_added = CHANGES[name]
        session.has_read = True
        if self.attempt(session, REFUSED, sql.format(n=next(self.numbers))):
            self.add(session, users_added(session.cursor.rowcount))

    def truncate(self, session):
        session.has_read = True
        users = self.users + sum(session.users_added)
        if self.attempt(session, WAITED, "TRUNCATE user_list"):
            self.has_truncated = True
            self.add(session, -users)

    def reset(self, session, how):
        if not session.users_added:
            is_schema = how == "schema.sql"
            self.attempt(session, WAITED if is_schema else (), SCHEMA if is_schema else how)

    def replace(self, session, is_killed):
        if is_killed:
            self.cursor.execute("SELECT pg_terminate_backend(%s)", [session.backend_pid])
        self.disconnect(session)
        self.sessions[session.number] = Session(session.number, self.connect())

    def teardown(self):
        with self.connections:
            self.disconnect(*self.sessions)
            for name in self.prepared:
                self.cursor.execute(f"ROLLBACK PREPARED '{name}'")
            self.cursor.execute(ADD_USERS, (0, 0))
            rows = self.cursor.value("SELECT count(*) FROM user_counts")
            assert rows <= 2  # corrections, and those of this session


@pytest.mark.parametrize("number", SEEDS)
def test_triggers_are_exact_under_any_interleaving_of_sessions(server, database, cursor, number):
    cursor.execute(
        "CREATE TABLE teams (id int PRIMARY KEY);"
        "ALTER TABLE user_list ADD team int REFERENCES teams ON DELETE CASCADE,"
        " SET (autovacuum_enabled = off);"  # it takes locks
        "ALTER TABLE user_counts SET (autovacuum_enabled = off)"
    )
    seed(number)(get_state_machine_test(partial(Interleaving, server, database), settings=SEARCH))()


# --- Setting up ---

SINGLE_ROW_COUNTER = """
    CREATE TABLE user_list (
        id SERIAL PRIMARY KEY,
        username VARCHAR(255) NOT NULL UNIQUE,
        email VARCHAR(255) NOT NULL UNIQUE,
        created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
        updated_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP
    );
    CREATE INDEX idx_user_list_username ON user_list (username);
    CREATE INDEX idx_user_list_email ON user_list (email);
    CREATE INDEX idx_user_list_created_at ON user_list (created_at);
    CREATE TABLE user_stats (
        id SERIAL PRIMARY KEY,
        total_users INTEGER NOT NULL DEFAULT 0,
        last_updated TIMESTAMP DEFAULT CURRENT_TIMESTAMP
    );
    INSERT INTO user_stats (total_users) VALUES (0);
    CREATE FUNCTION update_user_count() RETURNS TRIGGER LANGUAGE plpgsql AS $$
    BEGIN
        UPDATE user_stats SET last_updated = CURRENT_TIMESTAMP,
            total_users = total_users + CASE TG_OP WHEN 'INSERT' THEN 1 ELSE -1 END WHERE id = 1;
        RETURN NULL;
    END $$;
    CREATE FUNCTION recalculate_user_count() RETURNS INTEGER LANGUAGE sql AS $$
        UPDATE user_stats SET total_users = (SELECT count(*) FROM user_list) RETURNING total_users
    $$;
    CREATE TRIGGER user_insert_trigger AFTER INSERT ON user_list
        FOR EACH ROW EXECUTE FUNCTION update_user_count();
    CREATE TRIGGER user_delete_trigger AFTER DELETE ON user_list
        FOR EACH ROW EXECUTE FUNCTION update_user_count();
"""
LIST_INDEXES = "SELECT indexname FROM pg_indexes WHERE indexname LIKE 'idx%' ORDER BY 1"


def test_setup_replaces_a_single_row_counter_under_load(
    server, connect, cursor, empty_database, role
):
    cursor.execute(SINGLE_ROW_COUNTER)
    cursor.execute(ADD_USERS, (1, 1000))
    cursor.execute(f"GRANT SELECT ON user_stats TO {role[0]}")
    numbers = itertools.count(1001)

    def sign_up(writer):
        writer.execute(ADD_USERS, [next(numbers)] * 2)

    with in_background(*(partial(sign_up, connect()) for _ in range(4))) as signed_up:
        wait_until(lambda: sum(map(len, signed_up)) > 100)
        set_up(environment(server, empty_database))
        before = sum(map(len, signed_up))
        wait_until(lambda: sum(map(len, signed_up)) > before + 100)
    total = 1000 + sum(map(len, signed_up))
    assert_exact(cursor, total)
    types = cursor.column(
        "SELECT typname FROM pg_attribute JOIN pg_type t ON t.oid = atttypid"
        " WHERE attrelid = 'user_list'::regclass AND attnum > 0 ORDER BY attnum"
    )
    assert types == ["int8", "varchar", "varchar", "timestamptz", "timestamptz"]
    assert cursor.column("SELECT DISTINCT seqtypid::regtype::text FROM pg_sequence") == ["bigint"]
    assert cursor.column(LIST_INDEXES) == ["idx_user_list_created_at"]
    cursor.execute(f"SET SESSION AUTHORIZATION {role[0]}")
    assert_total(cursor, total)


def test_setup_replaces_old_triggers_whatever_their_names(server, cursor, empty_database):
    cursor.execute(SINGLE_ROW_COUNTER)
    cursor.execute("ALTER TRIGGER user_insert_trigger ON user_list RENAME TO old_insert")
    cursor.execute("ALTER TRIGGER user_delete_trigger ON user_list RENAME TO old_delete")
    cursor.execute(ADD_USERS, (1, 5))
    output = set_up(environment(server, empty_database))
    assert output.startswith("Replaced the single-row counter: DROP TRIGGER old_insert")
    cursor.execute(ADD_USERS, (6, 8))
    cursor.execute("DELETE FROM user_list WHERE username = '1'")
    assert_exact(cursor, 7)


def test_setup_drops_no_index_that_is_not_redundant(cursor, empty_database):
    cursor.execute(SINGLE_ROW_COUNTER)
    cursor.execute(
        "DROP INDEX idx_user_list_username; ALTER TABLE user_list DROP CONSTRAINT"
        " user_list_email_key; CREATE UNIQUE INDEX idx_user_list_username ON user_list (username)"
    )
    cursor.execute(SCHEMA)
    kept = ["idx_user_list_created_at", "idx_user_list_email", "idx_user_list_username"]
    assert cursor.column(LIST_INDEXES) == kept


FIRST_EDITION = """
    CREATE TABLE user_list (id int PRIMARY KEY, username text UNIQUE, email text);
    CREATE TABLE user_counts (
        backend integer PRIMARY KEY,
        users bigint NOT NULL,
        last_updated timestamptz NOT NULL DEFAULT clock_timestamp());
    INSERT INTO user_counts VALUES (0, 1), (17, 6);
    INSERT INTO user_list SELECT n, n, n FROM generate_series(1, 7) AS n;
    CREATE VIEW user_stats AS SELECT
        1 AS id,
        coalesce(sum(users), 0)::bigint AS total_users,
        coalesce(max(last_updated), clock_timestamp()) AS last_updated
    FROM user_counts;
"""


def test_setup_upgrades_its_first_edition(server, cursor, empty_database, role):
    cursor.execute(FIRST_EDITION + f"GRANT SELECT ON user_stats TO {role[0]}")
    set_up(environment(server, empty_database))
    cursor.execute("INSERT INTO user_list VALUES (8), (9)")
    assert_exact(cursor, 9)
    cursor.execute(f"SET SESSION AUTHORIZATION {role[0]}")
    assert_total(cursor, 9)


@pytest.mark.parametrize("existing", ["", SINGLE_ROW_COUNTER, FIRST_EDITION])
@pytest.mark.parametrize("runs_as_owner", [True, False])
def test_setup_leaves_the_counter_to_the_owner_of_user_list(
    cursor, empty_database, role, existing, runs_as_owner
):
    """Whoever runs it, and whatever the default privileges are."""
    owner, reader = role[0], f"{role[0]}_reader"
    default = f"ALTER DEFAULT PRIVILEGES FOR ROLE {owner}, CURRENT_USER GRANT ALL ON"
    cursor.execute(
        f"CREATE ROLE {reader}; {default} TABLES TO PUBLIC; {default} SEQUENCES TO PUBLIC;"
        f"GRANT CREATE ON SCHEMA public TO {owner}; SET ROLE {owner}; {existing}"
    )
    try:
        if existing == SINGLE_ROW_COUNTER:
            cursor.execute(f"GRANT SELECT (total_users) ON user_stats TO {reader}")
        if runs_as_owner:
            cursor.execute(SCHEMA)
        else:
            cursor.execute(
                "CREATE TABLE IF NOT EXISTS user_list (id int, username text, email text)"
            )
            cursor.execute(f"RESET ROLE; REVOKE CREATE ON SCHEMA public FROM {owner}")
            cursor.execute(SCHEMA)
        cursor.execute("RESET ROLE")
        owners = cursor.column(
            "SELECT DISTINCT relowner::regrole::text FROM pg_class"
            " WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v', 'S')"
            " UNION SELECT proowner::regrole::text FROM pg_proc"
            " WHERE pronamespace = 'public'::regnamespace"
        )
        assert owners == [owner]
        granted_to_others = cursor.column(
            "SELECT relname FROM pg_class, aclexplode(relacl)"
            " WHERE relname ~ '^user_counts' AND grantee <> relowner"
            " UNION SELECT proname FROM pg_proc, aclexplode(proacl)"
            " WHERE pronamespace = 'public'::regnamespace AND grantee <> proowner"
        )
        assert granted_to_others == []
        cursor.execute(f"GRANT INSERT ON user_list TO {reader}; SET ROLE {reader}")
        cursor.execute("INSERT INTO user_list (id, username, email) VALUES (100, 'x', 'x')")
        if existing == SINGLE_ROW_COUNTER:
            cursor.execute("SELECT total_users FROM user_stats")
        cursor.execute("RESET ROLE")
        assert_exact(cursor)
    finally:
        cursor.execute(f"ROLLBACK; RESET ROLE; DROP OWNED BY {reader}; DROP ROLE {reader}")


UNRECOGNIZED = {  # what is in the way, and what the error names
    "a table user_stats": ("CREATE TABLE user_stats (id int, day date)", "table public.user_stats"),
    "a view user_stats": ("CREATE VIEW user_stats AS SELECT 1 AS id", "view public.user_stats"),
    "a single row with more": (
        SINGLE_ROW_COUNTER + "ALTER TABLE user_stats ADD plan text",
        "table public.user_stats",
    ),
    "two rows": (
        SINGLE_ROW_COUNTER + "INSERT INTO user_stats VALUES (2, 7)",
        "table public.user_stats",
    ),
    "a table user_counts": ("CREATE TABLE user_counts (id int)", "table public.user_counts"),
    "a function": (
        "CREATE FUNCTION update_user_count() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'",
        "function public.update_user_count()",
    ),
    "a function of ours that another table uses": (
        SINGLE_ROW_COUNTER + "CREATE TABLE members (); CREATE TRIGGER grow AFTER INSERT ON members"
        " FOR EACH ROW EXECUTE FUNCTION update_user_count()",
        "trigger grow on table public.members",
    ),
    "a counter by another function": (
        SINGLE_ROW_COUNTER.replace("update_user_count", "bump"),
        "table public.user_stats",
    ),
    "a counter by two functions": (
        SINGLE_ROW_COUNTER + "CREATE FUNCTION bump() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN UPDATE user_stats SET id = id; RETURN NULL; END'; CREATE TRIGGER bump AFTER INSERT"
        " ON user_list FOR EACH ROW EXECUTE FUNCTION bump()",
        "trigger bump on table public.user_list",
    ),
    "a history": (
        "CREATE TABLE user_stats (id int, total_users int, last_updated date)",
        "table public.user_stats",
    ),
    "a trigger of our name": (
        "CREATE TABLE user_list (id int); CREATE TRIGGER user_update_trigger BEFORE UPDATE ON"
        " user_list FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "trigger user_update_trigger on table public.user_list",
    ),
    "a counter of another role": (
        SCHEMA + "ALTER TABLE user_counts OWNER TO {role}",
        "public.user_counts",
    ),
    "a function of another role": (
        SCHEMA + "ALTER FUNCTION recalculate_user_count() OWNER TO {role}",
        "function public.recalculate_user_count()",
    ),
}


@pytest.mark.parametrize("case", UNRECOGNIZED)
def test_setup_leaves_alone_what_it_does_not_recognize(server, cursor, empty_database, role, case):
    existing, named = UNRECOGNIZED[case]
    cursor.execute(existing.replace("{role}", role[0]))
    state = "SELECT max(xmin::text::bigint), count(*) FROM pg_class"
    before = cursor.row(state)
    assert_one_line_error(run_setup(environment(server, empty_database)), named, "not recognized")
    assert cursor.row(state) == before


def test_setup_never_runs_code_of_another_role(connect, empty_database, role):
    """The other role plants overloads that match better than those in pg_catalog."""
    cursor, intruder = connect(), connect()
    cursor.execute(f"GRANT CREATE ON SCHEMA public TO {role[0]}; CREATE TABLE caught (name text)")
    cursor.execute("GRANT INSERT ON caught TO PUBLIC")
    intruder.execute(f"SET SESSION AUTHORIZATION {role[0]}")
    planted = [
        ("pg_stat_get_activity(text)", "SETOF pg_stat_activity", "NULL"),
        ("hashtext(unknown)", "int", "1"),
        ("count(text)", "bigint", "1"),
        *((f"greatest_of({kind})", kind, "$1") for kind in ("bigint", "timestamptz")),
        ("set_config(text, text, unknown)", "text", "NULL"),
        ("format(text, regclass)", "text", "'ALTER ROLE'"),
        ("format(text, name)", "text", "'ALTER ROLE'"),
        ("format(text, text, regrole)", "text", "'ALTER ROLE'"),
        ("nextval(text)", "bigint", "1"),
        ("generate_series(int, bigint)", "SETOF bigint", "1"),
        *((f"minus_of({kind})", "bigint", "1") for kind in ("bigint, numeric", "numeric, bigint")),
        *((f"is_of({kind})", "boolean", "true") for kind in ("oid, regclass", "name, text")),
        *((f"{name}(text DEFAULT '')", "text", "''") for name in ("now", "pg_backend_pid")),
    ]
    for signature, returned, value in planted:
        with suppress(psycopg2.Error):
            intruder.execute(
                f"CREATE FUNCTION public.{signature} RETURNS {returned} LANGUAGE sql AS"
                f" $$INSERT INTO public.caught VALUES (current_user); SELECT {value}$$"
            )
    for operator, function, left, right in [
        ("+", "minus_of", "bigint", "numeric"),
        ("-", "minus_of", "numeric", "bigint"),
        ("=", "is_of", "oid", "regclass"),
        ("=", "is_of", "name", "text"),
        ("<>", "is_of", "name", "text"),
        ("<", "is_of", "oid", "regclass"),
    ]:
        intruder.execute(
            f"CREATE OPERATOR public.{operator}"
            f" (FUNCTION = public.{function}, LEFTARG = {left}, RIGHTARG = {right})"
        )
    for statement in (SCHEMA, ADD_USERS % (1, 300), SCHEMA):
        cursor.execute(statement)
    cursor.execute(f"GRANT SELECT, INSERT, DELETE, TRUNCATE ON user_list TO {role[0]}")
    intruder.execute("CREATE TEMPORARY TABLE user_counts (LIKE public.user_list)")
    intruder.execute("CREATE TEMPORARY VIEW user_stats AS SELECT 1 AS total_users")
    for n in range(1000, 1600):
        intruder.execute(ADD_USERS, (n, n))
    intruder.execute("DELETE FROM public.user_list WHERE username = '1'")
    cursor.execute("SELECT recalculate_user_count()")
    assert cursor.rows("SELECT DISTINCT name FROM caught WHERE name <> %s", [role[0]]) == []
    assert_exact(cursor, 899)


ESCALATE = """
    CREATE FUNCTION escalate() RETURNS boolean LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM set_config('role', 'none', true);
        EXECUTE 'ALTER ROLE {role} SUPERUSER';
        RETURN true;
    EXCEPTION WHEN insufficient_privilege THEN
        RETURN true;
    END $$;
    CREATE FUNCTION harmless(bigint) RETURNS boolean LANGUAGE plpgsql IMMUTABLE
    AS 'BEGIN RETURN public.escalate(); END';
    CREATE FUNCTION harmless(int, int) RETURNS boolean LANGUAGE plpgsql IMMUTABLE
    AS 'BEGIN RETURN public.escalate(); END';
    CREATE OPERATOR ### (FUNCTION = harmless, LEFTARG = int, RIGHTARG = int);
    CREATE FUNCTION fire() RETURNS trigger LANGUAGE plpgsql
    AS 'BEGIN PERFORM public.escalate(); RETURN NEW; END';
"""
COUNTS = """
    CREATE TABLE user_counts (
        id bigint GENERATED BY DEFAULT AS IDENTITY (SEQUENCE NAME public.s) PRIMARY KEY,
        backend integer NOT NULL DEFAULT pg_backend_pid(),
        users bigint NOT NULL,
        writes bigint NOT NULL DEFAULT 1,
        last_updated timestamptz NOT NULL DEFAULT clock_timestamp());
    CREATE {kind} TRIGGER t AFTER INSERT OR UPDATE ON user_counts {when}
        FOR EACH ROW EXECUTE FUNCTION fire();
"""
TRAPS = {
    "an index of user_stats": SINGLE_ROW_COUNTER
    + "CREATE INDEX ON user_stats (id) WHERE harmless(1)",
    "a CHECK of user_list": "CREATE TABLE user_list (id int CHECK (harmless(id)));"
    "INSERT INTO user_list VALUES (1)",
    "an index of user_list": SCHEMA + "CREATE INDEX ON user_list (id) WHERE harmless(1)",
    "an operator": SCHEMA + "CREATE INDEX ON user_list (id) WHERE 1 ### 2",
    "a foreign key": SINGLE_ROW_COUNTER + "CREATE TABLE orders (user_id int REFERENCES user_list);"
    "CREATE INDEX ON orders (user_id) WHERE harmless(1)",
    "a child of user_stats": SINGLE_ROW_COUNTER + "CREATE TABLE child () INHERITS (user_stats);"
    "CREATE INDEX ON child (id) WHERE harmless(1)",
    "a trigger of user_counts": COUNTS.format(kind="", when=""),
    "a deferred trigger": SCHEMA
    + COUNTS[COUNTS.index("CREATE {kind}") :].format(
        kind="CONSTRAINT", when="DEFERRABLE INITIALLY DEFERRED"
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_setup_by_a_superuser_runs_no_code_of_the_owner(connect, empty_database, role, trap):
    cursor, intruder = connect(), connect()
    cursor.execute(f"GRANT CREATE ON SCHEMA public TO {role[0]}")
    intruder.execute(f"SET SESSION AUTHORIZATION {role[0]}")
    intruder.execute(ESCALATE.replace("{role}", role[0]) + TRAPS[trap])
    with pytest.raises(psycopg2.Error, match=r"^(not recognized as part of a counter|run this as)"):
        cursor.execute(SCHEMA)
    cursor.execute("ROLLBACK")
    assert not cursor.value("SELECT rolsuper FROM pg_roles WHERE rolname = %s", [role[0]])


def test_setup_adopts_nothing_that_is_planted_while_it_waits(connect, database, role):
    cursor, intruder, reader = (connect() for _ in range(3))
    cursor.execute("DROP TABLE user_counts CASCADE; DROP FUNCTION update_user_count() CASCADE")
    cursor.execute(
        "DROP FUNCTION recalculate_user_count(); DROP FUNCTION set_user_updated_at CASCADE"
    )
    cursor.execute(f"GRANT CREATE ON SCHEMA public TO {role[0]}")
    cursor.execute(f"GRANT INSERT ON user_list TO {role[0]}")
    intruder.execute(f"SET SESSION AUTHORIZATION {role[0]}; BEGIN; " + ADD_USERS, (1, 1))
    with ThreadPoolExecutor(1) as threads:
        setup = threads.submit(cursor.execute, SCHEMA)
        wait_until(lambda: has_lock_waiters(reader))
        intruder.execute(
            ESCALATE.replace("{role}", role[0]) + COUNTS.format(kind="", when="") + "COMMIT"
        )
        with pytest.raises(psycopg2.Error, match="not recognized as part of a counter"):
            setup.result()
    assert not cursor.value("ROLLBACK; SELECT rolsuper FROM pg_roles WHERE rolname = %s", [role[0]])


def test_triggers_work_beside_overloads_with_defaults(connect, cursor, database):
    """They make calls ambiguous, so our functions must not call one another."""
    for name in ("update_user_count", "recalculate_user_count", "fold_user_counts"):
        cursor.execute(
            f"CREATE FUNCTION {name}(int DEFAULT 0) RETURNS bigint LANGUAGE sql AS 'SELECT 1'"
        )
    for number in range(100):
        cursor.execute(ADD_USERS, (number, number))
    assert_total(cursor, 100)


def test_setup_again_neither_waits_for_readers_nor_blocks_them(connect, database):
    cursor, reader = connect(), connect()
    reader.execute("BEGIN; SELECT total_users FROM user_stats")
    cursor.execute("SET lock_timeout = '2s'; " + SCHEMA)
    reader.execute(ADD_USERS, (1, 1))
    reader.execute("COMMIT")
    assert_exact(reader, 1)


def test_setup_twice_at_the_same_instant(server, missing_database):
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(set_up, [environment(server, missing_database)] * 3))


def test_setup_is_exact_whatever_the_default_isolation(connect, empty_database):
    cursor, writer = connect(), connect()
    cursor.execute(SCHEMA)
    cursor.execute("SET default_transaction_isolation = 'repeatable read'")
    writer.execute("BEGIN; ALTER TABLE user_list DISABLE TRIGGER USER; " + ADD_USERS, (1, 3))
    with ThreadPoolExecutor(1) as threads:
        setup = threads.submit(cursor.execute, SCHEMA)
        reader = connect()
        wait_until(lambda: has_lock_waiters(reader))
        writer.execute("ALTER TABLE user_list ENABLE TRIGGER USER; COMMIT")
        setup.result()
    cursor.execute("SET default_transaction_isolation = 'read committed'")
    assert_exact(cursor, 3)


def test_setup_adopts_a_user_list_with_rows(server, cursor, empty_database):
    cursor.execute("CREATE TABLE user_list (id int PRIMARY KEY, username text, email text)")
    cursor.execute("INSERT INTO user_list SELECT n FROM generate_series(1, 7) AS n")
    for _ in range(2):
        output = set_up(environment(server, empty_database))
        assert output == f"Applied schema.sql to {empty_database}. Users: 7.\n"
    cursor.execute("UPDATE user_list SET username = 'x' WHERE id = 1")
    assert_exact(cursor, 7)


def test_setup_runs_through_psql_again_and_again(server, cursor, empty_database, tmp_path):
    psql = setup_db.embedded_postgres(tmp_path).bin_path / "psql"
    options = ["-X", "-q", "-v", "ON_ERROR_STOP=1", "-h", server["host"], "-p", server["port"]]
    for _ in range(2):
        done = subprocess.run(
            [psql, *options, "-U", server["user"], "-d", empty_database, "-f", "schema.sql"],
            cwd=HERE,
            env=os.environ | {"PGPASSWORD": server["password"] or ""},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert_exact(cursor, 0)


def test_setup_creates_a_database_and_adds_sample_users(server, missing_database):
    settings, name = environment(server, missing_database), missing_database
    created = f"Created the database {name}.\nApplied schema.sql to {name}. Users: 0.\n"
    assert set_up(settings) == created
    set_up(settings, "sample")
    added = f"Added 25000 sample users to {name}. Users: 25010.\n"
    assert set_up(settings, "sample", "25000") == added


def assert_one_line_error(done, *words):
    assert done.returncode != 0
    assert done.stdout == ""
    assert re.fullmatch(r".+\n", done.stderr), done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_setup_reports_errors_in_one_line(server, empty_database, cursor, role):
    here = environment(server, empty_database)
    assert_one_line_error(run_setup(here, "sample"), "user_list", "python setup_db.py")
    for text in ("0", "-1", "many", "9" * 20):
        assert_one_line_error(run_setup(here, "sample", text), f"not '{text}'")
    assert_one_line_error(run_setup(here, "smaple"), "usage")
    nobody = here | {"DB_USER": "nobody_" + secrets.token_hex(4)}
    assert_one_line_error(run_setup(nobody), "nobody_")
    poor = here | {"DB_USER": role[0], "DB_PASSWORD": role[1], "DB_NAME": "usercount_test_missing"}
    assert_one_line_error(run_setup(poor), "permission denied to create database")
    nowhere = here | {"DB_HOST": "127.0.0.1", "DB_PORT": str(free_port())}
    assert_one_line_error(run_setup(nowhere), "Connection refused")


@pytest.mark.parametrize(
    "name, text",
    [
        ("PORT", "abc"),
        ("PORT", "99999"),
        ("PORT", "1_0"),
        ("DB_PORT", "x"),
        ("DB_PORT", "1,2"),
        ("DB_HOST", "a,,b"),
        ("APP_ENV", "test"),
    ],
)
def test_setup_rejects_invalid_settings(server, name, text):
    done = subprocess.run(
        [sys.executable, "-m", "gunicorn", "usercount:app"],
        cwd=HERE,
        env=environment(server, "none") | {name: text},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert_one_line_error(done, name, repr(text))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_setup_run_starts_and_stops_everything(signum):
    folder = Path(tempfile.mkdtemp(prefix="usercount-"))
    for name in ("usercount.py", "setup_db.py", "schema.sql", "gunicorn.conf.py"):
        shutil.copy(HERE / name, folder)
    client = Client(free_port())
    (folder / ".env").write_text(f"PORT={client.port}\nDB_NAME=from_file\n")
    settings = environment(setup_db.CONFIGURED_SERVER, "", PGHOSTADDR="127.0.0.9")  # not obeyed
    for name in ("DB_HOST", "DB_PORT", "DB_USER", "DB_PASSWORD", "DB_NAME"):
        del settings[name]
    embedded = settings | {"DB_HOST": str(folder / ".postgres")}
    start = partial(
        subprocess.Popen,
        [sys.executable, "setup_db.py", "run"],
        cwd=folder,
        env=settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    process = start()
    try:
        wait_until(lambda: list(folder.glob(".postgres*/PG_VERSION")))  # initdb has begun
        process.send_signal(signum)
        assert process.wait(15) != 0
        for expected in (10, 13):  # the data persists across a restart
            process = start()
            wait_until(lambda: client.get()[0] == 200, 30)
            assert client.count() == expected
            if expected == 10:
                assert "from_file" in run_setup(embedded, "sample", "3", folder=folder).stdout
                done = run_setup(settings, "run", folder=folder)
                assert_one_line_error(done, f"PORT {client.port}")
                other = settings | {"PORT": str(free_port())}
                assert_one_line_error(run_setup(other, "run", folder=folder), "in use")
            started = psutil.Process(process.pid).children(recursive=True)
            pid_file = folder / ".postgres" / "postmaster.pid"
            started.append(psutil.Process(int(pid_file.read_text().split()[0])))
            process.send_signal(signum)
            assert process.wait(15) == 0
            assert client.get()[0] == 0
            assert psutil.wait_procs(started, timeout=5)[1] == []  # nothing is left behind
    finally:
        process.terminate()  # if an assertion failed; it ends what it has started
        process.wait(15)
        shutil.rmtree(folder)


# --- The API ---


def test_api_answers_in_the_agreed_shape(service, cursor):
    cursor.execute(ADD_USERS, (1, 42))
    last_updated = cursor.value("SELECT last_updated FROM user_stats")
    status, headers, body = service.get("/api/usercount")
    assert status == 200
    assert body == f'{{"totalUsers": 42, "lastUpdated": "{usercount.iso_utc(last_updated)}"}}\n'
    assert re.search(f'"{TIMESTAMP_PATTERN}"', body)
    assert (headers["Content-Type"], headers["Cache-Control"]) == ("application/json", "no-store")
    status, headers, body = service.get("/health")
    assert status == 200
    healthy = '"database": {"status": "healthy", "connected": true}'
    assert re.fullmatch(
        f'{{"status": "healthy", "timestamp": "{TIMESTAMP_PATTERN}", {healthy}}}\n', body
    )
    assert (headers["Content-Type"], headers["Cache-Control"]) == ("application/json", "no-store")


@pytest.mark.parametrize(
    "method, path, status, name",
    [
        ("GET", "/", 404, "Not Found"),
        ("GET", "/api/usercount/", 404, "Not Found"),
        ("GET", "/api//usercount", 404, "Not Found"),
        ("POST", "/api/usercount", 405, "Method Not Allowed"),
        ("OPTIONS", "/health", 405, "Method Not Allowed"),
    ],
)
def test_api_errors_are_json(service, method, path, status, name):
    answered, headers, body = service.request(method, path)
    assert answered == status
    error = json.loads(body)
    assert (list(error), error["statusCode"], error["error"]) == (
        ["statusCode", "error", "message"],
        status,
        name,
    )
    assert body.endswith("}\n") and body.count("\n") == 1
    assert (headers["Content-Type"], headers["Cache-Control"]) == ("application/json", "no-store")
    allowed = headers.get("Allow", "")
    assert set(filter(None, allowed.split(", "))) == ({"GET", "HEAD"} if status == 405 else set())


def test_api_head_is_get_without_a_body(service):
    status, headers, body = service.request("HEAD", "/api/usercount")
    assert (status, body) == (200, "")
    assert int(headers["Content-Length"]) == len(service.get("/api/usercount")[2])


def test_api_internal_error_reveals_nothing(service, cursor):
    """Caused by a view whose last_updated is not a time."""
    cursor.execute("DROP VIEW user_stats")
    cursor.execute(
        "CREATE VIEW user_stats AS SELECT 1 AS id, 2 AS total_users, 'x' AS last_updated"
    )
    status, _, body = service.get()
    assert (status, json.loads(body)["statusCode"]) == (500, 500)
    assert "Traceback" not in body and "str" not in body
    log = service.log.read_text()
    assert re.search(r"^\[[-\d]{10} [:\d]{8} \+\d{4}\] .*Exception on /api/usercount", log, re.M)
    assert "AttributeError" in log


def test_api_serves_as_a_role_that_may_only_read_user_stats(
    server, database, cursor, role, tmp_path
):
    cursor.execute(f"GRANT SELECT ON user_stats TO {role[0]}")
    settings = environment(server, database, DB_USER=role[0], DB_PASSWORD=role[1])
    with running_service(settings, tmp_path) as service:
        assert service.count() == 0


def test_api_coalesces_requests_however_the_path_is_written(service, cursor):
    """Otherwise each request would read on its own."""
    with ThreadPoolExecutor(40) as threads:
        paths = ["//api/usercount", "/api/usercount"] * 100
        assert {status for status, _, _ in threads.map(service.get, paths)} == {200}
    connected = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'usercount'"
    assert cursor.value(connected) == usercount.MAX_IDLE_CONNECTIONS


def slow_down(cursor, seconds, column="NULL"):
    """Make each read sleep after it has taken its snapshot."""
    cursor.execute("ALTER VIEW user_stats RENAME TO quick_stats")
    cursor.execute(
        f"CREATE VIEW user_stats AS SELECT *, {column}, pg_sleep({seconds})::text FROM quick_stats"
    )


def test_api_is_never_stale_under_load(server, database, cursor, tmp_path):
    """Reads right after each commit, while others keep reading."""
    slow_down(cursor, 0.005)  # so that a read is almost always under way when a request arrives
    settings = environment(server, database, WEB_CONCURRENCY="2")
    with running_service(settings, tmp_path) as service, ExitStack() as connections:
        clients = [connections.enter_context(closing(service.connect())) for _ in range(16)]
        asking = [partial(get_again, client, "/api/usercount") for client in clients]
        with in_background(*asking) as responses:
            for number in range(1, 301):
                cursor.execute(ADD_USERS, (number, number))
                assert service.count() == number
    assert all(set(each) == {(200, True)} for each in responses)


def test_api_coalesces_requests_and_never_uses_an_older_read(service, cursor):
    cursor.execute("CREATE SEQUENCE reads")
    slow_down(cursor, 1, "nextval('reads')")
    with ThreadPoolExecutor(31) as threads:
        first = threads.submit(service.count)
        wait_until(lambda: cursor.value("SELECT is_called FROM reads"))
        cursor.execute(ADD_USERS, (1, 1))  # after the first read began, before the others arrive
        others = [threads.submit(service.count) for _ in range(30)]
        assert first.result() == 0
        assert {other.result() for other in others} == {1}
    assert cursor.value("SELECT last_value FROM reads") == 2


def test_api_logs_slow_queries(service, cursor):
    slow_down(cursor, 0.15)
    service.count()
    assert len(re.findall(r"Slow query: (1[5-9]|[2-9]\d)\d ms", service.log.read_text())) == 1


@pytest.mark.parametrize("app_env", ["development", "production"])
def test_api_logs_each_read_only_in_development(server, database, tmp_path, app_env):
    with running_service(environment(server, database, APP_ENV=app_env), tmp_path) as service:
        service.count()
        assert ("Read the count in " in service.log.read_text()) == (app_env == "development")


HOSTILE_REQUESTS = [
    b"GET /api/usercount HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: \xff\x00@evil:99999\r\nAccept: nothing/here;q=-1\r\n\r\n",
    b"GET /api/usercount HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n",
    b"GET /api/usercount HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n\r\nzz\r\n",
    b"GET /health HTTP/1.1\r\nCookie: " + b"c=d; " * 1600 + b"\r\n\r\n",
    b"get /api/usercount HTTP/1.0\r\nX-Forwarded-Host: a, b\r\n\r\n",
    b"GET / HTTP/1\r\n\r\n",
    b"GET /" + b"%" * 9000 + b" HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"POST /health HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET /health HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    b"GET /api/usercount HTTP/1.1\r\nHost: x",
]


def send(port, data):
    """Send raw bytes; return what comes back until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), RESPONSE_TIMEOUT_SECONDS) as client:
        with suppress(ConnectionError):
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        received = b""
        with suppress(ConnectionError):
            while part := client.recv(65536):
                received += part
        return received


def test_api_no_client_changes_what_another_gets(service, cursor):
    cursor.execute(ADD_USERS, (1, 42))
    slow_down(cursor, 0.01)  # so that requests gather in batches
    requests = HOSTILE_REQUESTS + HOSTILE_REQUESTS[:1] * 4
    with in_background(*(partial(send, service.port, request) for request in requests)):
        assert {service.count() for _ in range(200)} == {42}
    log = service.log.read_text()
    assert "Traceback" not in log
    assert re.search(
        r"^\[[-\d]{10} [:\d]{8} \+\d{4}\] .* Invalid request .*Expected dot$", log, re.M
    )


@pytest.mark.parametrize("access_log", ["", "--access-logfile=-"])
def test_api_random_input_leaves_no_traceback(server, database, tmp_path, access_log):
    generator = random.Random(1)
    settings = environment(server, database, GUNICORN_CMD_ARGS=access_log)
    with running_service(settings, tmp_path) as service:
        for _ in range(300):
            request = bytearray(generator.choice(HOSTILE_REQUESTS)[:300])
            for _ in range(generator.randrange(8)):
                position = generator.randrange(len(request))
                request[position : position + generator.randrange(3)] = generator.randbytes(2)
            send(service.port, bytes(request))
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost:")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset
        assert service.get()[0] == 200
        assert "Traceback" not in service.log.read_text()


def test_api_answers_a_request_with_a_large_body(service):
    assert service.request("POST", "/health", b"x" * 5_000_000)[0] == 405


def test_api_takes_an_absolute_uri(service):
    response = send(service.port, b"GET http://example.com/health HTTP/1.1\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 200 OK\r\n")


def test_api_cuts_off_clients_that_drip_or_never_read(service):
    """Others are served meanwhile, although more than a thousand are connected."""

    def drip(client):
        with suppress(OSError):
            while True:
                client.sendall(b"x")
                time.sleep(0.5)

    def flood(client):
        with suppress(OSError):
            while True:
                client.sendall(b"GET / HTTP/1.1\r\n\r\n")

    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard_limit), hard_limit))
    with ThreadPoolExecutor(4) as threads, ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft_limit, hard_limit))
        address = "127.0.0.1", service.port
        clients = [stack.enter_context(socket.create_connection(address, 20)) for _ in range(1200)]
        began = time.monotonic()
        hostile = [threads.submit(drip, client) for client in clients[:2]]
        hostile += [threads.submit(flood, client) for client in clients[2:4]]
        patient = stack.enter_context(closing(service.connect()))
        while not all(future.done() for future in hostile) or time.monotonic() - began < 13:
            assert get_again(patient, "/health") == (200, True)
            assert time.monotonic() - began < 15
            time.sleep(0.1)


def test_api_sighup_serves_the_new_code(server, database, tmp_path):
    for name in ("usercount.py", "gunicorn.conf.py"):
        shutil.copy(HERE / name, tmp_path)
    with running_service(environment(server, database), tmp_path, code=tmp_path) as service:
        code = (tmp_path / "usercount.py").read_text()
        (tmp_path / "usercount.py").write_text(code.replace('"totalUsers"', '"users"'))
        service.process.send_signal(signal.SIGHUP)
        wait_until(lambda: '"users": 0' in service.get()[2])


def test_api_ctrl_c_leaves_no_traceback(server, database, tmp_path):
    """In a terminal it reaches the workers, too, not only gunicorn's master."""
    settings = environment(server, database, WEB_CONCURRENCY="4")
    with running_service(settings, tmp_path) as service:
        time.sleep(1)  # until the workers are idle
        os.killpg(service.process.pid, signal.SIGINT)
        service.process.wait(10)
    assert "Traceback" not in service.log.read_text()


def test_api_works_without_gunicorn(server, database):
    client = Client(free_port())
    process = subprocess.Popen(
        [sys.executable, "-m", "flask", "--app", "usercount", "run", "--port", str(client.port)],
        cwd=HERE,
        env=environment(server, database),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: client.get()[0] == 200)
        assert {status for status, _, _ in client.get_at_once()} == {200}
    finally:
        process.terminate()
        process.wait(10)


# --- Faults ---


@pytest.fixture(scope="module")
def cluster():
    with running_cluster() as cluster:
        with open_cursor(cluster.params) as cursor:
            cursor.execute("CREATE DATABASE served")
            cursor.execute("CREATE ROLE reader LOGIN")
        with open_cursor(cluster.params, "served") as cursor:
            cursor.execute(SCHEMA)
            cursor.execute("GRANT SELECT ON user_stats TO reader")
        yield cluster


@pytest.fixture(scope="module")
def exposed_service(cluster, tmp_path_factory):
    """A service whose database is about to fail."""
    settings = environment(cluster.params, "served", DB_USER="reader")
    with running_service(settings, tmp_path_factory.mktemp("exposed")) as service:
        yield service


@contextmanager
def temporarily(do, undo):
    do()
    try:
        yield
    finally:
        undo()


def stopped(cluster):
    return temporarily(cluster.stop, cluster.start)


def killed(cluster):
    return temporarily(cluster.kill, cluster.start)


def frozen(cluster):
    freeze = partial(cluster.signal_all, signal.SIGSTOP)
    return temporarily(freeze, partial(cluster.signal_all, signal.SIGCONT))


@contextmanager
def executed(cluster, database, break_sql, restore_sql):
    with (
        open_cursor(cluster.params, database) as cursor,
        temporarily(partial(cursor.execute, break_sql), partial(cursor.execute, restore_sql)),
    ):
        yield


def locked(cluster):
    lock = "BEGIN; LOCK TABLE user_counts IN ACCESS EXCLUSIVE MODE"
    return executed(cluster, "served", lock, "ROLLBACK")


TERMINATE = (
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'reader'; "
)


def renamed(cluster):
    rename = "ALTER DATABASE {} RENAME TO {}".format
    return executed(
        cluster,
        "postgres",
        "ALTER DATABASE served ALLOW_CONNECTIONS false;" + TERMINATE + rename("served", "gone"),
        rename("gone", "served") + "; ALTER DATABASE served ALLOW_CONNECTIONS true",
    )


def without_schema(cluster):
    restore = "ALTER VIEW lost_stats RENAME TO user_stats"
    return executed(cluster, "served", "ALTER VIEW user_stats RENAME TO lost_stats", restore)


def without_right(cluster):
    revoke = "REVOKE SELECT ON user_stats FROM reader"
    return executed(cluster, "served", revoke, "GRANT SELECT ON user_stats TO reader")


@contextmanager
def full(cluster):
    connections = []
    try:
        with pytest.raises(psycopg2.OperationalError):
            while True:
                connections.append(setup_db.connect(cluster.params, "postgres"))
        connections[0].cursor().execute(TERMINATE)
        with pytest.raises(psycopg2.OperationalError):
            while True:
                connections.append(setup_db.connect(cluster.params, "postgres"))
        yield connections
    finally:
        for connection in connections:
            connection.close()


def assert_unavailable(answers):
    for status, headers, body in answers:
        assert status == 503, body
        if "statusCode" in body:
            assert headers["Retry-After"] == "1"
            assert json.loads(body) == {
                "statusCode": 503,
                "error": "Service Unavailable",
                "message": "The count is temporarily unavailable.",
            }
        else:
            unhealthy = '"database": {"status": "unhealthy", "connected": false}'
            assert re.fullmatch(
                f'{{"status": "unhealthy", "timestamp": "{TIMESTAMP_PATTERN}", {unhealthy}}}\n',
                body,
            )


@pytest.mark.parametrize(
    "fault",
    [stopped, killed, frozen, locked, renamed, without_schema, without_right, full],
)
def test_faults_are_answered_in_time_and_recovered_from(cluster, exposed_service, fault):
    assert exposed_service.get()[0] == 200
    before = len(exposed_service.log.read_text())
    with fault(cluster):
        assert_unavailable(exposed_service.get_at_once())
        assert exposed_service.get("/")[0] == 404
        assert_unavailable(exposed_service.get_at_once())
    wait_until(lambda: exposed_service.get()[0] == 200, seconds=5)
    assert {status for status, _, _ in exposed_service.get_at_once()} == {200}
    again = "Database available again: "
    wait_until(lambda: exposed_service.get() and again in exposed_service.log.read_text()[before:])
    log = exposed_service.log.read_text()[before:]
    assert 1 <= log.count("Database unavailable: ") <= 4
    assert "Traceback" not in log and len(log.splitlines()) <= 6
    if fault is without_schema:
        assert "run python setup_db.py" in log


@contextmanager
def silent_listener():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@contextmanager
def nothing():
    yield free_port()


@pytest.mark.parametrize("listener", [silent_listener, nothing])
def test_faults_of_the_address_are_answered_in_time(listener, tmp_path):
    with listener() as port:
        server = {"host": "127.0.0.1", "port": str(port), "user": "reader", "password": "secret"}
        with running_service(environment(server, "served"), tmp_path) as service:
            assert_unavailable(service.get_at_once())
        assert "secret" not in service.log.read_text()


def test_faults_of_idle_connections_fail_no_request(cluster, exposed_service):
    paths = ["/api/usercount", "/health"] * 4
    asking = [partial(exposed_service.get, path) for path in paths]
    with in_background(*asking) as responses, open_cursor(cluster.params) as cursor:
        terminated = 0
        for _ in range(40):
            time.sleep(0.02)
            terminated += len(cursor.rows(TERMINATE))
    assert {status for status, _, _ in itertools.chain(*responses)} == {200}
    assert terminated > 20


def test_faults_leave_a_restarted_server_without_an_error(cluster, exposed_service):
    assert {status for status, _, _ in exposed_service.get_at_once()} == {200}
    cluster.stop()
    cluster.start()
    assert {status for status, _, _ in exposed_service.get_at_once()} == {200}


def test_faults_cancel_abandoned_queries_on_the_server(cluster, exposed_service):
    with locked(cluster):
        assert_unavailable(exposed_service.get_at_once())
        active = "SELECT FROM pg_stat_activity WHERE usename = 'reader' AND state = 'active'"
        with open_cursor(cluster.params) as cursor:
            wait_until(lambda: not cursor.rows(active))


def test_faults_never_open_more_connections_than_the_pool_keeps(cluster, exposed_service):
    connected = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader'"
    asking = [partial(exposed_service.get_at_once, 10)] * 10
    with in_background(*asking), open_cursor(cluster.params) as cursor:
        for _ in range(50):
            assert cursor.value(connected) <= usercount.MAX_IDLE_CONNECTIONS


@pytest.fixture(scope="module")
def standby(cluster):
    with running_cluster(cluster) as standby:
        yield standby


@pytest.mark.parametrize("fault", [stopped, killed, frozen])
def test_faults_of_the_primary_cost_no_request_and_end_with_it(cluster, standby, tmp_path, fault):
    """With a shorter connection age than usual, so that reads return to the primary sooner."""
    (tmp_path / "hasty.py").write_text(
        "import usercount\nusercount.MAX_CONNECTION_AGE_SECONDS = 2\napp = usercount.app\n"
    )
    both = {name: f"{cluster.params[name]},{standby.params[name]}" for name in ("host", "port")}
    settings = environment(cluster.params | both, "served", WEB_CONCURRENCY="2")
    arguments = "--pythonpath", tmp_path, "hasty:app"
    with running_service(settings, tmp_path, *arguments) as service:
        users = service.count()
        asking = [partial(service.get, path) for path in ("/api/usercount", "/health") * 2]
        with in_background(*asking) as responses:
            with fault(cluster):
                time.sleep(4)  # how long the fault lasts
                assert service.count() == users
            with (
                open_cursor(cluster.params, "served") as primary,
                closing(psycopg2.connect(**standby.params, dbname="served")) as replica,
            ):
                replica.autocommit = True
                replica.cursor().execute("SELECT pg_wal_replay_pause()")
                name = secrets.token_hex(4)
                primary.execute(
                    "INSERT INTO user_list (username, email) VALUES (%s, %s)", [name] * 2
                )
                wait_until(lambda: [service.count() for _ in range(20)] == [users + 1] * 20)
                replica.cursor().execute("SELECT pg_wal_replay_resume()")
        assert {status for status, _, _ in itertools.chain(*responses)} == {200}
        assert "Reading from" in service.log.read_text()
        assert "Traceback" not in service.log.read_text()


def test_faults_of_an_almost_full_server_are_none(cluster, tmp_path):
    """One connection is enough for both routes."""
    settings = environment(cluster.params, "served", DB_USER="reader")
    with running_service(settings, tmp_path) as service, full(cluster) as connections:
        for connection in connections[-4:]:  # three of them are reserved for superusers
            connection.close()
        wait_until(lambda: service.get()[0] == 200)
        for _ in range(10):
            assert {status for status, _, _ in service.get_at_once()} == {200}
        assert len(service.log.read_text().splitlines()) < 12


def test_faults_of_dns_leave_the_addresses_that_were_known(monkeypatch):
    known = socket.getaddrinfo
    monkeypatch.setattr(usercount, "DB_HOSTS", ["localhost", "no-such-host.invalid", "/run"])
    monkeypatch.setattr(usercount, "DB_PORTS", [1, 2, 3])
    database = usercount.Database()
    targets = database.find_targets()
    assert targets[-1] == ("/run", None, 3)
    assert {target.host for target in targets} == {"localhost", "/run"}

    def fail(*arguments, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert database.find_targets() == targets
    is_over = threading.Event()
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: is_over.wait(20) and known("::1", 1)
    )
    assert database.find_targets() == targets  # DNS is silent
    is_over.set()
    wait_until(lambda: ("localhost", "::1", 1) in database.find_targets())


def test_faults_do_not_keep_sigterm_from_answering_waiting_requests(cluster, tmp_path):
    service = Service(environment(cluster.params, "served"), tmp_path)
    with ThreadPoolExecutor(8) as threads, locked(cluster) as _:
        waiting = [threads.submit(service.get) for _ in range(8)]
        with open_cursor(cluster.params, "served") as cursor:
            wait_until(lambda: has_lock_waiters(cursor))
        service.process.terminate()
        time.sleep(1)  # how long the lock lasts
    try:
        assert [future.result()[0] for future in waiting] == [200] * 8
        assert service.process.wait(10) == 0
    finally:
        service.process.kill()
