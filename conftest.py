"""What the tests share: real PostgreSQL servers, throw-away databases, the real service.

The server under test is an embedded one or, with DB_HOST set, that one, where each test has a
database of its own and DB_NAME is never touched. Tests that stop, kill or freeze a server always
use an embedded one of their own.
"""

import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import psutil
import psycopg2
import pytest

import setup_db

HERE = Path(__file__).parent
SCHEMA = (HERE / "schema.sql").read_text()
ISOLATION_LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
RECALCULATE = "SELECT recalculate_user_count()"
ADD_USERS = "INSERT INTO user_list (username, email) SELECT n, n FROM generate_series(%s, %s) AS n"
TIMESTAMP_PATTERN = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
RESPONSE_TIMEOUT_SECONDS = 5  # promised, whatever the database does


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out waiting for the condition"
        time.sleep(0.01)


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
        done = threads.map(repeat, functions, all_results)
        try:
            yield all_results
        finally:
            is_done.set()
        list(done)


# --- PostgreSQL ---


class Cluster:
    """An embedded PostgreSQL on a TCP port of its own, which a test may abuse freely."""

    def __init__(self, primary=None):
        """Create it, as a streaming standby if a primary is given."""
        self.folder = Path(tempfile.mkdtemp(prefix="usercount-"))
        self.folder.chmod(0o755)  # run by root, the server is another user's
        self.params = setup_db.EMBEDDED_PARAMS | {"host": "127.0.0.1", "port": str(free_port())}
        if primary:
            self.home, self.data = primary.home, self.folder / "data"
            self.data.mkdir(mode=0o700)
            setup_db.give_to_postgres(self.data)
            source = f"host=127.0.0.1 port={primary.params['port']} user=postgres"
            self.run("pg_basebackup", "-R", "-c", "fast", "-d", source, "-D", self.data)
        else:
            self.home, self.data = self.folder / "home", self.folder / "home" / "data"
            setup_db.create_home(self.home)

    def run(self, program, *arguments):
        # Into a file: the server inherits the output, and reading a pipe would last until it ends.
        with (self.folder / "log").open("a") as log:
            command = [setup_db.postgres_programs(self.home) / program, *arguments]
            options = {"cwd": "/", "stdout": log, "stderr": log, "check": True}
            subprocess.run(command, **options, **setup_db.AS_POSTGRES)

    def start(self):
        options = f"-h 127.0.0.1 -p {self.params['port']} -k {self.data} -F"
        options += " -c max_connections=40 -c max_prepared_transactions=10"
        self.run("pg_ctl", "start", "-w", "-D", self.data, "-l", self.data / "log", "-o", options)

    def stop(self, mode="fast"):
        self.run("pg_ctl", "stop", "-w", "-m", mode, "-D", self.data)

    def signal_all(self, signum):
        """Send a signal to every process of the server and return them."""
        try:
            pid = int((self.data / "postmaster.pid").read_text().split()[0])
            processes = [psutil.Process(pid), *psutil.Process(pid).children()]
        except (FileNotFoundError, psutil.NoSuchProcess):
            return []
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


class Cursor(psycopg2.extensions.cursor):
    """A cursor on a connection of its own; can also return the result of a query."""

    def rows(self, *query):
        self.execute(*query)
        return self.fetchall()

    def row(self, *query):
        [row] = self.rows(*query)
        return row

    def column(self, *query):
        return [value for (value,) in self.rows(*query)]

    def value(self, *query):
        [value] = self.row(*query)
        return value

    def has_lock_waiters(self):
        return self.value(
            "SELECT count(*) > 0 FROM pg_stat_activity"
            " WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )

    @contextmanager
    def selecting(self, columns):
        """Let user_stats select other columns, for instance after a sleep."""
        rename = "ALTER VIEW user_stats RENAME TO own_stats;"
        self.execute(f"{rename} CREATE VIEW user_stats AS SELECT {columns} FROM own_stats")
        try:
            yield
        finally:
            self.execute("DROP VIEW user_stats; ALTER VIEW own_stats RENAME TO user_stats")


@contextmanager
def open_cursor(params, database="postgres"):
    with closing(setup_db.connect(params, database)) as connection:
        yield connection.cursor(cursor_factory=Cursor)


@contextmanager
def throwaway_database(params, template="template1"):
    """Create a database, unless `template` is None, and yield its name; drop it at the end."""
    name = f"usercount_test_{secrets.token_hex(6)}"
    with open_cursor(params) as cursor:
        try:
            if template:
                cursor.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
            yield name
        finally:
            cursor.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def params():
    """libpq's parameters of the server under test."""
    if os.environ.get("DB_HOST"):
        yield setup_db.CONFIGURED_PARAMS
    else:
        with running_cluster() as cluster:
            yield cluster.params


@pytest.fixture(scope="session")
def template(params):
    """A database with the shipped schema, as setup_db.py makes it."""
    with throwaway_database(params) as name:
        done = run_setup(environment(params, name))
        assert (done.returncode, done.stderr) == (0, "")
        yield name


@pytest.fixture
def database(params, template):
    with throwaway_database(params, template) as name:
        yield name


@pytest.fixture
def empty_database(params):
    with throwaway_database(params) as name:
        yield name


@pytest.fixture
def connect(params, request):
    """A function that returns a cursor on a new autocommit connection to the test's database."""
    name = "database" if "database" in request.fixturenames else "empty_database"
    database = request.getfixturevalue(name)
    with ExitStack() as cursors:
        yield lambda: cursors.enter_context(open_cursor(params, database))


@pytest.fixture
def cursor(connect):
    return connect()


@pytest.fixture
def alice(cursor):
    """A role that may create whatever it likes. Its name, to be quoted, is its password, too."""
    name, database = f'"Mixed.a@b.{secrets.token_hex(6)}"', cursor.connection.info.dbname
    cursor.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{name[1:-1]}'")
    cursor.execute(f"GRANT CREATE ON DATABASE {database} TO {name}")
    cursor.execute(f"GRANT ALL ON SCHEMA public TO {name}")
    yield name
    cursor.execute(f"ROLLBACK; RESET SESSION AUTHORIZATION; DROP OWNED BY {name} CASCADE")
    cursor.execute(f"DROP ROLE {name}")


# --- setup_db.py and the service ---


def environment(params, database, **settings):
    """Return the environment for a program that uses `database`, free of inherited settings."""
    names = ("DB_", "PG", "PORT", "USER_TABLE", "APP_ENV", "WEB_CONCURRENCY", "GUNICORN", "GRANIAN")
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(names)}
    server = {f"DB_{name.upper()}": text or "" for name, text in params.items()}
    defaults = {"DB_NAME": database, "USER_TABLE": "", "APP_ENV": "production"}  # and not .env's
    return inherited | server | defaults | settings


def run_setup(environment, *arguments, folder=HERE):
    command = [sys.executable, folder / "setup_db.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


class Client:
    """Sends requests to a local port."""

    def __init__(self, port):
        self.port = port

    def connect(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, RESPONSE_TIMEOUT_SECONDS)
        connection.connect()
        connection.auto_open = False  # or it would reconnect unnoticed
        return connection

    def request(self, method, path, *content):
        """Return status, headers and body; raise TimeoutError if the response takes too long."""
        with closing(self.connect()) as connection:
            connection.request(method, path, *content)
            response = connection.getresponse()
            return response.status, response.headers, response.read().decode()

    def get(self, path="/api/usercount"):
        with suppress(ConnectionRefusedError):
            return self.request("GET", path)
        return 0, {}, ""

    def send(self, data, host="127.0.0.1", seconds=RESPONSE_TIMEOUT_SECONDS):
        """Send raw bytes; return what comes back. The other side has to close the connection."""
        received = b""
        address = host, self.port
        with socket.create_connection(address, seconds) as client, suppress(ConnectionError):
            client.sendall(data)
            while part := client.recv(65536):
                received += part
        return received.decode("latin-1")

    def get_at_once(self, number=30):
        """Return the responses to `number` concurrent requests, alternating between the routes."""
        with ThreadPoolExecutor(number) as threads:
            return list(threads.map(self.get, ["/api/usercount", "/health"] * (number // 2)))

    def count(self):
        status, _, body = self.get()
        assert status == 200, body
        return json.loads(body)["totalUsers"]


GRANIAN = re.search(r"\$ (granian .*?) usercount:app", (HERE / "README.md").read_text(), re.DOTALL)
SERVERS = {"gunicorn": ["gunicorn"], "granian": GRANIAN[1].replace("\\\n", " ").split()}


class Service(Client):
    """The application on a server and a free port; its log is in `log`."""

    def __init__(self, environment, folder, *arguments, server="gunicorn", code=HERE):
        super().__init__(free_port())
        self.log = folder / f"service-{self.port}.log"
        command = [sys.executable, "-m", *SERVERS[server], *(arguments or ["usercount:app"])]
        if server == "granian":
            command += ["--port", str(self.port)]
            command += ["--workers", environment.get("WEB_CONCURRENCY", "1")]
        options = {"env": environment | {"PORT": str(self.port)}, "start_new_session": True}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=code, stdout=log, stderr=log, **options)

    def kill(self, signum=signal.SIGKILL):
        """Send a signal to the workers, too, as a terminal does at Ctrl-C."""
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, signum)
        self.process.wait(15)


@contextmanager
def running_service(environment, folder, *arguments, **options):
    service = Service(environment, folder, *arguments, **options)
    try:
        wait_until(lambda: service.get("/")[0] == 404)
        yield service
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(15) == 0
    finally:
        service.kill()


@pytest.fixture
def start(params, tmp_path):
    """A function that returns a running service; keywords are environment variables or options."""

    def start(database, *arguments, server="gunicorn", code=HERE, **settings):
        settings = environment(params, database, **settings)
        return running_service(settings, tmp_path, *arguments, server=server, code=code)

    return start
